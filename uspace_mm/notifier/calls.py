"""mmap(2), munmap(2), mremap(2), madvise(2) and mprotect(2) for those who want the notifiers of this process
told: the start before anything changes, the end after all of it, source CALL.

Told is what changes, with the ranges that the kernel makes of the arguments: a mapping in free space, memory
that grows in place and advice without consequences are not told. A call that fails after its start was told
raises; the end has its errno. Arguments and results are those of the calls without notice in
:mod:`uspace_mm.kernel.mapping` and :mod:`uspace_mm.kernel.madvise`.
"""

from __future__ import annotations

import errno
from typing import SupportsIndex

from uspace_mm._native import lib
from uspace_mm.kernel import madvise as _madvise
from uspace_mm.kernel import mapping as _mapping
from uspace_mm.kernel._check import as_int, as_range, check
from uspace_mm.kernel.madvise import Advice
from uspace_mm.kernel.mapping import PRIVATE_ANONYMOUS, READ_WRITE, MapFlag, Protection, RemapFlag

__all__ = ["madvise", "mmap", "mprotect", "mremap", "munmap"]

_UNMAPPED = {errno.ENOMEM: "part of the range is not mapped, or too many mappings (vm.max_map_count)"}


def mmap(
    length: SupportsIndex,
    *,
    address: SupportsIndex = 0,
    protection: Protection = READ_WRITE,
    flags: MapFlag = PRIVATE_ANONYMOUS,
    fd: SupportsIndex | None = None,
    offset: SupportsIndex = 0,
    huge_page_size: SupportsIndex = 0,
) -> int:
    """Map `length` bytes and return the address. Tells UNMAP of what MapFlag.FIXED replaces.

    Raises InputError for arguments that cannot be, KernelError as mmap(2).
    """
    return _mapping.map_memory(
        length,
        address=address,
        protection=protection,
        flags=flags,
        fd=fd,
        offset=offset,
        huge_page_size=huge_page_size,
        call=lib.umm_mm_mmap,
    )


def munmap(address: SupportsIndex, length: SupportsIndex) -> None:
    """Tells UNMAP. Raises InputError for an empty range, KernelError as munmap(2)."""
    start, size = as_range("munmap", address, length)
    check(lib.umm_mm_munmap(start, size), "munmap", address=start, length=size, hints=_UNMAPPED)


def mremap(
    address: SupportsIndex,
    old_length: SupportsIndex,
    new_length: SupportsIndex,
    *,
    flags: RemapFlag = RemapFlag.MAYMOVE,
    new_address: SupportsIndex = 0,
) -> int:
    """The new address. Tells MOVE where the memory moves, UNMAP of the end that a smaller length cuts off,
    and UNMAP of what RemapFlag.FIXED replaces at `new_address`.

    Raises InputError for arguments that cannot be, KernelError as mremap(2).
    """
    return _mapping.remap(
        address, old_length, new_length, flags=flags, new_address=new_address, call=lib.umm_mm_mremap
    )


def madvise(address: SupportsIndex, length: SupportsIndex, advice: Advice) -> None:
    """Tells REMOVE (DONTNEED, DONTNEED_LOCKED, FREE, REMOVE, GUARD_INSTALL), EVICT (PAGEOUT), BACKING
    (COLLAPSE, with ``change`` when it was done; SOFT_OFFLINE, UNMERGEABLE) or POISON (HWPOISON); of other
    advice nothing.

    Raises InputError for arguments that cannot be, KernelError as madvise(2).
    """
    _madvise.madvise(address, length, advice, call=lib.umm_mm_madvise)


def mprotect(address: SupportsIndex, length: SupportsIndex, protection: Protection) -> None:
    """Tells PROTECT. Raises InputError for an empty range, KernelError as mprotect(2)."""
    start, size = as_range("mprotect", address, length)
    bits = as_int("mprotect", "protection", protection, high=0x7FFFFFFF)
    check(lib.umm_mm_mprotect(start, size, bits), "mprotect", address=start, length=size, hints=_UNMAPPED)
