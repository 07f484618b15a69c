"""What a fork, or a process started in another way, gets of a region."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Every scene runs in a process of its own, under a clock: a hang is a failure, not the end of the run.
PRELUDE = """
import multiprocessing, os, resource, signal, subprocess, sys, tempfile, threading, time
import numpy as np
from uspace_mm.errors import UspaceError
from uspace_mm.kernel.proc import page_size
from uspace_mm.pager import PageLost, Pager, guard
from uspace_mm.stores import FileStore, FunctionStore, MemoryStore

PAGE = page_size()
PAGES = 256
SIZE = PAGES * PAGE
BEFORE = np.arange(SIZE // 8, dtype=np.uint64) * np.uint64(2654435761)
WORDS = PAGE // 8  # in a page
LOST = 0xBDBDBDBDBDBDBDBD

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

def stored(directory):
    path = os.path.join(directory, "data")
    with open(path, "wb") as file:
        file.write(BEFORE.tobytes())
    return path

def in_child(function):
    # The pid of a child that runs it: exit status 0 when it returns true, 1 false, 9 by an exception.
    child = os.fork()
    if child:
        return child
    signal.alarm(80)
    status = 9
    try:
        status = 0 if function() else 1
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(status)

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def run(scene: str, expected: int = 0, timeout: float = 100) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + scene], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == expected, f"{done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_snapshot_stays_while_the_parent_writes_and_evicts() -> None:
    run("""
with tempfile.TemporaryDirectory() as directory:
    path = stored(directory)
    with Pager(SIZE) as pager, pager.map(FileStore(path, mode="writeback")) as region:
        array = region.array(np.uint64)
        array[::7] += np.uint64(1)
        before = BEFORE.copy()
        before[::7] += np.uint64(1)
        told, tell = os.pipe()

        def child():
            os.close(tell)
            for _ in range(3):  # while the parent is at it
                assert (array == before).all()
                region.evict()
            os.read(told, 1)
            assert (array == before).all()
            array[::2] = np.uint64(5)
            region.evict()
            expected = before.copy()
            expected[::2] = 5
            assert (array == expected).all()
            region.flush()
            return True

        pid = in_child(child)
        os.close(told)
        expected = before.copy()
        for step in range(1, 6):
            array[:] = array + np.uint64(step)
            expected += np.uint64(step)
            region.evict()
        os.close(tell)
        status = ended(pid)
        assert status == 0, status
        assert (array == expected).all()
        region.flush()
        with open(path, "rb") as file:
            assert file.read() == expected.tobytes()
        del array
""")


FLUSHED = """
NEW = BEFORE ^ np.uint64(0xFFFF)

def snapshot_or_lost(array):
    # Every byte is the old one, or its page is lost; the number of lost pages.
    try:
        with guard():
            content = np.array(array)
    except PageLost as lost:
        pages = content.reshape(PAGES, -1)
        filled = (pages == LOST).all(axis=1)
        assert filled.sum() == lost.units, (filled.sum(), lost.units)
        right = (pages == BEFORE.reshape(PAGES, -1)).all(axis=1)
        assert (filled ^ right).all()
        return lost.units
    assert (content == BEFORE).all()
    return 0
"""


def test_after_a_flush_of_the_parent_the_child_has_the_old_bytes_or_none() -> None:
    run(
        FLUSHED
        + """
with tempfile.TemporaryDirectory() as directory:
    for turn in range(8):
        path = stored(directory)
        with Pager(SIZE) as pager, pager.map(FileStore(path, mode="writeback")) as region:
            region.advise("random")
            array = region.array(np.uint64)
            kept = 0 if turn % 2 else PAGES // 4
            assert (array[: kept * WORDS] == BEFORE[: kept * WORDS]).all()
            told, tell = os.pipe()

            def child():
                os.close(tell)
                if turn < 4:  # later: in a race with the flush
                    os.read(told, 1)
                lost = snapshot_or_lost(array)
                assert turn >= 4 or lost == PAGES - kept, lost
                return True

            pid = in_child(child)
            os.close(told)
            array[:] = NEW
            region.flush()
            with open(path, "rb") as file:
                assert file.read() == NEW.tobytes()
            os.close(tell)
            status = ended(pid)
            assert status == 0, status
            del array
"""
    )


def test_a_grandchild_of_a_stale_child_has_no_new_bytes_either() -> None:
    run(
        FLUSHED
        + """
with tempfile.TemporaryDirectory() as directory:
    path = stored(directory)
    with Pager() as pager, pager.map(FileStore(path, mode="writeback")) as region:
        region.advise("random")
        array = region.array(np.uint64)
        told, tell = os.pipe()

        def child():
            os.close(tell)
            os.read(told, 1)
            return ended(in_child(lambda: snapshot_or_lost(array) == PAGES)) == 0

        pid = in_child(child)
        os.close(told)
        array[:] = NEW
        region.flush()
        os.close(tell)
        status = ended(pid)
        assert status == 0, status
        del array
"""
    )


def test_without_a_guard_a_stale_child_is_killed() -> None:
    run("""
with tempfile.TemporaryDirectory() as directory:
    path = stored(directory)
    with Pager() as pager, pager.map(FileStore(path, mode="writeback")) as region:
        array = region.array(np.uint64)
        told, tell = os.pipe()

        def child():
            os.close(tell)
            os.read(told, 1)
            return int(array[-1]) in (0, int(BEFORE[-1]))  # not reached

        pid = in_child(child)
        os.close(told)
        array[:] = 1
        region.flush()
        os.close(tell)
        assert ended(pid) == -signal.SIGBUS
        del array
""")


def test_grandchildren_and_closing_in_a_child() -> None:
    run("""
with tempfile.TemporaryDirectory() as directory:
    path = stored(directory)
    pager = Pager(SIZE)
    region = pager.map(FileStore(path, mode="writeback"))
    array = region.array(np.uint64)
    array[:100] = 7
    first = BEFORE.copy()
    first[:100] = 7

    def grandchild():
        global array
        assert (array == second).all()
        array[:] = 0
        region.evict()
        assert not array.any()
        del array
        pager.close()
        return not pager.regions

    def child():
        global array, second
        assert (array == first).all()
        array[-100:] = 8
        second = first.copy()
        second[-100:] = 8
        region.evict()
        assert ended(in_child(grandchild)) == 0
        assert (array == second).all()
        del array
        region.close()
        pager.close()
        with Pager() as own, own.map(MemoryStore(first.copy())) as other:
            assert (other.array(np.uint64) == first).all()
        return True

    status = ended(in_child(child))
    assert status == 0, status
    assert (array == first).all()
    del array
    pager.close()
    with open(path, "rb") as file:
        assert file.read() == first.tobytes()
""")


def test_an_excluded_region_is_a_crash_in_the_child() -> None:
    run("""
with Pager() as pager, pager.map(MemoryStore(BEFORE.copy()), fork="exclude") as region:
    with pager.map(MemoryStore(BEFORE[::-1].copy())) as other:
        array = region.array(np.uint64)
        array[:PAGE] = BEFORE[:PAGE]
        for place in (0, -1):  # in place in the parent, and missing
            assert ended(in_child(lambda: int(array[place]) >= 0)) == -signal.SIGSEGV

        def child():
            assert (other.array(np.uint64) == BEFORE[::-1]).all()
            return True

        assert ended(in_child(child)) == 0
        assert (array == BEFORE).all()
        del array
""")


@pytest.mark.slow
def test_forks_while_threads_fault() -> None:
    run("""
stop = threading.Event()
wrong = []

def read(array):
    while not stop.is_set():
        if not (array == BEFORE).all():
            wrong.append(1)

with tempfile.TemporaryDirectory() as directory:
    path = stored(directory)
    with Pager(SIZE // 2) as pager, pager.map(FileStore(path)) as region:
        array = region.array(np.uint64)
        threads = [threading.Thread(target=read, args=(array,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(30):
                status = ended(in_child(lambda: (array == BEFORE).all()))
                assert status == 0, status
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not wrong
        del array, threads, thread
""")


CANNOT_SERVE = """
with Pager(SIZE, **OPTIONS) as pager, pager.map(MemoryStore(BEFORE.copy())) as region:
    array = region.array(np.uint64)
    assert (array[: WORDS * 3] == BEFORE[: WORDS * 3]).all()
    WITHDRAW
    for place in (0, -1):
        status = ended(in_child(lambda: bool(array[place] == BEFORE[place])))
        assert status == -signal.SIGSEGV, status

    def close():
        global array
        for call in (region.populate, region.evict, region.prefetch, region.flush, pager.stats):
            try:
                call()
            except UspaceError:
                pass  # it need not work, but it must end
        del array
        region.close()
        pager.close()
        return True

    status = ended(in_child(close))
    assert status == 0, status
    assert (array == BEFORE).all()
    del array
"""


@pytest.mark.parametrize("in_thread", [False, True], ids=["handlers", "in thread"])
def test_a_child_without_the_right_to_a_userfaultfd_has_no_zeros(in_thread: bool) -> None:
    if os.geteuid():
        pytest.skip("lacks: root, to give up its rights")
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1":
        pytest.skip("lacks: vm.unprivileged_userfaultfd=0")
    withdraw = "os.setgroups([]); os.setgid(65534); os.setuid(65534)"
    run(f"OPTIONS = {{'in_thread': {in_thread}, 'source': 0}}\n" + CANNOT_SERVE.replace("WITHDRAW", withdraw))
