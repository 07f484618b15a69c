"""madvise(2) with every advice of Linux 6.18."""

from __future__ import annotations

import errno
from collections.abc import Callable
from enum import IntEnum
from typing import SupportsIndex

from uspace_mm._native import lib
from uspace_mm.errors import InputError
from uspace_mm.kernel._check import PAGE_SIZE, as_range, check


class Advice(IntEnum):
    """MADV_*. Linux 6.13 brought GUARD_INSTALL and GUARD_REMOVE, 6.1 COLLAPSE, 5.18 DONTNEED_LOCKED.

    HWPOISON and SOFT_OFFLINE take real memory out of service until the next boot.
    """

    NORMAL = lib.UMM_MADV_NORMAL
    RANDOM = lib.UMM_MADV_RANDOM
    SEQUENTIAL = lib.UMM_MADV_SEQUENTIAL
    WILLNEED = lib.UMM_MADV_WILLNEED
    DONTNEED = lib.UMM_MADV_DONTNEED
    FREE = lib.UMM_MADV_FREE
    REMOVE = lib.UMM_MADV_REMOVE
    DONTFORK = lib.UMM_MADV_DONTFORK
    DOFORK = lib.UMM_MADV_DOFORK
    MERGEABLE = lib.UMM_MADV_MERGEABLE
    UNMERGEABLE = lib.UMM_MADV_UNMERGEABLE
    HUGEPAGE = lib.UMM_MADV_HUGEPAGE
    NOHUGEPAGE = lib.UMM_MADV_NOHUGEPAGE
    DONTDUMP = lib.UMM_MADV_DONTDUMP
    DODUMP = lib.UMM_MADV_DODUMP
    WIPEONFORK = lib.UMM_MADV_WIPEONFORK
    KEEPONFORK = lib.UMM_MADV_KEEPONFORK
    COLD = lib.UMM_MADV_COLD
    PAGEOUT = lib.UMM_MADV_PAGEOUT
    POPULATE_READ = lib.UMM_MADV_POPULATE_READ
    POPULATE_WRITE = lib.UMM_MADV_POPULATE_WRITE
    DONTNEED_LOCKED = lib.UMM_MADV_DONTNEED_LOCKED
    COLLAPSE = lib.UMM_MADV_COLLAPSE
    HWPOISON = lib.UMM_MADV_HWPOISON
    SOFT_OFFLINE = lib.UMM_MADV_SOFT_OFFLINE
    GUARD_INSTALL = lib.UMM_MADV_GUARD_INSTALL
    GUARD_REMOVE = lib.UMM_MADV_GUARD_REMOVE


# Not in Python's errno module before 3.14; the same number on every architecture we run on.
_EHWPOISON = 133

HINTS = {
    errno.EINVAL: "this kernel lacks the advice, or this mapping does not take it (COLLAPSE: no page there)",
    errno.ENOMEM: "part of the range is not mapped, or no memory",
    errno.EAGAIN: "the kernel could not get at the pages just now: try again",
    errno.EBUSY: "the pages are in use elsewhere, or a userfaultfd or memory cgroup stands against it",
    errno.EPERM: "needs a right the caller lacks (CAP_SYS_ADMIN, CAP_SYS_NICE), or a seal forbids it",
    errno.EFAULT: "a page of the range cannot be populated",
    _EHWPOISON: "a page of the range is poisoned",
}


def as_advice(call: str, advice: Advice | int) -> Advice:
    """`advice` as a member; raises InputError for a number that Linux 6.18 does not have."""
    try:
        return Advice(advice)
    except ValueError:
        raise InputError(f"{call}: {advice!r} is not an advice of uspace_mm.kernel.madvise.Advice") from None


def madvise(
    address: SupportsIndex,
    length: SupportsIndex,
    advice: Advice,
    *,
    call: Callable[[int, int, int], int] = lib.umm_madvise,
) -> None:
    """Give `advice` for a range of this process, from a page boundary on. `call`: the native function.

    COLLAPSE succeeds without doing anything on a range smaller than a huge page: verify with PAGEMAP_SCAN.
    On memory of a userfaultfd with EVENT_REMOVE, DONTNEED, DONTNEED_LOCKED, FREE and REMOVE wait until the
    event was read; GUARD_INSTALL drops pages without an event (seen on 6.18).
    """
    known = as_advice("madvise", advice)
    name = f"madvise({known.name})"
    start, size = as_range(name, address, length)
    if start % PAGE_SIZE:
        raise InputError(f"{name}: address {start:#x} is not a multiple of {PAGE_SIZE}")
    check(call(start, size, known), name, address=start, length=size, hints=HINTS)
