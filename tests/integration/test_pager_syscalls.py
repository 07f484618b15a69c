"""madvise, mremap, munmap and mmap by the program on memory of a region, byte by byte."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from uspace_mm._native import ffi

from uspace_mm.errors import KernelError
from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.kernel.mapping import PRIVATE_ANONYMOUS, MapFlag, Mapping, RemapFlag, map_memory, remap, unmap
from uspace_mm.kernel.proc import page_size
from uspace_mm.pager import Pager
from uspace_mm.stores import MemoryStore

Bytes = NDArray[np.uint8]
PAGE = page_size()
UNIT = 16 * PAGE
SIZE = 32 * UNIT
BUDGET = SIZE // 2
DIRTY = slice(3 * UNIT + 11, 3 * UNIT + 5011)


def some_bytes(seed: int = 1, size: int = SIZE) -> Bytes:
    return np.random.default_rng(seed).integers(1, 256, size, np.uint8)


def bytes_at(address: int, length: int) -> Bytes:
    return np.frombuffer(ffi.buffer(ffi.cast("char *", address), length), np.uint8)


@pytest.fixture(params=[(True, False), (False, False), (True, True)], ids=["move", "copy", "in thread"])
def pager(request: pytest.FixtureRequest) -> Callable[[], Pager]:
    move, in_thread = request.param
    return lambda: Pager(BUDGET, move=move, in_thread=in_thread)


@pytest.mark.parametrize("state", ["absent", "present", "written", "evicted"])
@pytest.mark.parametrize("unit", [PAGE, UNIT])
def test_what_was_dropped_is_zero(pager: Callable[[], Pager], state: str, unit: int) -> None:
    expected = some_bytes()
    with pager() as one, one.map(MemoryStore(expected.copy()), unit=unit) as region:
        array = region.array()
        if state != "absent":
            assert (array == expected).all()
        if state in ("written", "evicted"):
            array[:] = expected = some_bytes(2)
        if state == "evicted":
            region.evict()
        # Whole units, a part of one, and one that begins and ends in the middle of units.
        for start, stop in (
            (UNIT, 3 * UNIT),
            (5 * UNIT + PAGE, 5 * UNIT + 3 * PAGE),
            (8 * UNIT - PAGE, 9 * UNIT + PAGE),
        ):
            madvise(region.address + start, stop - start, Advice.DONTNEED)
            expected[start:stop] = 0
            assert (array[start:stop] == 0).all()
        assert (array == expected).all()
        region.evict()
        assert (array == expected).all()
        array[DIRTY] = expected[DIRTY] = 9
        region.evict()
        assert (array == expected).all()
        del array


@pytest.mark.parametrize("unit", [PAGE, UNIT])
@pytest.mark.parametrize("move", [True, False], ids=["move", "copy"])
def test_what_was_dropped_stays_zero_while_others_work(move: bool, unit: int) -> None:
    data = some_bytes()
    wrong: list[str] = []
    stop = threading.Event()
    with Pager(BUDGET, move=move) as one, one.map(MemoryStore(data.copy()), unit=unit) as region:
        array = region.array()
        dropped = [0]  # bytes, from the front

        def fault(array: Bytes) -> None:
            random = np.random.default_rng(3)
            while not stop.is_set():
                start = int(random.integers(SIZE // PAGE)) * PAGE
                gone = dropped[0]
                seen = array[start : start + PAGE].copy()
                if start + PAGE <= gone:
                    right = not seen.any()
                else:
                    right = bool(((seen == 0) | (seen == data[start : start + PAGE])).all())
                    right &= bool(seen.all()) or start < dropped[0] + 2 * UNIT
                if not right:
                    wrong.append(f"page at {start}, {gone} bytes dropped")

        def prefetch() -> None:
            while not stop.is_set():
                region.prefetch()
                region.populate(SIZE // 4, SIZE // 2)

        def evict() -> None:
            while not stop.is_set():
                region.evict(0, SIZE // 2)
                region.evict(SIZE // 2)

        threads = [
            threading.Thread(target=fault, args=(array,)),
            threading.Thread(target=prefetch),
            threading.Thread(target=evict),
        ]
        for thread in threads:
            thread.start()
        try:
            step = UNIT + PAGE
            for start in range(0, SIZE - step, step):
                madvise(region.address + start, step, Advice.DONTNEED)
                dropped[0] = start + step
                assert not array[start : start + step].any(), start
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not wrong
        assert not array[: dropped[0]].any()
        assert (array[dropped[0] :] == data[dropped[0] :]).all()
        del array, threads, thread


@pytest.mark.parametrize(
    "advice", [Advice.COLD, Advice.PAGEOUT, Advice.COLLAPSE, Advice.FREE], ids=lambda a: a.name
)
def test_advice_keeps_the_bytes_right(pager: Callable[[], Pager], advice: Advice) -> None:
    size = 4 << 20
    expected = some_bytes(1, size)
    with pager() as one, one.map(MemoryStore(expected.copy())) as region:
        array = region.array()
        array[DIRTY] = expected[DIRTY] = 9
        try:
            madvise(region.address, size, advice)
        except KernelError as error:
            assert advice is Advice.COLLAPSE, error  # it may find no page to collapse
        if advice is Advice.FREE:
            # A page is what it was or zero, and once it was read as zero it stays so.
            pages, whole = array.reshape(-1, PAGE), expected.reshape(-1, PAGE)
            first = pages.copy()
            kept = (first == whole).all(axis=1)
            assert (kept | ~first.any(axis=1)).all()
            del pages
            expected = first.reshape(-1)
        assert (array == expected).all()
        region.evict()
        assert (array == expected).all()
        del array


@pytest.mark.parametrize("evicted", [False, True], ids=["resident", "evicted"])
@pytest.mark.parametrize("unit", [PAGE, UNIT])
def test_moved_memory_keeps_its_bytes(pager: Callable[[], Pager], unit: int, evicted: bool) -> None:
    expected = some_bytes()
    with pager() as one, Mapping(3 * SIZE, align=UNIT) as room:
        with one.map(MemoryStore(expected.copy()), unit=unit) as region:
            home = region.address
            array = region.array()
            array[DIRTY] = expected[DIRTY] = 9
            del array

            def check(address: int, length: int = SIZE) -> None:
                if evicted:
                    region.evict()
                assert (bytes_at(address, length) == expected[:length]).all()

            fixed = RemapFlag.MAYMOVE | RemapFlag.FIXED
            assert remap(home, SIZE, SIZE, flags=fixed, new_address=room.address) == room.address
            check(room.address)
            larger = remap(room.address, SIZE, SIZE + UNIT)
            assert not bytes_at(larger + SIZE, UNIT).any()
            check(larger)
            assert remap(larger, SIZE + UNIT, SIZE // 2, flags=RemapFlag(0)) == larger
            check(larger, SIZE // 2)
            # `room` still has what is behind: nobody else is mapped there.
            last = room.address + SIZE
            assert remap(larger, SIZE // 2, SIZE // 2, flags=fixed, new_address=last) == last
            check(last, SIZE // 2)
        room.address += SIZE + SIZE // 2  # the rest went with the region
        room.length -= SIZE + SIZE // 2


def test_others_map_where_a_part_was(pager: Callable[[], Pager]) -> None:
    expected = some_bytes()
    wrong: list[int] = []
    stop = threading.Event()
    with pager() as one, one.map(MemoryStore(expected.copy()), unit=UNIT) as region:
        array = region.array()
        half = SIZE // 2

        def fault(array: Bytes) -> None:
            while not stop.is_set():
                if not (array[half:] == expected[half:]).all():
                    wrong.append(1)
                region.evict(half)

        thread = threading.Thread(target=fault, args=(array,))
        thread.start()
        try:
            for number in range(6):
                start = number * UNIT + (number % 2) * PAGE
                unmap(region.address + start, UNIT - PAGE)
                data = some_bytes(number)
                with one.map(MemoryStore(data), size=UNIT - PAGE) as other:
                    assert bytes(other.view()) == data[: UNIT - PAGE].tobytes()
                    other.evict()
                    assert bytes(other.view()) == data[: UNIT - PAGE].tobytes()
            # A mapping of somebody else's over a part.
            start = region.address + 8 * UNIT + PAGE
            flags = PRIVATE_ANONYMOUS | MapFlag.FIXED
            assert map_memory(2 * UNIT, address=start, flags=flags) == start
            foreign = bytes_at(start, 2 * UNIT)
            assert not foreign.any()
            foreign = np.frombuffer(ffi.buffer(ffi.cast("char *", start), 2 * UNIT), np.uint8)
            foreign[:] = 77
            region.evict()
            assert (foreign == 77).all()
            edge = slice(8 * UNIT, 8 * UNIT + PAGE)
            assert (array[edge] == expected[edge]).all()
            after = slice(10 * UNIT + PAGE, half)
            assert (array[after] == expected[after]).all()
        finally:
            stop.set()
            thread.join()
        assert not wrong
        del array, thread
    # Closing the region must not unmap what is not its own any more.
    assert (foreign == 77).all()
    unmap(start, 2 * UNIT)
