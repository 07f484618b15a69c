"""``uspace-mm doctor``: what this kernel has and this user may use, and what the lack of it costs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from uspace_mm.kernel.features import Probe, Verdict, pager_verdict, probe_all
from uspace_mm.kernel.proc import allowed_cpus, page_size, pmd_size
from uspace_mm.sizes import format_size

_HEADINGS = ("feature", "here", "found out by", "used for", "without it")
_WIDE = 140  # columns of a terminal from which on all five fit
_LONG_CELL = 64


class Command:
    """Exit status 0 when the pager works, 3 with the remedy on stderr when it cannot."""

    name = "doctor"
    help = "Show which kernel features are here, how that was found out, and what replaces those that lack"

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="print JSON instead of a table")

    def run(self, args: argparse.Namespace) -> int:
        verdict = pager_verdict()
        probes = probe_all()
        if args.json:
            print(json.dumps(report(verdict, probes), indent=2))
        elif sys.stdout.isatty():
            print_table(verdict, probes)
        else:
            print_plain(verdict, probes)
        sys.stdout.flush()
        if not verdict.works:
            print(f"uspace-mm doctor: {verdict.remedy}", file=sys.stderr)
            return 3
        return 0


def machine() -> dict[str, object]:
    """The facts that the findings depend on."""
    system = os.uname()
    return {
        "kernel": system.release,
        "architecture": system.machine,
        "page_size": page_size(),
        "pmd_size": pmd_size(),
        "cpus": len(allowed_cpus()),
        "uid": os.geteuid(),
    }


def report(verdict: Verdict, probes: list[Probe]) -> dict[str, object]:
    """What ``--json`` prints."""
    return {
        "machine": machine(),
        "pager": {
            "works": verdict.works,
            "source": verdict.source.name.lower() if verdict.source is not None else None,
            "remedy": verdict.remedy,
        },
        "features": [asdict(probe) for probe in probes],
    }


def summary(verdict: Verdict, probes: list[Probe]) -> list[str]:
    """The lines below the table."""
    facts = machine()
    pmd = facts["pmd_size"]
    huge = f"huge pages of {format_size(pmd)}" if isinstance(pmd, int) else "no huge pages"
    lines = [
        f"Linux {facts['kernel']} on {facts['architecture']}, pages of {format_size(page_size())}, {huge}, "
        f"{facts['cpus']} CPUs, uid {facts['uid']}",
        f"{sum(probe.present for probe in probes)} of {len(probes)} features are here",
    ]
    if verdict.works:
        lines.append("the pager works here" + (f", but {verdict.remedy}" if verdict.remedy else ""))
    else:
        lines.append(f"the pager cannot work here: {verdict.remedy}")
    return lines


def print_table(verdict: Verdict, probes: list[Probe]) -> None:
    """For a terminal: cells are wrapped to its width; on a narrow one the last three columns share one."""
    console = Console()
    wide = console.width >= _WIDE
    table = Table(show_lines=not wide)
    headings = _HEADINGS if wide else (*_HEADINGS[:2], "found out by / used for / without it")
    for number, heading in enumerate(headings):
        table.add_column(heading, no_wrap=number < 2)
    for probe in probes:
        name = Text(probe.name, style="" if probe.present else "bold")
        here = Text("yes", style="green") if probe.present else Text("no", style="red")
        cells = [probe.how, f"for: {probe.used_for}", f"without: {probe.instead}"]
        if wide:
            table.add_row(name, here, Text(probe.how), Text(probe.used_for), Text(probe.instead))
        else:
            table.add_row(name, here, Text("\n".join(cells)))
    console.print(table)
    for line in summary(verdict, probes):
        console.print(line, markup=False, highlight=False)


def print_plain(verdict: Verdict, probes: list[Probe]) -> None:
    """For a pipe: one line per feature, columns aligned and parted by two spaces or more, never wrapped."""
    rows = [_HEADINGS]
    rows += [(p.name, "yes" if p.present else "no", p.how, p.used_for, p.instead) for p in probes]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    # One long error message must not push the columns of all other lines out of sight.
    widths += [max(len(row[column]) for row in rows if len(row[column]) <= _LONG_CELL) for column in (2, 3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[4]]).rstrip())
    print()
    for line in summary(verdict, probes):
        print(line)
