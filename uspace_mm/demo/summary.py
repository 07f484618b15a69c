"""The result of the postcopy demo for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from uspace_mm.demo.view import microseconds
from uspace_mm.sizes import format_size


def rows(result: dict[str, Any], frequent: list[tuple[str, int]]) -> list[tuple[str, str]]:
    """Name and value of each line of the summary."""
    size = result["pages_total"] * result["page_size"]
    lines = [
        (
            "memory",
            f"{format_size(size)}, {result['pages_total']:,} pages, {result['zero_pages']:,} of them zero",
        ),
        (
            "precopy",
            f"{result['rounds']} rounds, {result['precopy_pages']:,} pages; {result['missing_pages']:,} left",
        ),
        ("downtime", f"{result['downtime_ms']:.1f} ms (the work stopped here, until it ran there)"),
        ("last page", f"{result['last_page_ms']:.1f} ms after the work stopped"),
        ("whole migration", f"{result['total_s']:.2f} s, {format_size(result['bytes_sent'])} sent"),
        ("after the switch", f"{result['urgent_pages']:,} pages by fault, {result['bulk_pages']:,} streamed"),
        (
            "faults",
            f"{result['faults']:,}: p50 {microseconds(result['fault_p50_ns'])}, "
            f"p99 {microseconds(result['fault_p99_ns'])}, p99.9 {microseconds(result['fault_p999_ns'])}; "
            f"{result['faults_overtaken']:,} more met by the stream",
        ),
    ]
    if result["faults"]:
        slowest = (
            f"{microseconds(result['slowest_fault_ns'])}, longest stage: {result['slowest_fault_stage']}"
        )
        lines.append(("slowest fault", slowest))
    words = ", ".join(f"{word} {count:,}" for word, count in frequent)
    lines.append(
        ("work", f"{result['words']:,} words in {result['lines']:,} lines" + (f": {words}" if words else ""))
    )
    arrived = f"{result['pages_verified']:,} of {result['pages_total']:,} pages compared equal"
    if result["pages_mismatched"]:
        arrived += f", {result['pages_mismatched']:,} DIFFER"
    lines.append(
        (
            "every page arrived",
            ("yes: " if result["pages_verified"] == result["pages_total"] else "NO: ") + arrived,
        )
    )
    steps = (
        f"{result['work_steps_after_switch']} steps after the switch, repeated on the data that never moved"
    )
    lines.append(("same result", f"yes: {steps}" if result["work_matches"] else f"NO: {steps}, differ"))
    return lines


def print_summary(result: dict[str, Any], frequent: list[tuple[str, int]]) -> None:
    """Print the summary to stdout: wrapped to a terminal, in whole lines to a pipe."""
    console = Console()
    if not console.is_terminal:
        for name, value in rows(result, frequent):
            print(f"{name:<20}{value}")
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows(result, frequent):
        table.add_row(name, value)
    console.print(table)
