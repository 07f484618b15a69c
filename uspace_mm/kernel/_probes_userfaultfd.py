"""The userfaultfd half of the probes behind :mod:`uspace_mm.kernel.features`.

No probe touches a missing page of a registered range: nobody would serve that fault. In each, the
userfaultfd is closed before the memory is unmapped: munmap would wait for its event to be read.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from uspace_mm._native import ffi, lib
from uspace_mm.errors import KernelError
from uspace_mm.kernel._check import PAGE_SIZE, check
from uspace_mm.kernel._probes import Finding
from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.kernel.mapping import MapFlag, Mapping
from uspace_mm.kernel.memfd import MemfdFlag, memfd_create
from uspace_mm.kernel.pagemap import (
    Category,
    Pagemap,
    PagemapBit,
    ScanFlag,
)
from uspace_mm.kernel.proc import hugetlb_pools
from uspace_mm.kernel.userfaultfd import (
    Feature,
    Ioctl,
    OutcomeKind,
    RegisterMode,
    Source,
    Userfaultfd,
    UserfaultfdBuilder,
)

_SHARED = MapFlag.SHARED


def opens(source: Source) -> Finding:
    """A descriptor can be had this way."""
    with UserfaultfdBuilder(source).open():
        return Finding(True, "opened one and did the handshake")


def pager_basics() -> Finding:
    """What no pager can do without: MISSING faults of private memory, COPY, and the events."""
    events = Feature.EVENT_REMOVE | Feature.EVENT_UNMAP | Feature.EVENT_REMAP
    with Mapping(PAGE_SIZE) as memory, UserfaultfdBuilder().require(events).open() as uffd:
        ioctls = uffd.register(memory.address, PAGE_SIZE, RegisterMode.MISSING)
        if not (ioctls & Ioctl.COPY and ioctls & Ioctl.WAKE):
            return Finding(False, f"registered, but the ioctls are {ioctls!r}")
        uffd.copy(memory.address, b"\xa5" * PAGE_SIZE).require()
        ok = bool((memory.array == 0xA5).all())
        return Finding(ok, f"copied a page in and compared it ({uffd.source.name.lower()} descriptor)")


def granted(feature: Feature) -> Finding:
    """UFFDIO_API takes the feature; for those whose effect only a fault or an event shows."""
    with UserfaultfdBuilder().require(feature).open():
        return Finding(True, "UFFDIO_API took it on a fresh descriptor")


@contextmanager
def _shared(size: int, huge: int = 0) -> Iterator[Mapping]:
    # NORESERVE: registering needs no page in the pool.
    extra = MemfdFlag.HUGETLB if huge else MemfdFlag(0)
    fd = memfd_create("uspace_mm-probe", size, flags=MemfdFlag.CLOEXEC | extra, huge_page_size=huge)
    try:
        hugetlb = MapFlag.HUGETLB if huge else MapFlag(0)
        flags = _SHARED | MapFlag.NORESERVE | hugetlb
        with Mapping(size, flags=flags, fd=fd, huge_page_size=huge) as mapping:
            yield mapping
    finally:
        os.close(fd)


def registers_shared(feature: Feature, mode: RegisterMode) -> Finding:
    """A mapping of a memfd can be registered in `mode`."""
    with _shared(PAGE_SIZE) as memory, UserfaultfdBuilder().require(feature).open() as uffd:
        uffd.register(memory.address, PAGE_SIZE, mode)
        return Finding(True, f"registered a memfd for {mode.name}")


def registers_hugetlb(feature: Feature, mode: RegisterMode) -> Finding:
    """A hugetlb mapping can be registered in `mode`; needs no page in the pool."""
    pools = hugetlb_pools()
    if not pools:
        return Finding(False, "no hugetlb on this kernel")
    size = pools[0].page_size
    with _shared(size, size) as memory, UserfaultfdBuilder().require(feature).open() as uffd:
        uffd.register(memory.address, size, mode)
        return Finding(True, f"registered a hugetlb memfd for {mode.name}")


def write_protect() -> Finding:
    """WRITEPROTECT marks a present page."""
    with (
        Mapping(PAGE_SIZE) as memory,
        UserfaultfdBuilder().require(Feature.PAGEFAULT_FLAG_WP).open() as uffd,
        Pagemap() as pagemap,
    ):
        memory.array[0] = 1
        uffd.register(memory.address, PAGE_SIZE, RegisterMode.WP)
        uffd.writeprotect(memory.address, PAGE_SIZE).require()
        marked = int(pagemap.entries(memory.address, PAGE_SIZE)[0]) & PagemapBit.UFFD_WP
        return Finding(bool(marked), "protected a page and looked at its pagemap bit")


def write_protect_unpopulated() -> Finding:
    """WRITEPROTECT leaves a marker on a missing page."""
    with (
        Mapping(PAGE_SIZE) as memory,
        UserfaultfdBuilder().require(Feature.WP_UNPOPULATED).open() as uffd,
        Pagemap() as pagemap,
    ):
        uffd.register(memory.address, PAGE_SIZE, RegisterMode.WP)
        uffd.writeprotect(memory.address, PAGE_SIZE).require()
        marked = int(pagemap.entries(memory.address, PAGE_SIZE)[0]) & PagemapBit.UFFD_WP
        return Finding(bool(marked), "protected a missing page and looked at its pagemap bit")


def write_protect_async() -> Finding:
    """The written pages are found and protected again by PAGEMAP_SCAN, and no fault is reported."""
    wanted = Feature.WP_ASYNC | Feature.WP_UNPOPULATED
    with (
        Mapping(2 * PAGE_SIZE) as memory,
        UserfaultfdBuilder().require(wanted).open() as uffd,
        Pagemap() as pagemap,
    ):
        memory.array[:] = 1
        uffd.register(memory.address, memory.length, RegisterMode.WP)

        def written() -> list[int]:
            found = pagemap.scan(
                memory.address,
                memory.length,
                all_of=Category.WRITTEN | Category.PRESENT,
                flags=ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC,
            )
            return [region.start for region in found]

        written()
        memory.array[PAGE_SIZE] = 2
        ok = written() == [memory.address + PAGE_SIZE] and written() == []
        return Finding(ok, "protected two pages, wrote to one, scanned")


def poison() -> Finding:
    """POISON takes a missing page."""
    with Mapping(PAGE_SIZE) as memory, UserfaultfdBuilder().require(Feature.POISON).open() as uffd:
        uffd.register(memory.address, PAGE_SIZE, RegisterMode.MISSING)
        poisoned = uffd.poison(memory.address, PAGE_SIZE).ok
        healed = uffd.copy(memory.address, bytes(PAGE_SIZE))
        # Poison is in the way of a COPY on kernels before the healing: then it answers EEXIST.
        note = "healed it by COPY" if healed.ok else f"COPY does not heal it ({healed.kind.name})"
        return Finding(poisoned, f"poisoned a missing page, {note}")


def move() -> Finding:
    """MOVE brings a page with its bytes and leaves a hole."""
    with Mapping(2 * PAGE_SIZE) as memory, UserfaultfdBuilder().require(Feature.MOVE).open() as uffd:
        with suppress(KernelError):  # the kernel has no transparent huge pages, so there are none to avoid
            madvise(memory.address, memory.length, Advice.NOHUGEPAGE)
        memory.array[:PAGE_SIZE] = 0x5A
        uffd.register(memory.address, memory.length, RegisterMode.MISSING)
        outcome = _move_patiently(uffd, memory.address + PAGE_SIZE, memory.address)
        if not outcome:
            return Finding(False, "UFFDIO_MOVE did not move a page of fresh memory")
        return Finding(bool((memory.array[PAGE_SIZE:] == 0x5A).all()), "moved a page and compared its bytes")


def _move_patiently(uffd: Userfaultfd, to: int, source: int) -> bool:
    # EAGAIN while another thread of this process maps memory; EBUSY while the page is on its way to the LRU.
    for _ in range(100):
        outcome = uffd.move(to, source, PAGE_SIZE)
        if outcome.kind not in (OutcomeKind.DEFERRED, OutcomeKind.BUSY):
            return outcome.ok
        os.sched_yield()
    return False


def move_in_batches() -> Finding:
    """A batch is flushed from the TLBs as one (Linux 6.18): it costs far less than its pages alone."""
    cost = ffi.new("struct umm_move_cost *")
    check(
        lib.umm_probe_move_cost(cost), "ioctl(UFFDIO_MOVE)", hints={errno.EINVAL: "this kernel has no MOVE"}
    )
    where = "another CPU busy" if cost.contended else "one CPU"
    how = f"measured: {cost.batch_ns} ns per page in 64s, {cost.single_ns} ns alone ({where})"
    return Finding(cost.batch_ns * 2 < cost.single_ns, how)
