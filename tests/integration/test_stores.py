"""Stores in this process: zeros, memory, files read past the page cache, and regions on regions."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from uspace_mm.errors import InputError
from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.kernel.proc import page_size
from uspace_mm.pager import PageLost, Pager, RegionBusy, guard
from uspace_mm.stores import FileStore, MemoryStore, RegionStore, ZeroStore

PAGE = page_size()
BIG = 64 << 10
SIZE = 40 * BIG + 321


def some_bytes(size: int = SIZE) -> NDArray[np.uint8]:
    return np.random.default_rng(size).integers(0, 256, size, np.uint8)


@pytest.mark.parametrize("units", [(None, None), (BIG, None), (None, BIG)], ids=str)
@pytest.mark.parametrize("offset", [0, 5 * PAGE + 13])
def test_a_region_on_a_region_has_its_content(units: tuple[Any, Any], offset: int) -> None:
    source = some_bytes()
    expected = source.copy()
    with Pager() as pager, pager.map(MemoryStore(source), unit=units[0]) as below:
        array = below.array()
        array[:: 3 * PAGE] ^= 0xFF  # changed
        expected[:: 3 * PAGE] ^= 0xFF
        below.evict(4 * BIG, 8 * BIG)  # changed and not there
        madvise(below.address + 8 * BIG, 2 * BIG, Advice.DONTNEED)
        expected[8 * BIG : 10 * BIG] = 0
        with pager.map(RegionStore(below, offset), unit=units[1]) as above:
            copy = above.array()
            assert (copy == expected[offset:]).all()
            copy[7] ^= 0xFF
            above.evict()
            assert copy[7] == expected[offset + 7] ^ 0xFF
            del copy
        assert (array == expected).all()
        del array


def test_three_regions_on_top_of_each_other_close_from_above() -> None:
    expected = some_bytes()
    with Pager("4M") as pager, Pager() as other:
        first = pager.map(MemoryStore(expected), unit=BIG)
        second = other.map(RegionStore(first), unit=PAGE)
        third = pager.map(RegionStore(second, mode="readonly"), unit=BIG)
        assert bytes(third.view()) == expected.tobytes()
        for region in (first, second):
            with pytest.raises(RegionBusy, match="store of another"):
                region.close()
        third.close()
        second.close()
        first.close()


def test_a_lost_unit_below_is_lost_above(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(some_bytes().tobytes())
    with Pager() as pager, pager.map(FileStore(path)) as below, pager.map(RegionStore(below)) as above:
        above.advise("random")
        array = above.array()
        os.truncate(path, BIG)
        with pytest.raises(PageLost) as caught, guard():
            assert array[2 * BIG] == 0xBD
        assert caught.value.errno == errno.ENODATA
        assert (array[:BIG] == some_bytes()[:BIG]).all()
        del array


def test_region_stores_that_cannot_be() -> None:
    with Pager() as pager, Pager(in_thread=True) as own, pager.map(ZeroStore(SIZE)) as region:
        for arguments in ({"mode": "writeback"}, {"offset": -1}, {"offset": SIZE}, {"size": SIZE + 1}):
            with pytest.raises(InputError, match="region store"):
                RegionStore(region, **arguments)
        with pytest.raises(InputError, match="memory of a region"):
            MemoryStore(region.view())
        with own.map(ZeroStore(SIZE)) as served, pytest.raises(InputError, match="in-thread"):
            RegionStore(served)


@pytest.mark.parametrize("unit", [None, BIG])
@pytest.mark.parametrize("offset", [0, 8192])
def test_direct_files(tmp_path: Path, unit: Any, offset: int) -> None:
    path = tmp_path / "data"
    expected = some_bytes()
    path.write_bytes(expected.tobytes())
    try:
        store = FileStore(path, offset, mode="writeback", direct=True)
    except InputError:
        pytest.skip("lacks: a file system with O_DIRECT")
    with Pager("4M") as pager, pager.map(store, unit=unit) as region:
        array = region.array()
        assert (array == expected[offset:]).all()
        array[3::5003] ^= 0xFF
        expected[offset + 3 :: 5003] ^= 0xFF
        array[-1] ^= 0xFF
        expected[-1] ^= 0xFF
        region.evict()
        assert (array == expected[offset:]).all()
        del array
    store.close()
    assert path.read_bytes() == expected.tobytes()
    with pytest.raises(InputError, match="multiple of 4096"):
        FileStore(path, 1, direct=True)


def test_memory_is_written_in_writeback_mode_only() -> None:
    for mode, written in (("private", False), ("writeback", True)):
        data = some_bytes()
        expected = data.copy()
        with Pager() as pager, pager.map(MemoryStore(data, mode)) as region:
            array = region.array()
            array[::4099] ^= 0xFF
            expected[::4099] ^= 0xFF
            region.evict()
            assert (array == expected).all()
            del array
        assert (data == (expected if written else some_bytes())).all()
    with pytest.raises(InputError, match="memory store"):
        MemoryStore(b"constant", "writeback")
    with pytest.raises(InputError, match="empty"):
        MemoryStore(b"")


def test_zeros_stay_what_is_written_over_them() -> None:
    expected = np.zeros(SIZE, np.uint8)
    with Pager("1M") as pager, pager.map(ZeroStore(SIZE), unit=BIG) as region:
        array = region.array()
        assert not array.any()
        array[5::70001] = expected[5::70001] = 9
        region.evict()
        assert (array == expected).all()
        del array


def test_a_fetch_that_fails_is_tried_as_often_as_said(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(some_bytes().tobytes())
    with Pager() as pager, pager.map(FileStore(path, retries=4)) as region:
        region.advise("random")
        os.truncate(path, mmap.PAGESIZE)
        array = region.array()
        with pytest.raises(PageLost), guard():
            assert array[2 * PAGE] == 0xBD
        assert region.stats().counters.store_errors == 5
        del array
