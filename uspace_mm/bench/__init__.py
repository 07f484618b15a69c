"""Benchmarks: ours against a floor or a peer, in turn in the same run, and the ratios between them.

One module per benchmark, named like it, with ``HELP`` (one line), ``TARGETS`` and ``run(options)``.
To add one, write the module and put its name into :data:`BENCHMARKS`.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from uspace_mm.bench.report import Benchmark, BenchOptions, BenchReport, Target

__all__ = ["BENCHMARKS", "BenchOptions", "BenchReport", "Benchmark", "Target", "load"]

BENCHMARKS = ("fault", "populate", "regions", "notifier", "guest")


def load(name: str) -> Benchmark:
    """The benchmark called `name`, one of :data:`BENCHMARKS`."""
    return cast(Benchmark, import_module(f"uspace_mm.bench.{name}"))
