"""A file as a lazily paged array under a budget smaller than itself: count its bytes, sort its words.

numpy works on the regions as on any array; what it touches is brought in, and what it leaves is taken away.
The results are checked against the file as plain read(2) gives it, past the pager.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from uspace_mm.errors import InputError
from uspace_mm.pager import Pager, Region, guard
from uspace_mm.stores import FileStore, ZeroStore

CHUNK_BYTES = 1 << 20
# Below this a pager has no room for the pages that one instruction and its batches of evictions need.
BUDGET_MIN_PAGES = 256

Counts = npt.NDArray[np.int64]
Words = npt.NDArray[Any]


@dataclass
class PagerDemoResult:
    """What was computed, whether it is right, and what the pager did for it. Sizes in bytes."""

    file: str
    file_bytes: int
    budget_bytes: int
    word_bytes: int
    words: int
    distinct_bytes: int
    commonest_byte: int
    commonest_byte_count: int
    distinct_pairs: int | None
    histogram_matches: bool
    is_sorted: bool
    same_words: bool
    peak_bytes: int
    phase_s: dict[str, float] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        """Whether every check held, the budget's included."""
        return self.histogram_matches and self.is_sorted and self.same_words and self.kept_budget

    @property
    def kept_budget(self) -> bool:
        return self.peak_bytes <= self.budget_bytes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"kept_budget": self.kept_budget, "is_right": self.is_right}


def check_file(path: Path) -> int:
    """Size in bytes of a file that can be paged; :class:`InputError` says why another cannot."""
    try:
        # stat first: opening a pipe would wait for its other end.
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path}: is a directory; give one file in it")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(
                f"{path}: is no regular file, so it has no pages to ask for; copy it to a file first"
            )
        with path.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"{path}: {os.strerror(error.errno or 0)}; give a file that you may read") from error
    if status.st_size == 0:
        raise InputError(f"{path}: is empty; give a file with at least one byte")
    return status.st_size


def default_budget(file_bytes: int) -> int:
    """A quarter of the file in whole pages, but enough to work with."""
    page = os.sysconf("SC_PAGESIZE")
    return max(file_bytes // 4 // page, BUDGET_MIN_PAGES) * page


def check_budget(budget: int) -> None:
    """Raise :class:`InputError` for a budget that is too small to work with."""
    least = BUDGET_MIN_PAGES * os.sysconf("SC_PAGESIZE")
    if budget < least:
        raise InputError(f"budget of {budget} bytes: too small to work with; give at least {least}")


def run_pager_demo(
    path: Path,
    budget: int | None = None,
    progress: Callable[[str, float | None], None] = lambda phase, part: None,
) -> PagerDemoResult:
    """Count and sort `path` under `budget` bytes (default: :func:`default_budget`) of resident memory.

    `progress` is told the name of the phase and the part of it that is done, or None where that is not known.
    Raises :class:`InputError` for a file that cannot be paged and for a budget that is too small, and
    :class:`~uspace_mm.pager.PageLost` when the file becomes shorter meanwhile.
    """
    size = check_file(path)
    if budget is None:
        budget = default_budget(size)
    check_budget(budget)
    # The widest words that the file is made of without a rest.
    width = next(n for n in (8, 4, 2, 1) if size % n == 0)
    phase_s: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[Callable[[float], None]]:
        progress(name, None)
        begin = time.perf_counter()
        # A file that became shorter, a full disk: PageLost instead of SIGBUS.
        with guard():
            yield lambda part: progress(name, part)
        phase_s[name] = time.perf_counter() - begin

    # The end of the block closes the regions: not one by one, an exception keeps arrays of them alive.
    with Pager(budget=budget) as pager:
        source = pager.map(FileStore(path))
        target = pager.map(ZeroStore(size))
        with phase("count") as tell:
            counts, pairs = _count(source, size, tell)
        with phase("copy") as tell:
            _copy(source, target, size, tell)
        with phase("sort"):
            _sort(target, size, width)
        with phase("check") as tell:
            file_counts, file_sum = _read_file(path, size, width, tell)
            out_counts, out_sum, is_sorted = _read_sorted(target, size, width, tell)
        stats = pager.stats()

    commonest = int(np.argmax(counts))
    return PagerDemoResult(
        file=str(path),
        file_bytes=size,
        budget_bytes=budget,
        word_bytes=width,
        words=size // width,
        distinct_bytes=int(np.count_nonzero(counts)),
        commonest_byte=commonest,
        commonest_byte_count=int(counts[commonest]),
        distinct_pairs=None if pairs is None else int(np.count_nonzero(pairs)),
        histogram_matches=bool(np.array_equal(counts, file_counts) and np.array_equal(counts, out_counts)),
        is_sorted=is_sorted,
        same_words=out_sum == file_sum,
        peak_bytes=stats.counters.resident_peak_bytes,
        phase_s=phase_s,
        stats=stats.to_dict(),
    )


def _chunks(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, CHUNK_BYTES):
        yield start, min(start + CHUNK_BYTES, size)


def _count(source: Region, size: int, tell: Callable[[float], None]) -> tuple[Counts, Counts | None]:
    """How often each byte occurs, and each 16-bit word when the file is made of them."""
    source.advise("sequential")
    data = source.array("u1", shape=(size,))
    counts = np.zeros(256, dtype=np.int64)
    pairs = np.zeros(1 << 16, dtype=np.int64) if size % 2 == 0 else None
    for start, stop in _chunks(size):
        counts += np.bincount(data[start:stop], minlength=256)
        if pairs is not None:
            pairs += np.bincount(data[start:stop].view("u2"), minlength=1 << 16)
        tell(stop / size)
    return counts, pairs


def _copy(source: Region, target: Region, size: int, tell: Callable[[float], None]) -> None:
    read = source.array("u1", shape=(size,))
    write = target.array("u1", shape=(size,))
    for start, stop in _chunks(size):
        write[start:stop] = read[start:stop]
        tell(stop / size)


def _sort(target: Region, size: int, width: int) -> None:
    """Sort in place. A quicksort reads and writes its halves in order, then works inside one of them:
    only its first passes, over parts larger than the budget, page at all."""
    words = target.array(f"u{width}", shape=(size // width,))
    words.sort()


def _fingerprint(words: Words) -> int:
    """A sum modulo 2^64 over a hash of each word: equal for equal words in any order."""
    mixed = words.astype(np.uint64)
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return int(mixed.sum(dtype=np.uint64))


def _read_file(path: Path, size: int, width: int, tell: Callable[[float], None]) -> tuple[Counts, int]:
    """Byte counts and fingerprint of the file, read without the pager."""
    counts = np.zeros(256, dtype=np.int64)
    total = 0
    with path.open("rb", buffering=0) as file:
        for start, stop in _chunks(size):
            data = file.read(stop - start)
            if len(data) != stop - start:
                raise InputError(f"{path}: became shorter while it was read; give a file that nobody writes")
            counts += np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
            total += _fingerprint(np.frombuffer(data, dtype=f"u{width}"))
            tell(stop / size / 2)
    return counts, total % (1 << 64)


def _read_sorted(
    target: Region, size: int, width: int, tell: Callable[[float], None]
) -> tuple[Counts, int, bool]:
    """Byte counts and fingerprint of the sorted region, and whether it is in order."""
    target.advise("sequential")
    words = target.array(f"u{width}", shape=(size // width,))
    counts = np.zeros(256, dtype=np.int64)
    total = 0
    in_order = True
    before = 0
    for start, stop in _chunks(size):
        part = words[start // width : stop // width].copy()
        in_order = in_order and before <= int(part[0]) and bool(np.all(part[:-1] <= part[1:]))
        before = int(part[-1])
        counts += np.bincount(part.view(np.uint8), minlength=256)
        total += _fingerprint(part)
        tell(0.5 + stop / size / 2)
    return counts, total % (1 << 64), in_order
