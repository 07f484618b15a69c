"""The probes behind :mod:`uspace_mm.kernel.features`: each tries the thing itself, on memory and descriptors
of its own, and says how.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uspace_mm.errors import KernelError, UspaceError
from uspace_mm.kernel import prctl
from uspace_mm.kernel._check import PAGE_SIZE
from uspace_mm.kernel.io_uring import IoUring, update_slot
from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.kernel.mapping import MapFlag, Mapping, RemapFlag, map_memory, remap, unmap
from uspace_mm.kernel.memfd import MemfdFlag, Seal, add_seals, get_seals, memfd_create
from uspace_mm.kernel.pagemap import (
    COMMON_CATEGORIES,
    PFN_MASK,
    Category,
    Pagemap,
    PagemapBit,
    page_flags,
)
from uspace_mm.kernel.proc import hugetlb_pools, pmd_size
from uspace_mm.kernel.process import pidfd_getfd, pidfd_open, process_madvise, process_read
from uspace_mm.kernel.transparent_hugepage import TransparentHugepage

# Kernels with pages of 64 KiB have PMDs of 512 MiB, too much to fill for a probe.
_MODEST = 64 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether it works here, and how that was found out."""

    present: bool
    how: str


def pagemap_readable() -> Finding:
    """One's own pagemap tells present from missing."""
    with Pagemap() as pagemap, Mapping(2 * PAGE_SIZE) as memory:
        memory.array[0] = 1
        present = pagemap.present(memory.address, memory.length).tolist()
        return Finding(present == [True, False], "one page touched, one not")


def pagemap_scan() -> Finding:
    """PAGEMAP_SCAN finds a touched page and no other."""
    with Pagemap() as pagemap, Mapping(2 * PAGE_SIZE) as memory:
        memory.array[0] = 1
        found = pagemap.scan(memory.address, memory.length, any_of=Category.PRESENT)
        return Finding(
            [(region.start, region.length) for region in found] == [(memory.address, PAGE_SIZE)],
            "one page touched, one not",
        )


def frame_numbers() -> Finding:
    """pagemap shows frame numbers and /proc/kpageflags their flags."""
    with Pagemap() as pagemap, Mapping(PAGE_SIZE) as memory:
        memory.array[0] = 1
        frames = pagemap.entries(memory.address, PAGE_SIZE) & np.uint64(PFN_MASK)
        page_flags(frames)
        return Finding(True, "looked up the flags of a touched page")


def soft_dirty() -> Finding:
    """A fresh page has the soft-dirty bit."""
    with Pagemap() as pagemap, Mapping(PAGE_SIZE) as memory:
        memory.array[0] = 1
        bit = int(pagemap.entries(memory.address, PAGE_SIZE)[0]) & PagemapBit.SOFT_DIRTY
        return Finding(bool(bit), "pagemap bit 55 of a touched page")


def idle_tracking() -> Finding:
    """The idle bitmap exists and may be read."""
    path = Path("/sys/kernel/mm/page_idle/bitmap")
    if not path.exists():
        return Finding(False, f"no {path}")
    return Finding(os.access(path, os.R_OK | os.W_OK), f"access to {path}")


def advice(which: Advice) -> Finding:
    """madvise takes the advice for touched private memory."""
    with Mapping(PAGE_SIZE) as memory:
        memory.array[0] = 1
        madvise(memory.address, PAGE_SIZE, which)
        return Finding(True, "madvise on a touched page")


def guard_pages() -> Finding:
    """GUARD_INSTALL makes a guard that PAGEMAP or a later GUARD_REMOVE knows."""
    with Mapping(PAGE_SIZE) as memory:
        madvise(memory.address, PAGE_SIZE, Advice.GUARD_INSTALL)
        madvise(memory.address, PAGE_SIZE, Advice.GUARD_REMOVE)
        return Finding(not memory.array.any(), "installed one, removed it, read the page")


def guard_in_pagemap() -> Finding:
    """pagemap bit 58 shows guard pages."""
    with Pagemap() as pagemap, Mapping(PAGE_SIZE) as memory:
        madvise(memory.address, PAGE_SIZE, Advice.GUARD_INSTALL)
        bit = int(pagemap.entries(memory.address, PAGE_SIZE)[0]) & PagemapBit.GUARD
        return Finding(bool(bit), "pagemap bit 58 of a guard page")


def collapse() -> Finding:
    """MADV_COLLAPSE makes small pages huge, whatever the settings."""
    size = pmd_size()
    if size is None:
        return Finding(False, "no transparent huge pages on this kernel")
    if size > _MODEST:
        with Mapping(PAGE_SIZE) as memory:
            # Less than a PMD: nothing is done, but a kernel without the advice says EINVAL.
            madvise(memory.address, PAGE_SIZE, Advice.COLLAPSE)
        return Finding(True, f"the kernel takes the advice ({size >> 20} MiB were not tried)")
    with Mapping(size, align=size) as memory:
        madvise(memory.address, size, Advice.NOHUGEPAGE)
        memory.array[::PAGE_SIZE] = 1
        madvise(memory.address, size, Advice.HUGEPAGE)
        for attempt in range(10):
            try:
                madvise(memory.address, size, Advice.COLLAPSE)
                break
            except KernelError as error:
                # EAGAIN: the pages are on their way to the LRU, or khugepaged holds them.
                if error.errno != errno.EAGAIN or attempt == 9:
                    raise
        return _is_huge(memory, size)


def _is_huge(memory: Mapping, size: int) -> Finding:
    with Pagemap() as pagemap:
        try:
            found = pagemap.scan(memory.address, size, any_of=Category.HUGE, returned=COMMON_CATEGORIES)
        except KernelError:
            return Finding(True, "madvise succeeded (no PAGEMAP_SCAN to check it)")
        return Finding(found.total_bytes == size, "collapsed small pages, PAGEMAP_SCAN says huge")


def thp_configured() -> Finding:
    """Transparent huge pages are there and not switched off."""
    mode = TransparentHugepage().enabled.read()
    return Finding(mode != "never", f"transparent_hugepage/enabled says {mode}")


def thp_sizes() -> Finding:
    """There are sizes below the PMD."""
    sizes = TransparentHugepage().sizes()
    shown = ", ".join(f"{size // 1024}k" for size in sizes) or "none"
    return Finding(len(sizes) > 1, f"folders under transparent_hugepage: {shown}")


def thp_writable() -> Finding:
    """The settings may be changed by this user."""
    path = TransparentHugepage().enabled.path
    return Finding(os.access(path, os.W_OK), f"access to {path.parent}")


def thp_except_advised() -> Finding:
    """prctl takes the mode; this process is back in its former one afterwards."""
    with prctl.thp_mode_changed(prctl.ThpMode.EXCEPT_ADVISED):
        return Finding(prctl.thp_mode() is prctl.ThpMode.EXCEPT_ADVISED, "set it for a moment")


def hugetlb_pages() -> Finding:
    """A pool has a page to give."""
    pools = hugetlb_pools()
    shown = ", ".join(f"{pool.page_size // 1024}k: {pool.available}" for pool in pools) or "none"
    return Finding(any(pool.available > 0 for pool in pools), f"pages to be had: {shown}")


def fixed_noreplace() -> Finding:
    """MAP_FIXED_NOREPLACE refuses what is mapped."""
    with Mapping(PAGE_SIZE) as memory:
        flags = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED_NOREPLACE
        try:
            unmap(map_memory(PAGE_SIZE, address=memory.address, flags=flags), PAGE_SIZE)
        except KernelError as error:
            return Finding(error.errno == errno.EEXIST, "mapped over a mapping: EEXIST")
        return Finding(False, "it mapped over a mapping")


def remap_dontunmap() -> Finding:
    """MREMAP_DONTUNMAP takes the pages and leaves the mapping."""
    with Mapping(PAGE_SIZE) as memory:
        memory.array[0] = 7
        flags = RemapFlag.MAYMOVE | RemapFlag.DONTUNMAP
        unmap(remap(memory.address, PAGE_SIZE, PAGE_SIZE, flags=flags), PAGE_SIZE)
        return Finding(not memory.array.any(), "moved a page away, the old address reads zero")


def memfd_seals() -> Finding:
    """A memfd takes a seal."""
    fd = memfd_create("uspace_mm-probe", PAGE_SIZE, flags=MemfdFlag.CLOEXEC | MemfdFlag.ALLOW_SEALING)
    try:
        add_seals(fd, Seal.SHRINK)
        return Finding(bool(get_seals(fd) & Seal.SHRINK), "sealed one")
    finally:
        os.close(fd)


def pidfd() -> Finding:
    """pidfd_open and pidfd_getfd work on this process."""
    own = pidfd_open(os.getpid())
    try:
        os.close(pidfd_getfd(own, own))
        return Finding(True, "duplicated a descriptor of this process")
    finally:
        os.close(own)


def process_advice() -> Finding:
    """process_madvise works on this process."""
    own = pidfd_open(os.getpid())
    try:
        with Mapping(PAGE_SIZE) as memory:
            memory.array[0] = 1
            done = process_madvise(own, [(memory.address, PAGE_SIZE)], Advice.COLD)
            return Finding(done == PAGE_SIZE, "COLD for a page of this process")
    finally:
        os.close(own)


def process_memory() -> Finding:
    """process_vm_readv works on this process."""
    with Mapping(PAGE_SIZE) as memory:
        memory.array[:] = 9
        into = bytearray(PAGE_SIZE)
        process_read(os.getpid(), memory.address, into)
        return Finding(into == b"\x09" * PAGE_SIZE, "read a page of this process")


def io_uring_buffers() -> Finding:
    """A ring takes a table of buffers, and a buffer into a slot of it."""
    with IoUring() as ring, Mapping(PAGE_SIZE) as memory:
        ring.register_slots(1)
        update_slot(ring.fd, 0, memory.address, memory.length)
        return Finding(True, "registered a page with a ring")


def failure(error: UspaceError) -> Finding:
    """What a probe found that ended in an error of ours."""
    return Finding(False, str(error))
