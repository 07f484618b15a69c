"""``uspace-mm demo postcopy``: a process at work moves to another process, and keeps working."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from uspace_mm.errors import InputError
from uspace_mm.sizes import parse_size

if TYPE_CHECKING:
    from uspace_mm.demo.options import Options

_MOST_ROUNDS = 1000


class Command:
    """Runs both sides on loopback, or one of them with --listen or --connect."""

    name = "postcopy"
    help = "Move a process's memory to another process while it works: precopy, the switch, faults over TCP."

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--size", default="512M", help="memory that moves, e.g. 512M (default), 2G")
        parser.add_argument(
            "--input",
            nargs="+",
            metavar="FILE",
            default=[],
            help="text to work on (default: Python's library)",
        )
        sides = parser.add_mutually_exclusive_group()
        sides.add_argument(
            "--listen", metavar="HOST:PORT", help="be the source; wait there for the destination"
        )
        sides.add_argument("--connect", metavar="HOST:PORT", help="be the destination of the source there")
        parser.add_argument("--rounds", type=int, default=5, help="most rounds of precopy (default 5)")
        parser.add_argument(
            "--downtime-goal",
            type=float,
            default=50.0,
            metavar="MS",
            help="switch once the rest would take no longer than this to send (default 50)",
        )
        parser.add_argument("--steps", type=int, default=100, help="least steps of work after the switch")
        parser.add_argument("--seed", type=int, default=1, help="order of the library's files (default 1)")
        parser.add_argument(
            "--timeout", type=float, default=10.0, metavar="S", help="silence that means a dead peer"
        )
        parser.add_argument(
            "--bulk-rate",
            metavar="SIZE",
            help="bytes per second of the background stream (default: no limit)",
        )
        parser.add_argument("--plot", metavar="FILE.png", help="write a picture of the migration")
        parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
        parser.add_argument("--pause-at", default="", help=argparse.SUPPRESS)

    def run(self, args: argparse.Namespace) -> int:
        # Not above: every command's parser is built at each start, and numpy and rich take their time.
        from uspace_mm.demo import destination, source, summary
        from uspace_mm.demo.plot import check_plot, plot
        from uspace_mm.demo.postcopy import run_both
        from uspace_mm.demo.view import View

        options = _options(args)
        picture = Path(args.plot) if args.plot else None
        if picture is not None:
            check_plot(picture)
        with View(announce=bool(args.listen)) as view:
            if args.listen:
                result = source.run(options, view.emit("source"))
            elif args.connect:
                result = destination.run(options, view.emit("destination"))
            else:
                result = run_both(options, view.show)
        details = view.details or {"timeline": view.source_timeline, "histogram": [], "frequent": []}
        if picture is not None:
            plot(picture, result, details["timeline"], details["histogram"])
        if args.json:
            print(json.dumps(result, indent=2))
        else:
            summary.print_summary(result, details["frequent"])
        return 0 if result["ok"] else 1


def _options(args: argparse.Namespace) -> Options:
    from uspace_mm.demo.options import Options, parse_address
    from uspace_mm.demo.work import Layout

    size = parse_size(args.size)
    Layout.of(size)
    if not 1 <= args.rounds <= _MOST_ROUNDS:
        raise InputError(f"--rounds {args.rounds}: expected 1 to {_MOST_ROUNDS}")
    if not 0 <= args.downtime_goal <= 1e6:
        raise InputError(f"--downtime-goal {args.downtime_goal}: expected milliseconds, 0 or more")
    if not 0.1 <= args.timeout <= 3600:
        raise InputError(f"--timeout {args.timeout}: expected seconds, 0.1 to 3600")
    if not 1 <= args.steps <= 100_000:
        raise InputError(f"--steps {args.steps}: expected 1 to 100000")
    host, port = parse_address(args.listen or args.connect or "127.0.0.1:0")
    if args.connect and not port:
        raise InputError(f"--connect {args.connect}: give the port that the source printed or was given")
    options = Options(
        size=size,
        input=[str(Path(name).absolute()) for name in args.input],
        rounds=args.rounds,
        downtime_goal_s=args.downtime_goal / 1e3,
        seed=args.seed,
        steps=args.steps,
        timeout_s=args.timeout,
        accept_s=600.0 if args.listen else max(args.timeout, 30.0),
        bulk_bytes_per_s=parse_size(args.bulk_rate) if args.bulk_rate else 0,
        host=host,
        port=port,
        pause_at=args.pause_at,
    )
    options.check_pause()
    return options
