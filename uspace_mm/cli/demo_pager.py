"""``uspace-mm demo pager FILE``: the pager demonstration, its progress and its summary."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from uspace_mm.sizes import format_size, parse_size

if TYPE_CHECKING:
    from uspace_mm.demo.pager_demo import PagerDemoResult

_PHASES = {
    "count": "count its bytes",
    "copy": "copy it into a second region",
    "sort": "sort that in place",
    "check": "check both against the file",
}


class Command:
    """Runs the demonstration on one file."""

    name = "pager"
    help = "Page a file as an array under a memory budget: count its bytes, sort it, check the result."

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("file", metavar="FILE", help="any file with at least one byte")
        parser.add_argument(
            "--budget", metavar="SIZE", help="memory for all pages, e.g. 64M (default: a quarter of the file)"
        )
        parser.add_argument("--json", action="store_true", help="print the result as a JSON object")

    def run(self, args: argparse.Namespace) -> int:
        # Not above: every command's parser is built at each start, and numpy and the pager take their time.
        from uspace_mm.demo.pager_demo import check_budget, check_file, run_pager_demo

        path = Path(args.file)
        check_file(path)
        budget = None
        if args.budget is not None:
            budget = parse_size(args.budget)
            check_budget(budget)
        with _Bars() as bars:
            result = run_pager_demo(path, budget, bars.show)
        if args.json:
            print(json.dumps(result.to_dict(), indent=2))
        else:
            _print(result)
        return 0 if result.is_right else 1


class _Bars:
    """A bar per phase on a terminal; nothing when stderr is piped."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<30}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, phase: str, part: float | None) -> None:
        if phase not in self._tasks:
            for task in self._tasks.values():
                self._progress.update(task, total=1.0, completed=1.0)
            self._tasks[phase] = self._progress.add_task(_PHASES[phase], total=None)
        if part is not None:
            self._progress.update(self._tasks[phase], total=1.0, completed=part)


def _rows(result: PagerDemoResult) -> list[tuple[str, str]]:
    counters, latency = result.stats["counters"], result.stats["latency"]["total"]
    pairs = "" if result.distinct_pairs is None else f", {result.distinct_pairs:,} of 65,536 16-bit words"
    share = result.commonest_byte_count / result.file_bytes
    peak = f"{format_size(result.peak_bytes)} of {format_size(result.budget_bytes)}"
    rows = [
        ("file", f"{result.file}, {format_size(result.file_bytes)}"),
        (
            "bytes",
            f"{result.distinct_bytes} of 256 values{pairs}; {share:.1%} are {result.commonest_byte:#04x}",
        ),
        ("sorted", f"{result.words:,} words of {result.word_bytes} bytes, in place"),
        ("time", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result.phase_s.items())),
        ("histogram equals the file's", _verdict(result.histogram_matches)),
        ("sorted output is in order", _verdict(result.is_sorted)),
        ("and holds the file's words", _verdict(result.same_words)),
        ("peak memory within the budget", f"{_verdict(result.kept_budget)}: {peak}"),
        ("faults", f"{counters['faults']:,}"),
        (
            "fault latency",
            f"p50 {latency['p50_ns'] / 1000:.1f} us, p99 {latency['p99_ns'] / 1000:.1f} us",
        ),
        ("units prefetched, and used", f"{counters['prefetch_installed']:,}, {counters['prefetch_hits']:,}"),
        ("units evicted clean, dirty", f"{counters['evicted_clean']:,}, {counters['evicted_dirty']:,}"),
    ]
    if result.budget_bytes >= 2 * result.file_bytes:
        rows.append(("note", "the budget holds both arrays, so nothing had to be evicted"))
    return rows


def _verdict(ok: bool) -> str:
    return "yes" if ok else "NO"


def _print(result: PagerDemoResult) -> None:
    rows = _rows(result)
    if not sys.stdout.isatty():
        width = max(len(label) for label, _ in rows)
        for label, value in rows:
            print(f"{label:<{width}}  {value}")
        return
    table = Table(title="A file under a memory budget", show_header=False, title_justify="left")
    for label, value in rows:
        style = "bold red" if value.startswith("NO") else "green" if value.startswith("yes") else ""
        table.add_row(label, value, style=style)
    Console().print(table)
