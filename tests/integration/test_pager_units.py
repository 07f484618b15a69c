"""Units larger than a page, huge pages of both kinds, and the pager without the calls of newer kernels."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.integration.kernel.huge import huge_page_size
from uspace_mm.errors import InputError, KernelError
from uspace_mm.kernel.proc import page_size
from uspace_mm.pager import PageLost, Pager, Region, guard
from uspace_mm.stores import FileStore, MemoryStore, ZeroStore

Bytes = NDArray[np.uint8]
PAGE = page_size()
HUGE = 2 << 20
UNITS = sorted({PAGE, 64 << 10, HUGE})
TAIL = 777
CHUNK = 16 << 20
POOLS = Path("/sys/kernel/mm/hugepages")
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
OLD_KERNELS = [
    {},
    {"move": False},
    {"poison": False},
    {"move": False, "poison": False},
    {"in_thread": True},
    {"in_thread": True, "move": False, "poison": False},
]


def some_bytes(size: int) -> Bytes:
    return np.random.default_rng(size).integers(0, 256, size, np.uint8)


def name_of(options: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items()) or "all"


@contextmanager
def pool(pages: int) -> Iterator[int]:
    """`pages` free huge pages of the smallest size, which is given; the pool is put back in any case.

    The smallest: the default is 512 MiB with pages of 64 KiB.
    """
    if not POOLS.is_dir() or not any(POOLS.iterdir()):
        pytest.skip("lacks: hugetlb")
    size = (
        min(int(entry.name.removeprefix("hugepages-").removesuffix("kB")) for entry in POOLS.iterdir()) << 10
    )
    directory = POOLS / f"hugepages-{size >> 10}kB"
    setting = directory / "nr_hugepages"
    total = int(setting.read_text())
    # Pages that a test which failed still holds are surplus: not of the setting, and gone with it.
    before = total - int((directory / "surplus_hugepages").read_text())
    used = total - int((directory / "free_hugepages").read_text())
    try:
        try:
            setting.write_text(str(used + pages))
        except OSError:
            pytest.skip("lacks: the right to change the huge page pool")
        if int(setting.read_text()) < used + pages:
            pytest.skip("lacks: memory for a huge page pool")
        yield size
    finally:
        setting.write_text(str(before))


def huge_bytes(region: Region) -> int:
    """Bytes of transparent huge pages in the mapping of the region, by smaps."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word = line.split()[0]
        if not word.endswith(":"):
            low, high = (int(part, 16) for part in word.split("-"))
            inside = low < region.address + region.size and high > region.address
        elif inside and word == "AnonHugePages:":
            total += int(line.split()[1]) << 10
    return total


@pytest.mark.parametrize("options", OLD_KERNELS, ids=name_of)
@pytest.mark.parametrize("unit", UNITS)
def test_what_was_written_survives_eviction(options: dict[str, Any], unit: int) -> None:
    size = 12 * max(unit, 64 << 10) + TAIL
    expected = some_bytes(size)
    # The store keeps its own copy: it is never written.
    source = expected.copy()
    with Pager(8 * max(unit, 64 << 10), **options) as pager:
        with pager.map(MemoryStore(source), unit=unit) as region:
            array = region.array()
            assert (array == expected).all()
            array[7::4099] ^= 0xFF
            expected[7::4099] ^= 0xFF
            region.evict()
            assert (array[::-1] == expected[::-1]).all()
            assert (array == expected).all()
            counters = region.stats().counters
            assert counters.evicted_dirty > 0
            assert counters.pages_lost == 0
            del array
        assert (source != expected).any()


@pytest.mark.parametrize("options", OLD_KERNELS, ids=name_of)
@pytest.mark.parametrize("unit", UNITS)
def test_a_lost_unit_is_lost_each_time(tmp_path: Path, options: dict[str, Any], unit: int) -> None:
    data = some_bytes(4 * unit)
    path = tmp_path / "data"
    path.write_bytes(data.tobytes())
    with Pager(**options) as pager, pager.map(FileStore(path), unit=unit) as region:
        region.advise("random")
        array = region.array()
        with path.open("r+b") as file:
            file.truncate(2 * unit)
        for _ in range(3):
            with pytest.raises(PageLost) as caught, guard():
                lost = array[2 * unit : 3 * unit].copy()
            assert (lost == 0xBD).all()
            assert (caught.value.offset, caught.value.units) == (2 * unit, 1)
        with pytest.raises(PageLost) as caught, guard():
            lost = array[2 * unit :].copy()
        assert (lost == 0xBD).all()
        assert caught.value.units == 2
        assert (array[: 2 * unit] == data[: 2 * unit]).all()
        assert region.stats().counters.pages_lost == 2
        del array


def test_units_of_a_pmd_are_huge_pages_after_populate() -> None:
    """2 MiB with pages of 4 KiB, 32 MiB with 16 KiB, 512 MiB with 64 KiB."""
    if not THP.exists() or "[never]" in THP.read_text():
        pytest.skip("lacks: transparent huge pages")
    pmd = huge_page_size()
    count = max(1, min(4, (128 << 20) // pmd))
    data = some_bytes(count * pmd)

    def holds_the_data(array: Bytes) -> bool:
        # In parts: what comparing takes must not be as large as the pages.
        return all(
            (array[at : at + CHUNK] == data[at : at + CHUNK]).all() for at in range(0, len(data), CHUNK)
        )

    # Written back: what is spilled would take as much memory again where /tmp is a tmpfs.
    with Pager() as pager, pager.map(MemoryStore(data, mode="writeback"), unit=pmd) as region:
        assert region.unit == pmd
        assert region.address % pmd == 0
        array = region.array()
        region.populate()
        if pager.stats().uses_move:
            assert huge_bytes(region) == count * pmd
        assert holds_the_data(array)
        before = data[5::65537].copy()
        array[5::65537] ^= 0xFF
        region.evict()
        assert huge_bytes(region) == 0
        assert region.stats().counters.evicted_dirty == count
        assert (data[5::65537] == before ^ 0xFF).all()
        array[5::65537] ^= 0xFF
        data[5::65537] = before
        assert holds_the_data(array)
        del array


@pytest.mark.parametrize("size", [3 << 10, 3 << 20, 1 << 40])
def test_units_are_powers_of_two_from_a_page_to_a_pmd(size: int) -> None:
    with Pager() as pager, pytest.raises(InputError, match=f"unit {size}: expected a power of two"):
        pager.map(ZeroStore(64 << 20), unit=size)


@pytest.mark.parametrize("options", OLD_KERNELS, ids=name_of)
def test_hugetlb_regions_hold_what_the_store_holds(options: dict[str, Any]) -> None:
    with pool(12) as huge:
        expected = some_bytes(10 * huge + TAIL)
        source = expected.copy()
        with Pager(**options) as pager, pager.map(MemoryStore(source), hugetlb=huge) as region:
            assert region.unit == huge
            region.populate(0, 3 * huge)
            array = region.array()
            array[5::65537] ^= 0xFF
            expected[5::65537] ^= 0xFF
            region.evict()
            assert (array == expected).all()
            assert region.stats().counters.evicted_dirty > 0
            del array


def test_a_budget_makes_a_small_pool_do() -> None:
    with pool(12) as huge:
        expected = some_bytes(16 * huge)
        source = expected.copy()
        with Pager(8 * huge) as pager, pager.map(MemoryStore(source), hugetlb=huge) as region:
            array = region.array()
            for _ in range(2):
                array[5::65537] ^= 0xFF
                expected[5::65537] ^= 0xFF
                assert (array == expected).all()
            assert region.stats().counters.faults_zero == 0
            del array


@pytest.mark.parametrize("budget", [None, "64M"])
def test_an_empty_pool_is_an_error_not_a_hang(budget: Any) -> None:
    with pool(0) as huge, Pager(budget) as pager:
        for store in (ZeroStore(64 * huge), MemoryStore(some_bytes(3 * huge))):
            with pytest.raises(KernelError, match="huge page pool") as caught, store:
                pager.map(store, hugetlb=huge)
            assert caught.value.errno == errno.ENOMEM
        assert pager.regions == ()
        assert pager.stats().regions == 0


def test_a_budget_holds_eight_units_of_any_region() -> None:
    with Pager("1M") as pager, pytest.raises(InputError, match="budget"):
        pager.map(ZeroStore(64 << 20), unit=HUGE)
