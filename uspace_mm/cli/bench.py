"""``uspace-mm bench [NAME]``: run one benchmark or all, and hold their ratios against the targets."""

from __future__ import annotations

import argparse
import json
import sys

from uspace_mm.bench import BENCHMARKS, BenchOptions, BenchReport, load
from uspace_mm.errors import InputError, UnsupportedError


class Command:
    """Lists the benchmarks, or runs them."""

    name = "bench"
    help = "Measure the pager against floors and peers in the same run."

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("bench", nargs="?", metavar="NAME", help="a benchmark, or `all`; none: list them")
        parser.add_argument("--json", action="store_true", help="print a JSON object (`all`: a list of them)")
        parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
        parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
        parser.add_argument("--rounds", type=int, metavar="N", help="how often each contender runs")

    def run(self, args: argparse.Namespace) -> int:
        if args.bench is None:
            return _list(args.json)
        if args.bench != "all" and args.bench not in BENCHMARKS:
            known = ", ".join(BENCHMARKS)
            raise InputError(f"benchmark {args.bench!r}: not known; there are {known}, and `all`")
        if args.rounds is not None and args.rounds < 1:
            raise InputError(f"--rounds {args.rounds}: must be at least 1")
        progress = _Progress()
        options = BenchOptions(quick=args.quick, rounds=args.rounds, progress=progress.show)
        if args.bench != "all":
            try:
                reports = [load(args.bench).run(options)]
            finally:
                progress.clear()
            _print(reports, as_json=args.json, as_list=False)
            unable = False
        else:
            reports, unable = _run_all(options, progress)
            _print(reports, as_json=args.json, as_list=True)
        if args.check and any(report.missed() for report in reports):
            return 1
        return UnsupportedError.exit_status if unable else 0


def _list(as_json: bool) -> int:
    helps = {name: load(name).HELP for name in BENCHMARKS}
    if as_json:
        print(json.dumps(helps, indent=2))
    else:
        for name, text in helps.items():
            print(f"{name:<10} {text}")
    return 0


def _run_all(options: BenchOptions, progress: _Progress) -> tuple[list[BenchReport], bool]:
    """Every report that could be had, and whether a benchmark cannot run here."""
    reports: list[BenchReport] = []
    unable = False
    for name in BENCHMARKS:
        try:
            reports.append(load(name).run(options))
        except UnsupportedError as error:
            progress.clear()
            print(f"uspace-mm bench {name}: {error}", file=sys.stderr)
            unable = True
    progress.clear()
    return reports, unable


def _print(reports: list[BenchReport], *, as_json: bool, as_list: bool) -> None:
    if as_json:
        records = [report.to_dict() for report in reports]
        print(json.dumps(records if as_list else records[0], indent=2))
    else:
        print("\n\n".join(report.to_text() for report in reports))


class _Progress:
    """One line on a terminal that overwrites itself; silent when stderr is no terminal."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()

    def show(self, text: str) -> None:
        if self._live:
            sys.stderr.write(f"\r\033[K{text}")
            sys.stderr.flush()

    def clear(self) -> None:
        if self._live:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
