"""memfd_create(2): files that live in memory, their seals, and hugetlb."""

from __future__ import annotations

import errno
import os
from enum import IntFlag
from typing import SupportsIndex

from uspace_mm._native import lib
from uspace_mm.errors import InputError
from uspace_mm.kernel._check import as_fd, as_int, check
from uspace_mm.kernel.mapping import check_huge_page_size


class MemfdFlag(IntFlag):
    """MFD_*. NOEXEC_SEAL and EXEC are Linux 6.3."""

    CLOEXEC = lib.UMM_MFD_CLOEXEC
    ALLOW_SEALING = lib.UMM_MFD_ALLOW_SEALING
    HUGETLB = lib.UMM_MFD_HUGETLB
    NOEXEC_SEAL = lib.UMM_MFD_NOEXEC_SEAL
    EXEC = lib.UMM_MFD_EXEC


class Seal(IntFlag):
    """F_SEAL_*: what is forbidden for good. EXEC is Linux 6.3."""

    SEAL = lib.UMM_SEAL_SEAL
    SHRINK = lib.UMM_SEAL_SHRINK
    GROW = lib.UMM_SEAL_GROW
    WRITE = lib.UMM_SEAL_WRITE
    FUTURE_WRITE = lib.UMM_SEAL_FUTURE_WRITE
    EXEC = lib.UMM_SEAL_EXEC


def memfd_create(
    name: str,
    size: SupportsIndex = 0,
    *,
    flags: MemfdFlag = MemfdFlag.CLOEXEC,
    huge_page_size: SupportsIndex = 0,
) -> int:
    """A descriptor of a new file of `size` bytes; the caller closes it.

    `name` (at most 249 bytes) shows up in /proc/PID/maps. `huge_page_size` picks a hugetlb pool (0 with
    HUGETLB: the default size).
    """
    call = "memfd_create"
    encoded = os.fsencode(name)
    if b"\0" in encoded or len(encoded) > 249:
        raise InputError(f"{call}: name must be at most 249 bytes without NUL, got {len(encoded)}")
    length = as_int(call, "size", size, high=(1 << 63) - 1)
    huge = check_huge_page_size(call, huge_page_size)
    bits = as_int(call, "flags", flags, high=(1 << 26) - 1)
    if huge and not bits & MemfdFlag.HUGETLB:
        raise InputError(f"{call}: huge_page_size is for MemfdFlag.HUGETLB")
    fd = check(
        lib.umm_memfd_create(encoded, bits | lib.umm_map_huge_bits(huge)),
        f"{call}({name})",
        hints={
            errno.EINVAL: "this kernel lacks one of the flags, or has no hugetlb pages of this size",
            errno.ENODEV: "this kernel has no hugetlb pages of this size",
            errno.EACCES: "vm.memfd_noexec forbids executable files in memory",
        },
    )
    try:
        if length:
            os.ftruncate(fd, length)
    except OSError as error:
        os.close(fd)
        check(-(error.errno or errno.EIO), f"ftruncate(memfd {name})", length=length)
    return fd


def add_seals(fd: SupportsIndex, seals: Seal) -> None:
    """Forbid what `seals` say, for everybody and for good."""
    call = "fcntl(F_ADD_SEALS)"
    bits = as_int(call, "seals", seals, high=0x7FFFFFFF)
    check(
        lib.umm_add_seals(as_fd(call, fd), bits),
        call,
        hints={
            errno.EPERM: "sealed against sealing; create it with MemfdFlag.ALLOW_SEALING",
            errno.EBUSY: "a writable mapping of it exists: unmap it before Seal.WRITE",
            errno.EINVAL: "not a file in memory, or a seal this kernel does not know",
        },
    )


def get_seals(fd: SupportsIndex) -> Seal:
    """The seals of a file in memory."""
    call = "fcntl(F_GET_SEALS)"
    return Seal(check(lib.umm_get_seals(as_fd(call, fd)), call, hints={errno.EINVAL: "not a file in memory"}))
