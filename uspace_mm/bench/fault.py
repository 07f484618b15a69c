"""What one demand fault costs: a page-wise random touch of memory that a memory store backs.

The floors are handlers of ours with nothing in them (native/bench/floor.h): pinned ones as our pager has
them, the one unpinned polling thread that most programs have, and the SIGBUS handler that our in-thread mode
is held against.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from statistics import median

import numpy as np

from uspace_mm.bench import contenders
from uspace_mm.bench.memory import PAGE_BYTES, Words, numbered_words, require_memory, warm_memory
from uspace_mm.bench.report import BenchOptions, BenchReport, at_least, at_most

HELP = "latency of a page fault: our pager against handlers with nothing in them"
TARGETS = {
    "ours_vs_floor_p50": at_most(1.15),
    "ours_vs_floor_p99": at_most(1.5),
    "unpinned_vs_ours_p50": at_least(4),
    "inline_vs_floor_p50": at_most(1.2),
}

CONTENDERS: dict[str, Callable[[Words], AbstractContextManager[int]]] = {
    "floor": lambda source: contenders.floor(contenders.PINNED, source),
    "ours": contenders.pager,
    "unpinned": lambda source: contenders.floor(contenders.POLLING, source),
    "inline_floor": lambda source: contenders.floor(contenders.IN_THREAD, source),
    "inline": lambda source: contenders.pager(source, in_thread=True),
}

_QUANTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}


def run(options: BenchOptions) -> BenchReport:
    """Touch 256 MiB (2 MiB when quick) with 1 and with 64 threads, each contender in each round."""
    size = (2 << 20) if options.quick else (256 << 20)
    require_memory(3 * size)
    source = numbered_words(size)
    results: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for threads in (1, 64):
        suffix = "" if threads == 1 else f"_{threads}"
        measured = _measure(source, threads, options)
        results |= {name + suffix: value for name, value in measured.items()}
        ratios |= {name + suffix: value for name, value in _ratios(measured).items()}
    return BenchReport("fault", results, ratios, TARGETS)


def _measure(source: Words, threads: int, options: BenchOptions) -> dict[str, float]:
    """Per contender and quantile: the median over the rounds of the quantile of one round."""
    seen: defaultdict[str, list[float]] = defaultdict(list)
    pages = source.nbytes // PAGE_BYTES
    names = list(CONTENDERS)
    rounds = options.rounds_or(5)
    for number in range(rounds):
        order = np.random.default_rng(number).permutation(pages).astype(np.uint64)
        expected = source[order * (PAGE_BYTES // 8)]
        # Another contender goes first in each round: what slows the first one down slows each in turn.
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            options.progress(f"fault: {threads} thread(s), round {number + 1} of {rounds}, {name}")
            warm_memory(source.nbytes)
            with CONTENDERS[name](source) as base:
                touches = contenders.touch(order * PAGE_BYTES + base, expected, threads)
            for label, q in _QUANTILES.items():
                seen[f"{name}_{label}_ns"].append(touches.quantile(q))
            seen[f"{name}_faults_per_s"].append(touches.per_s)
    return {f"{name}_{rest}": median(seen[f"{name}_{rest}"]) for name in names for rest in _measures()}


def _measures() -> list[str]:
    return [*(f"{label}_ns" for label in _QUANTILES), "faults_per_s"]


def _ratios(measured: dict[str, float]) -> dict[str, float]:
    return {
        "ours_vs_floor_p50": measured["ours_p50_ns"] / measured["floor_p50_ns"],
        "ours_vs_floor_p99": measured["ours_p99_ns"] / measured["floor_p99_ns"],
        "unpinned_vs_ours_p50": measured["unpinned_p50_ns"] / measured["ours_p50_ns"],
        "inline_vs_floor_p50": measured["inline_p50_ns"] / measured["inline_floor_p50_ns"],
    }
