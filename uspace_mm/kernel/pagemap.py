"""/proc/PID/pagemap, the PAGEMAP_SCAN ioctl (Linux 6.7), and /proc/kpageflags.

Sources: Documentation/admin-guide/mm/pagemap.rst, proc_pid_pagemap(5), PAGEMAP_SCAN(2const).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag
from types import TracebackType
from typing import SupportsIndex

import numpy as np
from numpy.typing import NDArray

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError, KernelError
from uspace_mm.kernel._check import PAGE_SIZE, as_int, as_pid, as_range, check


class PagemapBit(IntFlag):
    """Bits of a pagemap entry. A missing page has some too: a write-protect marker UFFD_WP, a guard GUARD."""

    SOFT_DIRTY = lib.UMM_PAGEMAP_SOFT_DIRTY
    EXCLUSIVE = lib.UMM_PAGEMAP_EXCLUSIVE
    UFFD_WP = lib.UMM_PAGEMAP_UFFD_WP
    GUARD = lib.UMM_PAGEMAP_GUARD
    FILE = lib.UMM_PAGEMAP_FILE
    SWAP = lib.UMM_PAGEMAP_SWAP
    PRESENT = lib.UMM_PAGEMAP_PRESENT


PFN_MASK = int(lib.UMM_PAGEMAP_PFN_MASK)


def has_bits(entries: NDArray[np.uint64], bits: PagemapBit) -> NDArray[np.bool_]:
    """Which entries have one of `bits` or more, same shape (numpy takes no IntFlag of 64 bits)."""
    result: NDArray[np.bool_] = (entries & np.uint64(int(bits))) != 0
    return result


class Category(IntFlag):
    """PAGE_IS_* of PAGEMAP_SCAN. WRITTEN says nothing where no write protection is registered."""

    WPALLOWED = lib.UMM_PAGE_IS_WPALLOWED
    WRITTEN = lib.UMM_PAGE_IS_WRITTEN
    FILE = lib.UMM_PAGE_IS_FILE
    PRESENT = lib.UMM_PAGE_IS_PRESENT
    SWAPPED = lib.UMM_PAGE_IS_SWAPPED
    PFNZERO = lib.UMM_PAGE_IS_PFNZERO
    HUGE = lib.UMM_PAGE_IS_HUGE
    SOFT_DIRTY = lib.UMM_PAGE_IS_SOFT_DIRTY
    GUARD = lib.UMM_PAGE_IS_GUARD


# Those that every kernel with PAGEMAP_SCAN knows; GUARD came with 6.15 and is EINVAL before.
COMMON_CATEGORIES = Category(0xFF)


class ScanFlag(IntFlag):
    """PM_SCAN_*: write-protect the matching pages, and fail unless their userfaultfd has WP_ASYNC."""

    WP_MATCHING = lib.UMM_PAGEMAP_SCAN_WP_MATCHING
    CHECK_WPASYNC = lib.UMM_PAGEMAP_SCAN_CHECK_WPASYNC


_NO_CATEGORY = Category(0)
_NO_FLAG = ScanFlag(0)
# The layout of struct page_region.
REGION = np.dtype([("start", "=u8"), ("end", "=u8"), ("categories", "=u8")])
_BATCH = 2048  # regions per call: 48 KiB


@dataclass(frozen=True, slots=True)
class PageRange:
    """Neighbouring pages [start, end) of the same categories (of those asked for)."""

    start: int
    end: int
    categories: Category

    @property
    def length(self) -> int:
        """Bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class ScanResult:
    """``regions`` is a structured array (start, end, categories) in address order; iterating gives
    :class:`PageRange`. The scan went up to ``walk_end``."""

    regions: NDArray[np.void]
    walk_end: int

    def __len__(self) -> int:
        return len(self.regions)

    def __iter__(self) -> Iterator[PageRange]:
        for start, end, categories in self.regions.tolist():
            yield PageRange(start, end, Category(categories))

    @property
    def total_bytes(self) -> int:
        """Bytes in all regions."""
        return int((self.regions["end"] - self.regions["start"]).sum())


_PERMISSION = "another user's pagemap needs CAP_DAC_READ_SEARCH, one's own after a setuid prctl.set_dumpable"
_OPEN_HINTS = {
    errno.ENOENT: "no such process, or a kernel without CONFIG_PROC_PAGE_MONITOR",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
}
_SCAN_HINTS = {
    errno.ENOTTY: "PAGEMAP_SCAN came with Linux 6.7: use Pagemap.entries",
    errno.EPERM: "CHECK_WPASYNC: a mapping of the range is not registered with WP and WP_ASYNC",
    errno.EINVAL: "a category this kernel lacks (GUARD before 6.15), or no category asked for",
}


class Pagemap:
    """The page map of process `pid` (0: the caller). Owns a descriptor; also a context manager.

    The descriptor stays with the address space it was opened on: a child of fork(2) opens its own.
    """

    def __init__(self, pid: SupportsIndex = 0) -> None:
        number = as_pid("open(pagemap)", pid, low=0)
        path = f"/proc/{number or 'self'}/pagemap"
        self._fd = check(lib.umm_pagemap_open(number), f"open({path})", hints=_OPEN_HINTS)

    def fileno(self) -> int:
        """The descriptor; raises InputError after :meth:`close`."""
        if self._fd < 0:
            raise InputError("this pagemap is closed")
        return self._fd

    def close(self) -> None:
        """Close; harmless when closed already."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Pagemap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def entries(self, address: SupportsIndex, length: SupportsIndex) -> NDArray[np.uint64]:
        """The raw entries of a page-aligned range, shape (pages,); see :func:`has_bits`.

        Frame numbers are zero without CAP_SYS_ADMIN. Unmapped pages are zero.
        """
        call = "pread(pagemap)"
        start, size = as_range(call, address, length, align=PAGE_SIZE)
        entries = np.zeros(size // PAGE_SIZE, np.uint64)
        target = ffi.from_buffer("uint64_t[]", entries, require_writable=True)
        result = lib.umm_pagemap_read(self.fileno(), start, len(entries), PAGE_SIZE, target)
        check(
            result,
            call,
            address=start,
            length=size,
            hints={errno.EIO: "the address space ends before", errno.ESRCH: "the process has gone"},
        )
        return entries

    def present(self, address: SupportsIndex, length: SupportsIndex) -> NDArray[np.bool_]:
        """Which pages of the range are in memory and mapped, shape (pages,)."""
        return has_bits(self.entries(address, length), PagemapBit.PRESENT)

    def scan(
        self,
        address: SupportsIndex,
        length: SupportsIndex,
        *,
        any_of: Category = _NO_CATEGORY,
        all_of: Category = _NO_CATEGORY,
        inverted: Category = _NO_CATEGORY,
        returned: Category | None = None,
        flags: ScanFlag = _NO_FLAG,
        max_pages: SupportsIndex = 0,
    ) -> ScanResult:
        """Regions whose pages have, after flipping the `inverted` bits, all of `all_of` and one of `any_of`.

        `returned`: the categories to report (default: those of `any_of` and `all_of`); only differences in
        these split a region. With `max_pages` the scan may end early: go on at ``walk_end``. Page ranges
        that belong to no mapping are left out. With WP_MATCHING the pages of a region are found and
        protected atomically; the range as a whole is not one atomic step.
        """
        call = "ioctl(PAGEMAP_SCAN)"
        start, size = as_range(call, address, length, align=PAGE_SIZE)
        limit = as_int(call, "max_pages", max_pages)
        report = any_of | all_of if returned is None else returned
        args = ffi.new("struct umm_pagemap_scan *")
        args.flags = as_int(call, "flags", flags)
        args.end = start + size
        args.vec_len = _BATCH
        args.category_anyof_mask = as_int(call, "any_of", any_of)
        args.category_mask = as_int(call, "all_of", all_of)
        args.category_inverted = as_int(call, "inverted", inverted)
        args.return_mask = as_int(call, "returned", report)
        batches: list[NDArray[np.void]] = []
        position, left = start, limit
        while position < start + size:
            batch = np.empty(_BATCH, REGION)
            args.start = position
            args.vec = batch.ctypes.data
            args.max_pages = left
            count = lib.umm_pagemap_scan(self.fileno(), args)
            check(count, call, address=position, length=start + size - position, hints=_SCAN_HINTS)
            found = batch[:count]
            batches.append(found)
            if args.walk_end <= position:
                raise KernelError(call, errno.EIO, address=position, length=size, hint="the scan stood still")
            position = args.walk_end
            if limit:
                left -= int((found["end"] - found["start"]).sum()) // PAGE_SIZE
                if left <= 0:
                    break
        return ScanResult(np.concatenate(batches), position)


class KPageFlag(IntFlag):
    """Bits of /proc/kpageflags (include/uapi/linux/kernel-page-flags.h)."""

    LOCKED = 1 << 0
    ERROR = 1 << 1
    REFERENCED = 1 << 2
    UPTODATE = 1 << 3
    DIRTY = 1 << 4
    LRU = 1 << 5
    ACTIVE = 1 << 6
    SLAB = 1 << 7
    WRITEBACK = 1 << 8
    RECLAIM = 1 << 9
    BUDDY = 1 << 10
    MMAP = 1 << 11
    ANON = 1 << 12
    SWAPCACHE = 1 << 13
    SWAPBACKED = 1 << 14
    COMPOUND_HEAD = 1 << 15
    COMPOUND_TAIL = 1 << 16
    HUGE = 1 << 17
    UNEVICTABLE = 1 << 18
    HWPOISON = 1 << 19
    NOPAGE = 1 << 20
    KSM = 1 << 21
    THP = 1 << 22
    OFFLINE = 1 << 23
    ZERO_PAGE = 1 << 24
    IDLE = 1 << 25
    PGTABLE = 1 << 26


def page_flags(frames: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The /proc/kpageflags words of page frame numbers (``entries & PFN_MASK``), same shape.

    Raises KernelError EACCES without CAP_SYS_ADMIN, InputError for frame 0, which is what a pagemap without
    that right shows. Neighbouring frames are read in one call.
    """
    call = "read(/proc/kpageflags)"
    numbers = np.ascontiguousarray(frames, np.uint64)
    if not numbers.size:
        return numbers.copy()
    if not numbers.all():
        raise InputError(f"{call}: frame 0 is not a page of a process (missing page, or no CAP_SYS_ADMIN)")
    hint = "needs root: CAP_SYS_ADMIN for frame numbers, and the file is root's"
    unique, back = np.unique(numbers, return_inverse=True)
    flags = np.empty(len(unique), np.uint64)
    breaks = np.flatnonzero(np.diff(unique) != 1) + 1
    try:
        fd = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(call, error.errno or errno.EIO, hint=hint) from None
    try:
        for begin, end in zip([0, *breaks], [*breaks, len(unique)], strict=True):
            data = os.pread(fd, 8 * (end - begin), 8 * int(unique[begin]))
            if len(data) != 8 * (end - begin):
                raise InputError(f"{call}: frame {int(unique[begin])} is past the end of memory")
            flags[begin:end] = np.frombuffer(data, np.uint64)
    except OSError as error:
        raise KernelError(call, error.errno or errno.EIO, hint=hint) from None
    finally:
        os.close(fd)
    return flags[back].reshape(numbers.shape)
