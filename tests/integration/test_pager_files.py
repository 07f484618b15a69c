"""Files as stores: written back and read again, shrunk and full, and across fork."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.kernel.proc import page_size
from uspace_mm.pager import PageLost, Pager, guard
from uspace_mm.stores import FileStore, MemoryStore

Words = NDArray[np.uint64]
PAGES = 128
SIZE = PAGES * page_size()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "data"
    file.write_bytes(np.arange(SIZE // 8, dtype=np.uint64).tobytes())
    return file


@pytest.mark.parametrize("move", [True, False], ids=["move", "copy"])
@pytest.mark.parametrize("unit", [None, "64k"])
def test_what_was_written_is_in_the_file(path: Path, move: bool, unit: str | None) -> None:
    expected = np.arange(SIZE // 8, dtype=np.uint64)
    budget = 8 * (64 << 10)
    with Pager(budget, move=move) as pager, pager.map(FileStore(path, mode="writeback"), unit=unit) as region:
        array = region.array(np.uint64)
        array[::3] += np.uint64(7)
        expected[::3] += np.uint64(7)
        region.evict()
        assert (array == expected).all()
        madvise(region.address, 64 << 10, Advice.DONTNEED)
        expected[: (64 << 10) // 8] = 0
        assert (array == expected).all()
        region.flush()
        assert path.read_bytes() == expected.tobytes()
        array[5] = 99
        del array
    expected[5] = 99
    assert path.read_bytes() == expected.tobytes()


@pytest.mark.parametrize("in_thread", [False, True], ids=["handlers", "in thread"])
def test_a_file_that_shrinks_loses_pages_not_bytes(path: Path, in_thread: bool) -> None:
    with Pager(in_thread=in_thread) as pager, pager.map(FileStore(path)) as region:
        region.advise("random")
        array = region.array(np.uint64)
        os.truncate(path, SIZE // 2)
        assert array[0] == 0
        with pytest.raises(PageLost, match="its store said") as caught, guard():
            assert array[-1] == 0xBDBDBDBDBDBDBDBD
        assert caught.value.offset == SIZE - 8
        assert array[SIZE // 16 - 1] == SIZE // 16 - 1
        assert region.stats().counters.pages_lost == 1
        del array


def test_threads_write_while_the_budget_changes(path: Path) -> None:
    with Pager("1M") as pager, pager.map(MemoryStore(np.zeros(4 << 20, np.uint8))) as region:
        array = region.array(np.uint64)

        def work(array: Words, number: int) -> None:
            for _ in range(3):
                array[number::4] += np.uint64(number + 1)

        threads = [threading.Thread(target=work, args=(array, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for budget in ("2M", None, "600k", "1M"):
            pager.set_budget(budget)
        for thread in threads:
            thread.join()
        for number in range(4):
            assert (array[number::4] == 3 * (number + 1)).all()
        del array, threads, thread


def test_a_forked_child_has_the_content_of_the_fork(path: Path) -> None:
    before = np.arange(SIZE // 8, dtype=np.uint64)
    with Pager("1M") as pager, pager.map(FileStore(path, mode="writeback")) as region:
        array = region.array(np.uint64)
        array[: SIZE // 16] += np.uint64(1)
        before[: SIZE // 16] += np.uint64(1)
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(tell)
            os.read(told, 1)  # the parent has written and evicted meanwhile
            status = 0 if (array == before).all() else 1
            array[:] = 0
            region.evict()
            os._exit(status | (2 if array.any() else 0))
        os.close(told)
        array += np.uint64(5)
        region.evict()
        os.close(tell)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (array == before + np.uint64(5)).all()
        region.flush()
        assert path.read_bytes() == (before + np.uint64(5)).tobytes()
        del array


def test_forks_while_threads_fault(path: Path) -> None:
    stop = threading.Event()
    expected = np.arange(SIZE // 8, dtype=np.uint64)
    with Pager("512k") as pager, pager.map(FileStore(path)) as region:
        array = region.array(np.uint64)
        wrong: list[int] = []

        def read(array: Words) -> None:
            while not stop.is_set():
                if not (array == expected).all():
                    wrong.append(1)

        threads = [threading.Thread(target=read, args=(array,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(10):
                child = os.fork()
                if child == 0:
                    os._exit(0 if (array == expected).all() else 1)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not wrong
        del array, threads, thread
