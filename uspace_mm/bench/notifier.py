"""What telling subscribers costs: a change with 0, 1 and 100 of them, registering, and finding a range.

An invalidation is the pair of start and end around a change, without the change itself. Two floors say what
no notifier can do without: an atomic counter up and down (who subscribes must be able to wait for the changes
that are under way), and two calls through a pointer (of the callbacks).

- ``added_ns_none``: a pair while nobody subscribes. An eviction pays this at most, when its unit goes alone;
  the pager asks once for a batch (``batch_none_ns``), of which each of up to 512 units has its share.
- ``added_ns_one``: what one direct subscriber adds to a pair. ``evict_none_ns`` and ``evict_one_ns`` are
  whole evictions of a region in batches, per unit, without and with one.
- ``lookup_ns_10k``: a pair whose range touches one of 10,000 subscriptions, at random: that one is found for
  the start, found again for the end, and called twice.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Any

from uspace_mm._native import ffi, lib
from uspace_mm.bench.memory import PAGE_BYTES, numbered_words, require_memory, warm_memory
from uspace_mm.bench.report import BenchOptions, BenchReport, at_most
from uspace_mm.errors import KernelError, UspaceError
from uspace_mm.pager import Pager, Region
from uspace_mm.stores import MemoryStore

HELP = "telling 0, 1 and 100 subscribers of a change, registering, and lookup among 10,000 intervals"
TARGETS = {
    "added_ns_none": at_most(20),
    "added_ns_one": at_most(100),
    "lookup_ns_10k": at_most(1000),
}
_INTERVALS = 10_000


def run(options: BenchOptions) -> BenchReport:
    """Each measure in turn, 9 rounds (1 when quick); the medians."""
    pages = 64 if options.quick else 1 << 12
    require_memory(3 * pages * PAGE_BYTES)
    measures = _measures(1_000 if options.quick else 1)
    seen: defaultdict[str, list[float]] = defaultdict(list)
    rounds = options.rounds_or(9)
    with Pager() as pager, pager.map(MemoryStore(numbered_words(pages * PAGE_BYTES))) as region:
        for number in range(rounds):
            options.progress(f"notifier: round {number + 1} of {rounds}")
            for name, measure in measures.items():
                seen[name].append(measure())
            for loaded in (False, True):
                load = "loaded_" if loaded else ""
                subscribe, unsubscribe = _register(20 if options.quick else 1_000, loaded)
                seen[f"register_{load}ns"].append(subscribe)
                seen[f"unregister_{load}ns"].append(unsubscribe)
            for watched in (number % 2 == 0, number % 2 == 1):
                name = "evict_one_ns" if watched else "evict_none_ns"
                seen[name].append(_evict(region, watched=watched))
    results = {name: median(values) for name, values in seen.items()}
    none, one, many = (results[f"pair_{count}_ns"] for count in ("none", "one", "100"))
    ratios = {
        "added_ns_none": none,
        "added_ns_one": one - none,
        "lookup_ns_10k": results["pair_10k_intervals_ns"],
        "none_vs_atomic_floor": none / results["atomic_floor_ns"],
        "one_vs_call_floor": (one - none) / results["call_floor_ns"],
        "hundred_vs_one": many / one,
        "evict_one_vs_none": results["evict_one_ns"] / results["evict_none_ns"],
    }
    return BenchReport("notifier", results, ratios, TARGETS)


def _measures(shrink: int) -> dict[str, Callable[[], float]]:
    """Name to a function that gives nanoseconds of one. `shrink` divides how often each is done."""

    def measure(function: Any, times: int, *arguments: int) -> Callable[[], float]:
        times = max(times // shrink, 10)

        def one() -> float:
            elapsed = ffi.new("uint64_t *")
            _check("notifier benchmark", function(*arguments, times, elapsed))
            return float(elapsed[0]) / times

        return one

    intervals = max(_INTERVALS // shrink, 10)
    return {
        "atomic_floor_ns": measure(lib.umm_bench_notify_floor, 1_000_000, lib.UMM_NOTIFY_FLOOR_ATOMIC),
        "call_floor_ns": measure(lib.umm_bench_notify_floor, 1_000_000, lib.UMM_NOTIFY_FLOOR_CALL),
        "pair_none_ns": measure(lib.umm_bench_notify_pair, 1_000_000, 0, 0),
        "pair_one_ns": measure(lib.umm_bench_notify_pair, 300_000, 1, 0),
        "pair_100_ns": measure(lib.umm_bench_notify_pair, 5_000, 100, 0),
        "pair_one_sleeping_ns": measure(lib.umm_bench_notify_pair, 1_000, 1, 1),
        "batch_none_ns": measure(lib.umm_bench_notify_batch, 1_000_000),
        "pair_10k_intervals_ns": measure(lib.umm_bench_notify_intervals, 100_000, intervals),
    }


def _check(call: str, result: int) -> None:
    if result < 0:
        raise KernelError(call, result)


def _register(count: int, loaded: bool) -> tuple[float, float]:
    """Nanoseconds of a subscription and of its end; `loaded`: while another thread invalidates."""
    subscribe, unsubscribe = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    _check("umm_subscribe", lib.umm_bench_notify_register(count, loaded, subscribe, unsubscribe))
    return float(subscribe[0]) / count, float(unsubscribe[0]) / count


@contextmanager
def _watched(region: Region) -> Iterator[None]:
    """One direct subscriber to the region's memory."""
    handle = ffi.new("struct umm_bench_watcher **")
    end = region.address + region.size
    _check("umm_subscribe", lib.umm_bench_watcher_create(region.address, end, handle))
    try:
        yield
    finally:
        told = lib.umm_bench_watcher_destroy(handle[0])
    if not told:
        raise UspaceError("the subscriber was not told of an eviction: the times mean nothing")


def _evict(region: Region, *, watched: bool) -> float:
    """Nanoseconds per unit of an eviction of the whole region."""
    warm_memory(region.size)
    region.populate()
    with _watched(region) if watched else nullcontext():
        begin = time.perf_counter_ns()
        region.evict()
        elapsed = time.perf_counter_ns() - begin
    return elapsed / (region.size // PAGE_BYTES)
