"""Regions as arrays: every dtype and order, who holds them, and arguments that cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from uspace_mm.errors import InputError
from uspace_mm.kernel.proc import page_size
from uspace_mm.pager import Pager, RegionBusy
from uspace_mm.stores import FileStore, MemoryStore, ZeroStore

SIZE = 64 * page_size()
RECORD = np.dtype([("a", "<i4"), ("b", "<f8"), ("c", "S3")])


def some_bytes(size: int = SIZE) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(size).integers(0, 256, size, np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, ">i2", np.float64, "c16", "S7", RECORD], ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_holds_what_the_store_holds(dtype: Any, order: Any) -> None:
    data = some_bytes()
    shape = (5, 7, 11)
    with Pager() as pager, pager.map(MemoryStore(data)) as region:
        array = region.array(dtype, shape, order, offset=24)
        expected = np.ndarray(shape, dtype, buffer=data, offset=24, order=order)
        assert array.flags.f_contiguous == (order == "F")
        assert array.tobytes() == expected.tobytes()
        del array


def test_a_tail_that_is_no_whole_page_ends_in_nothing() -> None:
    data = some_bytes(3 * page_size() + 5)
    with Pager() as pager, pager.map(MemoryStore(data)) as region:
        assert bytes(region.view()) == data.tobytes()


def test_arrays_of_a_readonly_store_refuse_writes() -> None:
    with Pager() as pager, pager.map(MemoryStore(some_bytes(), "readonly")) as region:
        array = region.array()
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        del array


@pytest.mark.parametrize("how", ["array", "slice", "view", "view slice"])
def test_a_region_stays_while_somebody_holds_it(how: str) -> None:
    with Pager() as pager:
        region = pager.map(MemoryStore(some_bytes()))
        held: Any = region.array() if how in ("array", "slice") else region.view()
        if "slice" in how:
            held = held[10:20]
        with pytest.raises(RegionBusy, match="still held"):
            region.close()
        assert bytes(held[:4]) == some_bytes()[10:14].tobytes() or "slice" not in how
        del held
        region.close()
        with pytest.raises(InputError, match="closed"):
            region.array()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": object}, "Python objects"),
        ({"dtype": "S0", "shape": 4}, "no size"),
        ({"shape": SIZE + 1}, "needs"),
        ({"shape": (-1,)}, "negative"),
        ({"shape": (1 << 40, 1 << 40)}, "needs"),
        ({"offset": SIZE}, "offset"),
        ({"offset": -1}, "offset"),
        ({"order": "K"}, "order"),
    ],
)
def test_an_array_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with Pager() as pager, pager.map(ZeroStore(SIZE)) as region:
        with pytest.raises(InputError, match=message) as caught:
            region.array(**arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, -1, "0", "nonsense"])
def test_sizes_that_cannot_be(size: Any) -> None:
    with pytest.raises(InputError):
        ZeroStore(size)
    with pytest.raises(InputError):
        Pager(budget=size)
    with Pager() as pager, pytest.raises(InputError):
        pager.map(ZeroStore(SIZE), size)


@pytest.mark.parametrize("unit", [1, 3 * page_size(), page_size() // 2, 1 << 30, 1 << 60])
def test_units_that_cannot_be(unit: int) -> None:
    with Pager() as pager, pytest.raises(InputError, match="unit"):
        pager.map(ZeroStore(64 << 20), unit=unit)


def test_ranges_that_cannot_be() -> None:
    with Pager() as pager, pager.map(ZeroStore(SIZE)) as region:
        for call in (region.populate, region.prefetch, region.evict):
            for start, stop in [(-1, None), (0, SIZE + 1), (SIZE, 0)]:
                with pytest.raises(InputError, match="range"):
                    call(start, stop)
    with pytest.raises(InputError, match="mode"):
        MemoryStore(some_bytes(), "sideways")
    with pytest.raises(InputError, match="cannot open"):
        FileStore("/nonexistent/file")
