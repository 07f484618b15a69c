"""What a fault costs when the pager has many regions: the same pages as 1, 1,000 and 10,000 of them."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import numpy as np

from uspace_mm.bench import contenders
from uspace_mm.bench.memory import PAGE_BYTES, Words, numbered_words, require_memory, warm_memory
from uspace_mm.bench.report import BenchOptions, BenchReport, at_most
from uspace_mm.errors import UnsupportedError
from uspace_mm.pager import Pager, Region
from uspace_mm.stores import MemoryStore

HELP = "latency of a page fault with 1, 1,000 and 10,000 regions"
TARGETS = {"many_vs_one_p50": at_most(1.2)}
_PAGES_PER_REGION = 8


def run(options: BenchOptions) -> BenchReport:
    """Touch 80,000 pages (480 when quick) in random order over all regions, with one thread."""
    counts = (1, 6, 60) if options.quick else (1, 1_000, 10_000)
    pages = counts[-1] * _PAGES_PER_REGION
    _require_mappings(counts[-1])
    require_memory(3 * pages * PAGE_BYTES)
    source = numbered_words(pages * PAGE_BYTES)
    seen: defaultdict[str, list[float]] = defaultdict(list)
    rounds = options.rounds_or(5)
    for number in range(rounds):
        turn = number % len(counts)
        for count in counts[turn:] + counts[:turn]:
            options.progress(f"regions: round {number + 1} of {rounds}, {count} region(s)")
            warm_memory(source.nbytes)
            touches, map_ns = _touch_regions(source, count, seed=number)
            seen[f"regions_{count}_p50_ns"].append(touches.quantile(0.5))
            seen[f"regions_{count}_p99_ns"].append(touches.quantile(0.99))
            seen[f"regions_{count}_map_ns"].append(map_ns)
    results = {
        name: median(seen[name])
        for count in counts
        for name in (f"regions_{count}_{rest}" for rest in ("p50_ns", "p99_ns", "map_ns"))
    }
    one, some, many = (results[f"regions_{count}_p50_ns"] for count in counts)
    ratios = {"many_vs_one_p50": many / one, "thousand_vs_one_p50": some / one}
    return BenchReport("regions", results, ratios, TARGETS)


def _require_mappings(regions: int) -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    # A region is a mapping, and may have a guard on each side.
    if limit < 4 * regions:
        raise UnsupportedError(
            f"vm.max_map_count is {limit}, and {regions} regions may need {4 * regions} mappings; "
            f"raise it with sysctl vm.max_map_count={8 * regions}"
        )


def _touch_regions(source: Words, count: int, seed: int) -> tuple[contenders.Touches, float]:
    """The touches, and the nanoseconds that mapping one region took on average."""
    words_per_page = PAGE_BYTES // 8
    pages = len(source) // words_per_page
    share = pages // count  # pages per region; every count divides the pages
    order = np.random.default_rng(seed).permutation(pages)
    with Pager() as pager:
        regions: list[Region] = []
        begin = time.perf_counter_ns()
        try:
            for part in np.split(source, count):
                regions.append(pager.map(MemoryStore(part)))  # noqa: PERF401 - closed below, failing halfway too
            map_ns = (time.perf_counter_ns() - begin) / count
            bases = np.array([region.address for region in regions], dtype=np.uint64)
            addresses = bases[order // share] + (order % share * PAGE_BYTES).astype(np.uint64)
            touches = contenders.touch(addresses, source[order * words_per_page], threads=1)
        finally:
            for region in regions:
                region.close()
    return touches, map_ns
