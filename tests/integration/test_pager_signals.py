"""Signals that come in the middle of faults and calls, and interpreters that end with regions open."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from uspace_mm.kernel.proc import page_size

PRELUDE = """
import os, resource, signal, sys, threading, time
import numpy as np
from uspace_mm.kernel.proc import page_size
from uspace_mm.pager import Pager
from uspace_mm.stores import FileStore, MemoryStore, ZeroStore

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
PAGE = page_size()
SIZE = 256 * PAGE
BEFORE = np.arange(SIZE // 8, dtype=np.uint64) * np.uint64(2654435761)
"""
SIZE = 256 * page_size()
BEFORE = np.arange(SIZE // 8, dtype=np.uint64) * np.uint64(2654435761)


def run(scene: str, *arguments: str | Path, expected: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + scene, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == expected, f"{done.returncode}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr or expected == 1, done.stderr
    return done.stdout


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "data"
    file.write_bytes(BEFORE.tobytes())
    return file


@pytest.mark.parametrize("in_thread", [False, True], ids=["handlers", "in thread"])
def test_a_handler_touches_the_region_a_thousand_times_a_second(path: Path, in_thread: bool) -> None:
    run(
        """
wrong = []
handled = 0
stop = threading.Event()

def work(array, seed):
    places = np.random.default_rng(seed)
    while not stop.is_set():
        chosen = places.integers(0, SIZE // 8, 500)
        if not (array[chosen] == BEFORE[chosen]).all():
            wrong.append("thread")

small, in_thread = SIZE * 7 // 10, sys.argv[2] == "1"
with Pager(small, in_thread=in_thread) as pager, pager.map(FileStore(sys.argv[1])) as region:
    array = region.array(np.uint64)

    def tick(number, frame):
        global handled
        handled += 1
        place = handled * 7919 % (SIZE // 8)
        if array[place] != BEFORE[place]:
            wrong.append("handler")

    threads = [threading.Thread(target=work, args=(array, seed)) for seed in range(2)]
    for thread in threads:
        thread.start()
    signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    end = time.monotonic() + 1.2
    try:
        while time.monotonic() < end:
            region.evict(0, SIZE // 2)
            region.populate(0, SIZE // 4)
            region.prefetch(SIZE // 2, SIZE)
            region.advise("random")
            pager.set_budget(SIZE * 9 // 10)
            region.advise("normal")
            pager.set_budget(small)
            region.stats()
            with pager.map(MemoryStore(BEFORE.copy(), mode="readonly")) as other:
                if bytes(other.view()[-3 * PAGE:]) != BEFORE.tobytes()[-3 * PAGE:]:
                    wrong.append("other")
            if not (array == BEFORE).all():
                wrong.append("main")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:5]
    assert handled > 20, handled
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    del array, threads, thread, tick
""",
        path,
        str(int(in_thread)),
    )


def test_ctrl_c_ends_a_long_populate() -> None:
    run("""
with Pager("64M") as pager, pager.map(ZeroStore("64G"), unit="2M") as region:
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        region.populate()
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("all of it was populated")
    array = region.array()
    assert array[0] == 0 and array[-1] == 0
    assert not array[: 4 << 20].any()
    del array
""")


def test_populate_reaches_every_unit_over_its_slices() -> None:
    run("""
size = (64 << 20) * 2 + 3 * PAGE  # two slices and a bit
content = np.arange(size // 8, dtype=np.uint64)
with Pager() as pager, pager.map(MemoryStore(content), unit=16 * PAGE) as region:
    region.advise("random")
    region.populate(5 * PAGE, size - 1)
    before = region.stats().counters
    assert (region.array(np.uint64) == content).all()
    after = region.stats().counters
    assert after.faults <= before.faults + 1, (before, after)
    region.populate(7, 7)
""")


WRITTEN = """
region = Pager(SIZE * 7 // 10).map(FileStore(sys.argv[1], mode="writeback"))
array = region.array(np.uint64)
array[::3] += np.uint64(9)
"""
EXPECTED = BEFORE.copy()
EXPECTED[::3] += np.uint64(9)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("sys.exit(4)", 4),
        ("def deep():\n    with region.pager:\n        sys.exit(5)\ndeep()", 5),
        ("raise ValueError('the end')", 1),
        ("threading.Timer(0.1, lambda: print('late')).start()", 0),
        ("os.fork() or sys.exit(0)\nos.wait()", 0),
    ],
    ids=["end", "sys.exit", "sys.exit in with", "exception", "threads that end later", "a child exits too"],
)
def test_what_was_not_flushed_is_in_the_file_after_the_end(path: Path, end: str, code: int) -> None:
    run(WRITTEN + end, path, expected=code)
    assert path.read_bytes() == EXPECTED.tobytes()


@pytest.mark.parametrize("in_thread", [False, True], ids=["handlers", "in thread"])
@pytest.mark.parametrize("mode", ["private", "writeback"])
def test_the_end_while_threads_still_fault(path: Path, in_thread: bool, mode: str) -> None:
    run(
        """
region = Pager(SIZE * 7 // 10, in_thread=sys.argv[2] == "1").map(FileStore(sys.argv[1], mode=sys.argv[3]))
array = region.array(np.uint64)
array[::3] += np.uint64(9)

def work(array, seed):
    places = np.random.default_rng(seed)
    while True:
        array[places.integers(0, SIZE // 8, 100)].sum()

for seed in range(3):
    threading.Thread(target=work, args=(array, seed), daemon=True).start()
time.sleep(0.2)
""",
        path,
        str(int(in_thread)),
        mode,
    )
    assert path.read_bytes() == (EXPECTED if mode == "writeback" else BEFORE).tobytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_signal_that_kills_does_so_while_threads_fault(path: Path, number: signal.Signals) -> None:
    scene = """
signal.signal(signal.SIGINT, signal.SIG_DFL)
region = Pager(SIZE * 7 // 10).map(FileStore(sys.argv[1]))
array = region.array(np.uint64)

def work(array, seed):
    places = np.random.default_rng(seed)
    while True:
        array[places.integers(0, SIZE // 8, 100)].sum()

for seed in range(3):
    threading.Thread(target=work, args=(array, seed)).start()
print("running", flush=True)
while True:
    region.evict()
    region.populate()
"""
    with subprocess.Popen(
        [sys.executable, "-c", PRELUDE + scene, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "running\n"
            os.kill(process.pid, number)
            assert process.wait(20) == -number
        finally:
            process.kill()
    assert path.read_bytes() == BEFORE.tobytes()
