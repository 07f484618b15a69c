"""Mappings, memfds and sizes against /proc."""

from __future__ import annotations

import errno
import gc
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from uspace_mm.errors import InputError, KernelError
from uspace_mm.kernel import mapping as m
from uspace_mm.kernel import proc
from uspace_mm.kernel.memfd import MemfdFlag, Seal, add_seals, get_seals, memfd_create
from uspace_mm.kernel.pagemap import (
    Pagemap,
)

PAGE = proc.page_size()
PMD = proc.pmd_size()


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


def test_seals_of_what_is_no_memfd() -> None:
    # Not a temporary file: where /tmp is a tmpfs it lies in memory, and has seals.
    with (
        Path("/proc/self/status").open("rb") as file,
        pytest.raises(KernelError, match="not a file in memory"),
    ):
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
