"""How fast a region is filled from memory: by base pages, and by units that end up as huge pages.

The floor of both is the plain ioctl, UFFDIO_COPY from the same source in the batch size that is fastest
here, by one thread. Into units of 2 MiB it leaves small pages behind; ours have to be huge, which is checked.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from statistics import median

import numpy as np

from uspace_mm._native import ffi, lib
from uspace_mm.bench.contenders import WrongContent
from uspace_mm.bench.memory import (
    PAGE_BYTES,
    Words,
    huge_bytes_in,
    huge_page_bytes,
    numbered_words,
    require_memory,
    warm_memory,
)
from uspace_mm.bench.report import BenchOptions, BenchReport, at_least
from uspace_mm.errors import KernelError
from uspace_mm.pager import Pager
from uspace_mm.stores import MemoryStore

HELP = "throughput of filling a region: our pager against the plain ioctl"
TARGETS = {
    "ours_vs_copy_floor": at_least(0.95),
    "huge_vs_copy_floor": at_least(1.0),
    "huge_bytes_vs_filled": at_least(1.0),
}
UNIT_BYTES = 2 << 20


@dataclass(frozen=True)
class _Filled:
    bytes_per_s: float
    huge_bytes: int = 0


def run(options: BenchOptions) -> BenchReport:
    """Fill 1 GiB (8 MiB when quick) in each way in each round; throughputs are medians over the rounds."""
    size = (8 << 20) if options.quick else (1 << 30)
    require_memory(3 * size)
    source = numbered_words(size)
    batch = _best_batch(source, options)
    with_huge = huge_page_bytes() == UNIT_BYTES
    seen: defaultdict[str, list[float]] = defaultdict(list)
    huge_bytes: list[int] = []
    rounds = options.rounds_or(7)
    for number in range(rounds):
        options.progress(f"populate: round {number + 1} of {rounds}")
        seen["copy_floor"].append(_floor(source, batch, PAGE_BYTES, huge=False))
        seen["ours"].append(_ours(source, unit=None).bytes_per_s)
        if with_huge:
            seen["huge_copy_floor"].append(_floor(source, UNIT_BYTES, UNIT_BYTES, huge=True))
            filled = _ours(source, unit=UNIT_BYTES)
            seen["huge"].append(filled.bytes_per_s)
            huge_bytes.append(filled.huge_bytes)
    results = {f"{name}_bytes_per_s": median(values) for name, values in seen.items()}
    results["copy_floor_batch_bytes"] = batch
    ratios = {"ours_vs_copy_floor": results["ours_bytes_per_s"] / results["copy_floor_bytes_per_s"]}
    if with_huge:
        results["huge_huge_bytes"] = min(huge_bytes)
        ratios["huge_vs_copy_floor"] = results["huge_bytes_per_s"] / results["huge_copy_floor_bytes_per_s"]
        ratios["huge_bytes_vs_filled"] = min(huge_bytes) / size
    else:
        options.progress("populate: no transparent huge pages of 2 MiB here, so units of 2 MiB are left out")
    return BenchReport("populate", results, ratios, TARGETS)


def _best_batch(source: Words, options: BenchOptions) -> int:
    """Bytes per ioctl at which the copy floor is fastest (the best of three, on a part of the source)."""
    part = source[: min(len(source), (128 << 20) // 8)]
    batches = [PAGE_BYTES << shift for shift in range(4, 16, 2) if PAGE_BYTES << shift <= part.nbytes]
    options.progress(f"populate: which of {len(batches)} batch sizes is the fastest for the floor")
    speed = {batch: max(_floor(part, batch, PAGE_BYTES, huge=False) for _ in range(3)) for batch in batches}
    return max(speed, key=speed.__getitem__)


def _floor(source: Words, batch: int, align: int, *, huge: bool) -> float:
    warm_memory(source.nbytes + UNIT_BYTES)
    elapsed = ffi.new("uint64_t *")
    wrong = ffi.new("uint64_t *")
    error = lib.umm_floor_populate(ffi.from_buffer(source), source.nbytes, batch, align, huge, elapsed, wrong)
    if error:
        raise KernelError("ioctl(UFFDIO_COPY)", error, length=source.nbytes)
    if wrong[0]:
        raise WrongContent(f"{wrong[0]} pages of the copy floor held other bytes than their source")
    return source.nbytes * 1e9 / int(elapsed[0])


def _ours(source: Words, unit: int | None) -> _Filled:
    warm_memory(source.nbytes + UNIT_BYTES)
    with Pager() as pager:
        region = pager.map(MemoryStore(source), unit=unit)
        try:
            begin = time.perf_counter_ns()
            region.populate(0, source.nbytes)
            elapsed = time.perf_counter_ns() - begin
            huge = huge_bytes_in(region.address, region.address + source.nbytes)
            array = region.array("u8")
            wrong = int(np.count_nonzero(array[: len(source)] != source))
            del array
        finally:
            region.close()
    if wrong:
        raise WrongContent(f"{wrong} words of the populated region differ from their source")
    return _Filled(source.nbytes * 1e9 / elapsed, huge)
