"""Many regions, many threads, many pagers, and none of them left behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
from uspace_mm._native import ffi, lib

from uspace_mm.kernel.proc import page_size
from uspace_mm.pager import Pager
from uspace_mm.stores import FileStore, MemoryStore

PAGE = page_size()
REGIONS, PAGES = 1000, 4
THREADS = 64


def touch(addresses: np.ndarray, expected: np.ndarray, threads: int) -> int:
    """How many words were wrong."""
    latency = np.zeros(len(addresses), np.uint32)
    job = ffi.new("struct umm_touch_job *")
    job.addresses = ffi.from_buffer("uint64_t[]", addresses)
    job.expected = ffi.from_buffer("uint64_t[]", expected)
    job.count, job.threads = len(addresses), threads
    job.latency_ns = ffi.from_buffer("uint32_t[]", latency)
    assert lib.umm_bench_touch(job) == 0
    return int(job.wrong)


def test_a_thousand_regions_and_many_threads_while_others_come_and_go() -> None:
    words = PAGES * PAGE // 8
    random = np.random.default_rng(1)
    stop = threading.Event()
    errors: list[str] = []
    with Pager(REGIONS * PAGE * PAGES // 2) as pager:
        data = np.arange(1, REGIONS * words + 1, dtype=np.uint64).reshape(REGIONS, words)
        regions = [pager.map(MemoryStore(row)) for row in data]

        def come_and_go(number: int) -> None:
            other = np.full(words, number + 1, np.uint64)
            while not stop.is_set():
                with pager.map(MemoryStore(other)) as region:
                    if bytes(region.view()) != other.tobytes():
                        errors.append("a new region has other bytes than its store")

        threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        try:
            which = random.integers(REGIONS, size=40_000)
            word = random.integers(words, size=40_000)
            addresses = np.array([region.address for region in regions], np.uint64)
            wrong = touch(
                addresses[which] + word.astype(np.uint64) * np.uint64(8), data[which, word], THREADS
            )
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert wrong == 0
        assert not errors
        for region, row in zip(regions, data, strict=True):
            assert bytes(region.view()) == row.tobytes()
        counters = pager.stats().counters
        assert counters.evicted_clean > 0
        assert counters.pages_lost == 0


def counted() -> tuple[int, int, int]:
    """Descriptors, threads and mappings of this process."""
    gc.collect()
    return (
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        len(Path("/proc/self/maps").read_text().splitlines()),
    )


def test_opening_and_closing_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "data"
    data = np.arange(64 * PAGE // 8, dtype=np.uint64)
    path.write_bytes(data.tobytes())
    seen = []
    for number in range(50):
        budget = (None, "512k")[number % 2]
        with Pager(budget, in_thread=number % 3 == 0, move=number % 5 != 0) as pager:
            first = pager.map(FileStore(path, mode="writeback"))
            second = pager.map(MemoryStore(data))
            array = second.array(np.uint64)
            array += np.uint64(1)
            second.evict()
            assert (array == data + np.uint64(1)).all()
            assert bytes(first.view()) == data.tobytes()
            del array
        seen.append(counted())
    # The first rounds warm up what the C library keeps (thread stacks, arenas).
    warm = seen[10:]
    assert {one[:2] for one in warm} == {seen[0][:2]}
    # The C library gives an arena to a thread or not: a few more or less, but no growth with the rounds.
    assert warm[-1][2] - warm[0][2] < 20, [one[2] for one in seen]


def test_several_pagers_in_one_process() -> None:
    datas = [np.full(32 * PAGE, number + 1, np.uint8) for number in range(8)]
    pagers = [Pager("512k", in_thread=number % 4 == 3, move=number % 2 == 0) for number in range(8)]
    regions = [pager.map(MemoryStore(data)) for pager, data in zip(pagers, datas, strict=True)]
    arrays = [region.array() for region in regions]
    for start in range(0, 32 * PAGE, PAGE):
        for array in arrays:
            array[start] += 100
    for region, array, data in zip(regions, arrays, datas, strict=True):
        region.evict()
        expected = data.copy()
        expected[::PAGE] += 100
        assert (array == expected).all()
    del array, arrays
    # In an order of their own: each serves while others are gone.
    for number in (3, 0, 7, 1):
        pagers[number].close()
    for number in (2, 4, 5, 6):
        assert bytes(regions[number].view())[1] == number + 1
        pagers[number].close()


def test_few_descriptors() -> None:
    script = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import numpy as np
from uspace_mm.errors import UspaceError
from uspace_mm.pager import Pager
from uspace_mm.stores import MemoryStore
SIZE = 64 * {PAGE}
pagers, refused = [], ""
try:
    while len(pagers) < 64:
        pagers.append(Pager("512k"))
except UspaceError as error:
    refused = str(error)
assert pagers and refused, (len(pagers), refused)
pagers.pop().close()
for number, pager in enumerate(pagers):
    region = pager.map(MemoryStore(np.full(SIZE, number + 1, np.uint8)))
    assert bytes(region.view()) == bytes([number + 1]) * SIZE
while pagers:
    pagers.pop().close()
with Pager() as pager, pager.map(MemoryStore(np.full(SIZE, 9, np.uint8))) as region:
    assert bytes(region.view()) == bytes([9]) * SIZE
print("ok", refused)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("ok ")
