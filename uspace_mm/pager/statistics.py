"""What a pager or a region has done so far: one snapshot, copied in one call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from uspace_mm._native import ffi, lib
from uspace_mm.sizes import format_size


@dataclass(frozen=True)
class Histogram:
    """A latency distribution in nanoseconds; values within 1/32 (an HDR histogram)."""

    count: int
    mean_ns: float
    min_ns: int
    p50_ns: int
    p90_ns: int
    p99_ns: int
    p999_ns: int
    max_ns: int
    buckets: tuple[tuple[int, int, int], ...]
    """(low, high, count) of the buckets that are not empty; low <= value < high."""

    def to_dict(self) -> dict[str, Any]:
        """All but the buckets."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "buckets"}


@dataclass(frozen=True)
class Latency:
    """From the handler being told of a fault to the wake of the faulting thread, and its parts."""

    total: Histogram
    queue: Histogram
    """Until the fault was claimed: lock, other messages in front of it."""
    fetch: Histogram
    """Until its bytes were there."""
    install: Histogram
    """Until they were in place and the thread was woken."""


@dataclass(frozen=True)
class Counters:
    """Counts since the pager or region was made; see ``struct umm_pager_counters`` for each."""

    faults_missing: int
    faults_zero: int
    faults_wp: int
    faults_rescued: int
    faults_stale: int
    faults_deferred: int
    faults_poisoned: int
    bytes_fetched: int
    bytes_written: int
    prefetch_issued: int
    prefetch_installed: int
    prefetch_hits: int
    prefetch_wasted: int
    evicted_clean: int
    evicted_dirty: int
    evict_failed: int
    events_remove: int
    events_unmap: int
    events_remap: int
    events_fork: int
    store_errors: int
    pages_lost: int
    resident_bytes: int
    resident_peak_bytes: int
    spill_bytes: int

    @property
    def faults(self) -> int:
        """Faults that were served with a page."""
        return self.faults_missing + self.faults_zero + self.faults_rescued


@dataclass(frozen=True)
class Statistics:
    """Counters, latencies and settings. Regions of fewer than 1024 units have no latencies of their own."""

    counters: Counters
    latency: Latency
    budget_bytes: int
    staging_bytes: int
    handlers: int
    regions: int
    userfaultfds: int
    uses_move: bool
    in_thread: bool

    def to_dict(self) -> dict[str, Any]:
        """Everything but the histograms' buckets, for JSON."""
        result: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("counters", "latency")
        }
        result["counters"] = asdict(self.counters) | {"faults": self.counters.faults}
        result["latency"] = {
            field.name: getattr(self.latency, field.name).to_dict() for field in fields(self.latency)
        }
        return result

    def to_text(self) -> str:
        """The same for people, a line per subject."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        c, t = self.counters, self.latency.total
        budget = format_size(self.budget_bytes) if self.budget_bytes else "none"
        yield (
            f"resident   {format_size(c.resident_bytes)} (peak {format_size(c.resident_peak_bytes)}, "
            f"budget {budget})"
        )
        yield (
            f"faults     {c.faults}: {c.faults_missing} from the store, {c.faults_zero} zero, "
            f"{c.faults_rescued} still warm; {c.faults_poisoned} lost"
        )
        if t.count:
            yield (
                f"latency    p50 {t.p50_ns / 1e3:.1f} us, p99 {t.p99_ns / 1e3:.1f} us, "
                f"p99.9 {t.p999_ns / 1e3:.1f} us, max {t.max_ns / 1e3:.1f} us"
            )
            parts = ", ".join(
                f"{name} {getattr(self.latency, name).p50_ns / 1e3:.1f} us"
                for name in ("queue", "fetch", "install")
            )
            yield f"           p50 of its parts: {parts}"
        yield f"prefetch   {c.prefetch_installed} units, {c.prefetch_hits} hits, {c.prefetch_wasted} wasted"
        yield (
            f"evicted    {c.evicted_clean + c.evicted_dirty} units: {c.evicted_clean} clean, "
            f"{c.evicted_dirty} written, {c.evict_failed} refused"
        )
        yield f"moved      {format_size(c.bytes_fetched)} in, {format_size(c.bytes_written)} out"


def _histogram(histogram: Any) -> Histogram:
    def quantile(q: float) -> int:
        return int(lib.umm_histogram_quantile(ffi.addressof(histogram), q))

    low, high = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    buckets = []
    if histogram.count:
        for number, count in enumerate(histogram.buckets):
            if count:
                lib.umm_histogram_bounds(number, low, high)
                buckets.append((int(low[0]), int(high[0]), int(count)))
    return Histogram(
        count=histogram.count,
        mean_ns=histogram.sum / histogram.count if histogram.count else 0.0,
        min_ns=histogram.min,
        p50_ns=quantile(0.5),
        p90_ns=quantile(0.9),
        p99_ns=quantile(0.99),
        p999_ns=quantile(0.999),
        max_ns=histogram.max,
        buckets=tuple(buckets),
    )


def statistics_of(native: Any) -> Statistics:
    """The typed copy of a ``struct umm_pager_stats``."""
    return Statistics(
        counters=Counters(**{field.name: getattr(native.counters, field.name) for field in fields(Counters)}),
        latency=Latency(
            **{field.name: _histogram(getattr(native.latency, field.name)) for field in fields(Latency)}
        ),
        budget_bytes=native.budget_bytes,
        staging_bytes=native.staging_bytes,
        handlers=native.handlers,
        regions=native.regions,
        userfaultfds=native.uffds,
        uses_move=bool(native.uses_move),
        in_thread=bool(native.in_thread),
    )
