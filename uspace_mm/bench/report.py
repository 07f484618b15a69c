"""What every benchmark takes and gives: options, results, ratios and the targets they are held against."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from uspace_mm.bench.machine import describe_machine


@dataclass(frozen=True)
class Target:
    """The bound that a ratio has to keep."""

    relation: Literal["<=", ">="]
    bound: float

    def met_by(self, ratio: float) -> bool:
        return ratio <= self.bound if self.relation == "<=" else ratio >= self.bound

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:g}"


def at_most(bound: float) -> Target:
    return Target("<=", bound)


def at_least(bound: float) -> Target:
    return Target(">=", bound)


def _ignore(_: str) -> None:
    pass


@dataclass(frozen=True)
class BenchOptions:
    """How to run: `quick` shrinks every size (for tests: its ratios mean nothing)."""

    quick: bool = False
    rounds: int | None = None
    #: Called with a line for people before each step.
    progress: Callable[[str], None] = field(default=_ignore)

    def rounds_or(self, default: int) -> int:
        """The number of rounds to run: the user's, or one when quick, or `default`."""
        if self.rounds is not None:
            return self.rounds
        return 1 if self.quick else default


class Benchmark(Protocol):
    """What a module of this package offers."""

    HELP: str
    TARGETS: Mapping[str, Target]

    def run(self, options: BenchOptions) -> BenchReport: ...


@dataclass
class BenchReport:
    """Measured values and ratios of one benchmark; a ratio's name says what is divided by what."""

    bench: str
    results: dict[str, float]
    ratios: dict[str, float]
    targets: Mapping[str, Target]
    machine: dict[str, Any] = field(default_factory=describe_machine)

    def missed(self) -> list[str]:
        """Ratios that miss their target, and targets whose ratio could not be measured."""
        return [
            name
            for name, target in self.targets.items()
            if name not in self.ratios or not target.met_by(self.ratios[name])
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "machine": self.machine,
            "results": self.results,
            "ratios": self.ratios,
        }

    def to_text(self) -> str:
        lines = [f"{self.bench}: {self._machine_line()}", ""]
        width = max(map(len, [*self.results, *self.ratios, *self.targets]), default=0)
        lines += [f"  {name:<{width}}  {_show_value(name, value)}" for name, value in self.results.items()]
        lines.append("")
        for name in [*self.ratios, *(name for name in self.targets if name not in self.ratios)]:
            target = self.targets.get(name)
            shown = f"{self.ratios[name]:>8.2f}" if name in self.ratios else "       -"
            line = f"  {name:<{width}}  {shown}"
            if target is not None:
                verdict = "missed" if name in self.missed() else "met"
                line += f"  target {str(target):<8}  {verdict if name in self.ratios else 'not measured'}"
            lines.append(line)
        return "\n".join(lines)

    def _machine_line(self) -> str:
        machine = self.machine
        return (
            f"Linux {machine['kernel']} on {machine['cpus']} CPUs ({machine['cpu']}), "
            f"{machine['page_bytes']}-byte pages, load {machine['load_1min']:.1f}"
        )


def _show_value(name: str, value: float) -> str:
    # The unit is the last word of the name, or stands before a number of threads: `p50_ns_64`.
    name = re.sub(r"_\d+$", "", name)
    if name.endswith("_bytes_per_s"):
        return f"{value / 1e9:>10.2f} GB/s"
    if name.endswith("_per_s"):
        return f"{value:>10.0f} /s"
    if name.endswith("_s"):
        return f"{value:>10.2f} s"
    if name.endswith("_ns"):
        return f"{value:>10.1f} ns" if value < 1000 else f"{value / 1000:>10.2f} us"
    if name.endswith("_bytes"):
        return f"{value / (1 << 20):>10.2f} MiB"
    return f"{value:>10g}"
