"""Mappings, madvise, pagemap, processes and /proc held against each other on the running kernel."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from uspace_mm.errors import InputError, KernelError
from uspace_mm.kernel import mapping as m
from uspace_mm.kernel import prctl, proc
from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.kernel.memfd import MemfdFlag, Seal, add_seals, get_seals, memfd_create
from uspace_mm.kernel.pagemap import (
    COMMON_CATEGORIES,
    PFN_MASK,
    Category,
    KPageFlag,
    Pagemap,
    PagemapBit,
    ScanFlag,
    has_bits,
    page_flags,
)
from uspace_mm.kernel.process import (
    PidfdFlag,
    pidfd_getfd,
    pidfd_open,
    process_madvise,
    process_read,
    process_write,
)
from uspace_mm.kernel.userfaultfd import Feature, RegisterMode, UserfaultfdBuilder, probe_features

PAGE = proc.page_size()
PMD = proc.pmd_size()


@pytest.fixture
def memory() -> Iterator[m.Mapping]:
    """64 base pages, never huge."""
    with m.Mapping(64 * PAGE) as mapping:
        if PMD is not None:
            madvise(mapping.address, mapping.length, Advice.NOHUGEPAGE)
        yield mapping


@pytest.fixture
def pagemap() -> Iterator[Pagemap]:
    with Pagemap() as opened:
        yield opened


@pytest.fixture
def huge() -> Iterator[m.Mapping]:
    """Two PMDs of which the first was collapsed."""
    if PMD is None:
        pytest.skip("lacks: transparent huge pages")
    with m.Mapping(2 * PMD, align=PMD) as mapping:
        madvise(mapping.address, 2 * PMD, Advice.NOHUGEPAGE)
        mapping.array[::PAGE] = 1
        madvise(mapping.address, 2 * PMD, Advice.HUGEPAGE)
        collapse(mapping.address, PMD)
        yield mapping


def collapse(address: int, length: int) -> None:
    for attempt in range(20):
        try:
            madvise(address, length, Advice.COLLAPSE)
        except KernelError as error:
            if error.errno != errno.EAGAIN or attempt == 19:
                raise
        else:
            return


def sleeper() -> subprocess.Popen[bytes]:
    """A process with one page of 0x5a, whose address it prints."""
    script = (
        "import sys, ctypes; b = (ctypes.c_char * 65536).from_buffer(bytearray(b'Z' * 65536));"
        "print(ctypes.addressof(b), flush=True); sys.stdin.read()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )


# Sizes and pools


def test_sizes_agree_with_other_sources() -> None:
    assert mmap.PAGESIZE == PAGE
    assert proc.allowed_cpus() == psutil.Process().cpu_affinity()
    named = sorted(int(p.name.split("-")[1][:-2]) * 1024 for p in Path("/sys/kernel/mm/hugepages").iterdir())
    pools = proc.hugetlb_pools()
    assert [pool.page_size for pool in pools] == named
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    default = next(pool for pool in pools if pool.page_size == proc.default_hugetlb_size())
    assert default.total == int(meminfo["HugePages_Total"])
    assert default.free == int(meminfo["HugePages_Free"])


# Mappings


def test_a_mapping_is_in_smaps_and_gone_after_close() -> None:
    with m.Mapping(3 * PAGE, flags=m.PRIVATE_ANONYMOUS | m.MapFlag.NORESERVE) as mapping:
        entry = proc.mapping_at(mapping.address)
        assert entry.start <= mapping.address and mapping.address + 3 * PAGE <= entry.end
        assert entry.permissions == "rw-p"
        assert "nr" in entry.vm_flags
        address = mapping.address
        m.protect(address, PAGE, m.Protection.READ)
        assert proc.mapping_at(address).permissions == "r--p"
    with pytest.raises(KernelError) as caught:
        m.mincore(address, PAGE)
    assert caught.value.errno == errno.ENOMEM
    with pytest.raises(InputError, match="closed"):
        _ = mapping.array


def test_fixed_noreplace_refuses_what_is_mapped(memory: m.Mapping) -> None:
    memory.array[0] = 5
    flags = m.PRIVATE_ANONYMOUS | m.MapFlag.FIXED_NOREPLACE
    with pytest.raises(KernelError, match="something is mapped there") as caught:
        m.map_memory(PAGE, address=memory.address, flags=flags)
    assert caught.value.errno == errno.EEXIST
    assert memory.array[0] == 5


@pytest.mark.parametrize("align", [PAGE, 16 * PAGE, 1 << 22])
def test_alignment(align: int) -> None:
    with m.Mapping(PAGE, align=align) as mapping:
        assert mapping.address % align == 0
        mapping.array[:] = 1


def test_remap_moves_the_bytes(memory: m.Mapping) -> None:
    memory.array[:] = np.arange(memory.length, dtype=np.uint64).astype(np.uint8)
    before = memory.array.copy()
    source = memory.address
    memory.address = m.remap(source, memory.length, 128 * PAGE)
    memory.length = 128 * PAGE
    assert (memory.array[: 64 * PAGE] == before).all()
    assert not memory.array[64 * PAGE :].any()


def test_remap_dontunmap_leaves_an_empty_mapping(memory: m.Mapping) -> None:
    memory.array[:] = 7
    flags = m.RemapFlag.MAYMOVE | m.RemapFlag.DONTUNMAP
    moved = m.remap(memory.address, memory.length, memory.length, flags=flags)
    assert not memory.array.any()
    m.unmap(moved, memory.length)


def test_growing_in_place_into_a_neighbour_fails_by_name() -> None:
    with m.Mapping(2 * PAGE) as mapping, pytest.raises(KernelError, match="mremap at 0x.*MAYMOVE"):
        m.remap(mapping.address, PAGE, 2 * PAGE, flags=m.RemapFlag(0))


def test_hugetlb_mapping_names_the_empty_pool() -> None:
    pools = [pool for pool in proc.hugetlb_pools() if pool.available == 0]
    if not pools:
        pytest.skip("lacks: an empty hugetlb pool")
    size = pools[0].page_size
    flags = m.PRIVATE_ANONYMOUS | m.MapFlag.HUGETLB
    with pytest.raises(KernelError, match="no free page in the pool"):
        m.map_memory(size, flags=flags, huge_page_size=size)
    # Reserving nothing, a mapping can be had, and its page size is the pool's.
    with m.Mapping(1, flags=flags | m.MapFlag.NORESERVE, huge_page_size=size) as mapping:
        assert mapping.length == size
        entry = proc.mapping_at(mapping.address)
        assert entry.page_size == size
        assert "ht" in entry.vm_flags


# memfd


def test_memfd_seals_hold() -> None:
    fd = memfd_create("sealed", PAGE, flags=MemfdFlag.CLOEXEC | MemfdFlag.ALLOW_SEALING)
    try:
        assert os.fstat(fd).st_size == PAGE
        assert os.readlink(f"/proc/self/fd/{fd}") == "/memfd:sealed (deleted)"
        assert not os.get_inheritable(fd)
        assert get_seals(fd) == Seal(0)
        with m.Mapping(PAGE, flags=m.MapFlag.SHARED, fd=fd) as mapping:
            mapping.array[0] = 9
            with pytest.raises(KernelError, match="writable mapping"):
                add_seals(fd, Seal.WRITE)
        add_seals(fd, Seal.WRITE | Seal.SHRINK | Seal.GROW)
        assert get_seals(fd) == Seal.WRITE | Seal.SHRINK | Seal.GROW
        assert os.pread(fd, 1, 0) == b"\x09"
        for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0)):
            with pytest.raises(PermissionError):
                change()
        add_seals(fd, Seal.SEAL)
        with pytest.raises(KernelError, match="sealed against sealing"):
            add_seals(fd, Seal.FUTURE_WRITE)
    finally:
        os.close(fd)


def test_seals_of_what_is_no_memfd(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, pytest.raises(KernelError, match="not a file in memory"):
        get_seals(file.fileno())


def test_hugetlb_memfd_has_the_size_of_its_pool() -> None:
    pools = proc.hugetlb_pools()
    if not pools:
        pytest.skip("lacks: hugetlb")
    size = pools[0].page_size
    fd = memfd_create("huge", size, flags=MemfdFlag.CLOEXEC | MemfdFlag.HUGETLB, huge_page_size=size)
    try:
        assert os.fstat(fd).st_blksize == size
    finally:
        os.close(fd)


# madvise and pagemap


def test_pagemap_agrees_with_mincore_and_scan(memory: m.Mapping, pagemap: Pagemap) -> None:
    touched = np.zeros(64, np.bool_)
    touched[[0, 1, 5, 6, 7, 40, 63]] = True
    for page in np.flatnonzero(touched):
        memory.array[page * PAGE] = 1
    assert (pagemap.present(memory.address, memory.length) == touched).all()
    assert (m.mincore(memory.address, memory.length) == touched).all()
    result = pagemap.scan(memory.address, memory.length, any_of=Category.PRESENT)
    assert result.walk_end == memory.address + memory.length
    scanned = np.zeros(64, np.bool_)
    for region in result:
        assert region.categories == Category.PRESENT
        scanned[(region.start - memory.address) // PAGE : (region.end - memory.address) // PAGE] = True
    assert (scanned == touched).all()
    assert result.total_bytes == touched.sum() * PAGE
    absent = pagemap.scan(
        memory.address,
        memory.length,
        all_of=Category.PRESENT,
        inverted=Category.PRESENT,
        returned=Category.FILE,
    )
    assert absent.total_bytes == (~touched).sum() * PAGE


def test_a_scan_of_more_regions_than_fit_in_one_call(pagemap: Pagemap) -> None:
    pages = 3 * 2048 * 2
    with m.Mapping(pages * PAGE, flags=m.PRIVATE_ANONYMOUS | m.MapFlag.NORESERVE) as mapping:
        if PMD is not None:
            madvise(mapping.address, mapping.length, Advice.NOHUGEPAGE)
        mapping.array[:: 2 * PAGE] = 1
        result = pagemap.scan(mapping.address, mapping.length, any_of=Category.PRESENT)
        assert len(result) == pages // 2
        assert (result.regions["start"] == mapping.address + np.arange(pages // 2) * 2 * PAGE).all()


def test_a_scan_with_a_page_limit_goes_on_where_it_stopped(memory: m.Mapping, pagemap: Pagemap) -> None:
    memory.array[::PAGE] = 1
    first = pagemap.scan(memory.address, memory.length, any_of=Category.PRESENT, max_pages=10)
    assert first.total_bytes == 10 * PAGE
    rest = memory.address + memory.length - first.walk_end
    second = pagemap.scan(first.walk_end, rest, any_of=Category.PRESENT)
    assert first.total_bytes + second.total_bytes == memory.length


def test_zero_pages_and_written_ones_differ(memory: m.Mapping, pagemap: Pagemap) -> None:
    assert memory.array[0] == 0
    memory.array[PAGE] = 1
    found = list(
        pagemap.scan(
            memory.address, 2 * PAGE, any_of=Category.PRESENT, returned=Category.PRESENT | Category.PFNZERO
        )
    )
    assert [Category.PFNZERO in region.categories for region in found] == [True, False]


def test_huge_pages_in_scan_smaps_and_page_flags(huge: m.Mapping, pagemap: Pagemap) -> None:
    assert PMD is not None
    found = list(pagemap.scan(huge.address, 2 * PMD, any_of=Category.HUGE, returned=COMMON_CATEGORIES))
    assert [(region.start, region.length) for region in found] == [(huge.address, PMD)]
    assert proc.mapping_at(huge.address).anon_huge_bytes == PMD
    frames = pagemap.entries(huge.address, 2 * PMD) & np.uint64(PFN_MASK)
    flags = page_flags(frames)
    thp = (flags & np.uint64(KPageFlag.THP)) != 0
    assert thp[: PMD // PAGE].all() and not thp[PMD // PAGE :].any()
    assert flags[0] & np.uint64(KPageFlag.COMPOUND_HEAD)
    assert (np.diff(frames[: PMD // PAGE]) == 1).all(), "a huge page is contiguous"
    assert ((flags & np.uint64(KPageFlag.ANON)) != 0).all()


def test_smaps_resident_agrees_with_pagemap(huge: m.Mapping, pagemap: Pagemap) -> None:
    present = int(pagemap.present(huge.address, huge.length).sum()) * PAGE
    assert proc.mapping_at(huge.address).rss_bytes == present == huge.length


def test_exclusive_is_lost_to_a_child(memory: m.Mapping, pagemap: Pagemap) -> None:
    memory.array[0] = 1
    assert has_bits(pagemap.entries(memory.address, PAGE), PagemapBit.EXCLUSIVE).all()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        assert not has_bits(pagemap.entries(memory.address, PAGE), PagemapBit.EXCLUSIVE).any()
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(child, 0)


def test_written_pages_are_found_once(memory: m.Mapping, pagemap: Pagemap) -> None:
    wanted = Feature.WP_ASYNC | Feature.WP_UNPOPULATED
    if wanted & ~probe_features():
        pytest.skip("lacks: UFFD_FEATURE_WP_ASYNC")
    memory.array[::PAGE] = 1

    def written() -> list[int]:
        result = pagemap.scan(
            memory.address,
            memory.length,
            all_of=Category.WRITTEN | Category.PRESENT,
            flags=ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC,
        )
        return [
            page
            for region in result
            for page in range((region.start - memory.address) // PAGE, (region.end - memory.address) // PAGE)
        ]

    with pytest.raises(KernelError, match="not registered with WP and WP_ASYNC"):
        written()
    with UserfaultfdBuilder().require(wanted).open() as uffd:
        uffd.register(memory.address, memory.length, RegisterMode.WP)
        assert written() == list(range(64))
        assert written() == []
        memory.array[3 * PAGE] = 2
        memory.array[4 * PAGE] = 2
        memory.array[60 * PAGE] = 2
        assert written() == [3, 4, 60]
        assert written() == []
        assert uffd.read() is None


def test_guard_pages_are_told_from_holes(memory: m.Mapping, pagemap: Pagemap) -> None:
    try:
        madvise(memory.address, PAGE, Advice.GUARD_INSTALL)
    except KernelError:
        pytest.skip("lacks: MADV_GUARD_INSTALL")
    entries = pagemap.entries(memory.address, 2 * PAGE)
    if not has_bits(entries, PagemapBit.GUARD).any():
        pytest.skip("lacks: guards in pagemap (Linux 6.15)")
    assert has_bits(entries, PagemapBit.GUARD).tolist() == [True, False]
    found = list(pagemap.scan(memory.address, 2 * PAGE, any_of=Category.GUARD))
    assert [(region.start, region.length) for region in found] == [(memory.address, PAGE)]
    reader, writer = os.pipe()
    with pytest.raises(OSError), open(writer, "wb", buffering=0) as pipe:
        pipe.write(memory.array[:1].data)
    os.close(reader)
    madvise(memory.address, PAGE, Advice.GUARD_REMOVE)
    assert memory.array[0] == 0


HARMLESS = [
    advice
    for advice in Advice
    if advice not in (Advice.HWPOISON, Advice.SOFT_OFFLINE, Advice.REMOVE, Advice.COLLAPSE)
]


@pytest.mark.parametrize("advice", HARMLESS, ids=lambda advice: advice.name)
def test_the_kernel_takes_every_advice(memory: m.Mapping, advice: Advice) -> None:
    memory.array[:] = 1
    try:
        madvise(memory.address, memory.length, advice)
    except KernelError as error:
        if error.errno == errno.EINVAL:
            pytest.skip(f"lacks: madvise({advice.name})")
        raise
    if advice is Advice.WIPEONFORK:
        assert "wf" in proc.mapping_at(memory.address).vm_flags
    if advice in (Advice.DONTNEED, Advice.DONTNEED_LOCKED, Advice.GUARD_INSTALL):
        assert not m.mincore(memory.address, memory.length).any()


def test_remove_punches_a_hole_into_shared_memory() -> None:
    fd = memfd_create("holes", 4 * PAGE)
    try:
        with m.Mapping(4 * PAGE, flags=m.MapFlag.SHARED, fd=fd) as mapping:
            mapping.array[:] = 1
            madvise(mapping.address + PAGE, PAGE, Advice.REMOVE)
            assert os.fstat(fd).st_blocks * 512 == 3 * PAGE
            assert os.pread(fd, 1, PAGE) == b"\0"
    finally:
        os.close(fd)


def test_populate_makes_pages_present(memory: m.Mapping) -> None:
    madvise(memory.address, 8 * PAGE, Advice.POPULATE_WRITE)
    assert m.mincore(memory.address, memory.length).sum() == 8


def test_madvise_on_a_hole_names_the_range() -> None:
    with m.Mapping(PAGE) as mapping:
        address = mapping.address
    with pytest.raises(KernelError, match="not mapped") as caught:
        madvise(address, PAGE, Advice.WILLNEED)
    assert (caught.value.call, caught.value.address, caught.value.length) == (
        "madvise(WILLNEED)",
        address,
        PAGE,
    )


def test_a_scan_without_a_category_says_why_not(memory: m.Mapping, pagemap: Pagemap) -> None:
    with pytest.raises(KernelError, match="a category this kernel lacks") as caught:
        pagemap.scan(memory.address, PAGE, any_of=Category(1 << 40))
    assert caught.value.errno == errno.EINVAL


def test_the_pagemap_ends_with_the_address_space(pagemap: Pagemap) -> None:
    top = (1 << 64) - PAGE
    with pytest.raises(KernelError, match="the address space ends before"):
        pagemap.entries(top, PAGE)


def test_a_closed_pagemap_is_an_input_error() -> None:
    opened = Pagemap()
    opened.close()
    opened.close()
    with pytest.raises(InputError, match="closed"):
        opened.entries(0, PAGE)


# Other processes


def test_another_process_is_read_written_and_advised() -> None:
    with sleeper() as child:
        assert child.stdin and child.stdout
        address = int(child.stdout.readline())
        pidfd = pidfd_open(child.pid)
        try:
            into = bytearray(65536)
            assert process_read(child.pid, address, into) == 65536
            assert into == b"Z" * 65536
            assert process_write(child.pid, address, b"changed") == 7
            assert process_read(child.pid, address, memoryview(into)[:8]) == 8
            assert into[:8] == b"changedZ"
            page = -(-address // PAGE) * PAGE
            assert process_madvise(pidfd, [(page, PAGE), (page + PAGE, PAGE)], Advice.COLD) == 2 * PAGE
            with pytest.raises(KernelError) as caught:
                process_madvise(pidfd, [(page, PAGE)], Advice.DONTNEED)
            assert caught.value.errno in (errno.EINVAL, errno.EPERM)
            with Pagemap(child.pid) as pagemap:
                assert pagemap.present(page, PAGE).all()
            names = {entry.name for entry in proc.smaps(child.pid)}
            assert "[stack]" in names
            with pytest.raises(KernelError, match="not mapped in the process"):
                process_read(child.pid, 0, into)
        finally:
            os.close(pidfd)
            child.kill()


def test_a_read_that_ends_at_a_hole_is_short() -> None:
    with m.Mapping(2 * PAGE) as mapping:
        mapping.array[:] = 3
        m.unmap(mapping.address + PAGE, PAGE)
        into = np.zeros(2 * PAGE, np.uint8)
        assert process_read(os.getpid(), mapping.address, into) == PAGE
        assert (into[:PAGE] == 3).all() and not into[PAGE:].any()


def test_a_pidfd_outlives_its_process_and_says_so() -> None:
    with sleeper() as child:
        pidfd = pidfd_open(child.pid, PidfdFlag.NONBLOCK)
        try:
            child.kill()
            child.wait()
            with pytest.raises(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            with pytest.raises(KernelError, match="no such process"):
                pidfd_getfd(pidfd, 0)
            with pytest.raises(KernelError, match="no such process"):
                process_madvise(pidfd, [(PAGE, PAGE)], Advice.COLD)
        finally:
            os.close(pidfd)
        with pytest.raises(KernelError):
            proc.smaps(child.pid)


def test_a_descriptor_of_another_process_is_the_same_file() -> None:
    with sleeper() as child:
        pidfd = pidfd_open(child.pid)
        try:
            taken = pidfd_getfd(pidfd, 1)
            try:
                assert os.fstat(taken).st_ino == Path(f"/proc/{child.pid}/fd/1").stat().st_ino
                assert not os.get_inheritable(taken)
            finally:
                os.close(taken)
            with pytest.raises(KernelError) as caught:
                pidfd_getfd(pidfd, 900)
            assert caught.value.errno == errno.EBADF
        finally:
            os.close(pidfd)
            child.kill()


# prctl


def test_thp_mode_is_told_by_status_and_put_back() -> None:
    before = prctl.thp_mode()

    def status() -> str:
        text = Path("/proc/self/status").read_text()
        return next(line.split()[1] for line in text.splitlines() if line.startswith("THP_enabled"))

    with prctl.thp_mode_changed(prctl.ThpMode.DISABLED):
        assert prctl.thp_mode() is prctl.ThpMode.DISABLED
        assert status() == "0"
    assert prctl.thp_mode() is before
    try:
        with prctl.thp_mode_changed(prctl.ThpMode.EXCEPT_ADVISED):
            assert prctl.thp_mode() is prctl.ThpMode.EXCEPT_ADVISED
            raise ZeroDivisionError
    except KernelError as error:
        assert "6.18" in str(error)
        pytest.skip("lacks: PR_THP_DISABLE_EXCEPT_ADVISED")
    except ZeroDivisionError:
        pass
    assert prctl.thp_mode() is before


def test_dumpable_is_read_and_set() -> None:
    assert prctl.dumpable()
    prctl.set_dumpable(False)
    try:
        assert not prctl.dumpable()
    finally:
        prctl.set_dumpable(True)


# Leaks


LEAKY: dict[str, Callable[[], object]] = {
    "pagemap of nobody": lambda: Pagemap(2**30),
    "memfd that cannot grow": lambda: memfd_create(
        "x", 1, flags=MemfdFlag.CLOEXEC | MemfdFlag.HUGETLB, huge_page_size=proc.default_hugetlb_size()
    ),
    "aligned mapping that cannot be": lambda: m.Mapping(PAGE, align=1 << 22, flags=m.MapFlag.SHARED, fd=900),
    "fixed mapping that cannot be": lambda: m.Mapping(1 << 62),
}


@pytest.mark.parametrize("name", LEAKY)
def test_a_failure_leaves_nothing(name: str) -> None:
    def once() -> None:
        with pytest.raises(KernelError) as caught:
            LEAKY[name]()
        assert "\n" not in str(caught.value)

    once()
    gc.collect()
    descriptors, mappings = len(os.listdir("/proc/self/fd")), len(proc.smaps())
    for _ in range(50):
        once()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    # Python's own arenas come and go, but not by dozens.
    assert abs(len(proc.smaps()) - mappings) < 20
