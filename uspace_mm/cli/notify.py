"""``uspace-mm notify``: what happens to the memory of a process, live, one line for each event."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from uspace_mm.cli._signals import termination_raises
from uspace_mm.errors import InputError
from uspace_mm.sizes import format_size

if TYPE_CHECKING:
    from uspace_mm.notifier import Event, Process

_PID = re.compile(r"[+-]?[0-9]+")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?")
_UNITS = {"ms": 1e-3, "s": 1.0, None: 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_S = 1e6
_PAUSE_S = 0.005  # between looks at what a command wrote
_POLL_S = 0.2  # so often the reader looks whether its time is over
_HEADINGS = ("time", "event", "source", "promise", "reason", "pid", "size", "range")
_ROW = "{:>9}  {:<7}  {:<8}  {:<7}  {:<10}  {:>7}  {:>10}  {}"


class Command:
    """Ends with status 0 when the process does, after --for or --count, and with Ctrl-C.

    A command that it started itself ends with it, and its exit status is ours; what it prints goes to
    standard error, as standard output is for the events.
    """

    name = "notify"
    help = "Print what happens to the memory of a process as it happens: mappings, pages, its end."

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        what = parser.add_mutually_exclusive_group(required=True)
        what.add_argument(
            "target", nargs="?", metavar="PID|COMMAND", help="watch this process, or run this command"
        )
        what.add_argument(
            "--demo", action="store_true", help="watch this process itself, which does something of each kind"
        )
        parser.add_argument(
            "arguments", nargs="*", metavar="ARGUMENT", help="the command's; -- before it ends our options"
        )
        parser.add_argument("--json", action="store_true", help="print each event as one line of JSON")
        parser.add_argument(
            "--interval",
            metavar="TIME",
            default="0.2s",
            help="how often to look at the process, e.g. 50ms, 0.2s (default)",
        )
        parser.add_argument("--for", dest="limit", metavar="TIME", help="end after this time, e.g. 10s, 5m")
        parser.add_argument("--count", type=int, metavar="N", help="end after N events")

    def run(self, args: argparse.Namespace) -> int:
        interval_s = parse_duration("--interval", args.interval)
        limit_s = math.inf if args.limit is None else parse_duration("--for", args.limit)
        if args.count is not None and args.count < 1:
            raise InputError(f"--count {args.count}: expected 1 or more")
        is_pid = args.target is not None and _PID.fullmatch(args.target) is not None
        if is_pid and args.arguments:
            raise InputError(f"{args.target} {args.arguments[0]}: expected one PID, or a command")
        printer = _Printer(args.json, math.inf if args.count is None else args.count, limit_s)
        try:
            with termination_raises():
                if args.demo:
                    _demo(printer)
                elif is_pid:
                    _watch(int(args.target), interval_s, printer)
                else:
                    return _run([args.target, *args.arguments], printer)
        except KeyboardInterrupt:
            return 0  # the usual end of watching
        except _Enough:
            return 0
        return 0


class _Enough(Exception):
    """As many events, or as much time, as was asked for."""


def parse_duration(name: str, text: str) -> float:
    """Seconds meant by `text`: digits with ``ms``, ``s`` (or nothing), ``m`` or ``h``; or InputError."""
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 1e-3 <= seconds <= _LONGEST_S:
        raise InputError(f"{name} {text!r}: expected a time of at least 1ms, e.g. 50ms, 0.2s, 5m")
    return seconds


class _Printer:
    """Prints events until there are enough of them, or the time is over."""

    def __init__(self, as_json: bool, count: float, limit_s: float) -> None:
        self._json = as_json
        self._left = count
        self._began = time.monotonic()
        self._limit_s = limit_s
        self._has_headings = as_json

    def begin(self) -> None:
        """There is something to watch."""
        if not self._has_headings:
            print(_ROW.format(*_HEADINGS).rstrip(), flush=True)
        self._has_headings = True

    @property
    def left_s(self) -> float:
        """Seconds until the time is over."""
        return self._limit_s - (time.monotonic() - self._began)

    def check_time(self) -> None:
        if self.left_s <= 0:
            raise _Enough

    def say(self, text: str) -> None:
        """What the events that follow come from."""
        print(json.dumps({"step": text}) if self._json else f"-- {text}", flush=True)

    def show(self, event: Event) -> None:
        from uspace_mm.notifier import Kind

        # Of what has no end that could be seen, start and end come together: one line for both.
        if event.kind is Kind.END and not event.ordered:
            return
        seconds = time.monotonic() - self._began
        if self._json:
            print(json.dumps({"time_s": round(seconds, 6)} | event.to_dict()), flush=True)
        else:
            print(self._row(event, seconds), flush=True)
        self._left -= 1
        if self._left <= 0:
            raise _Enough

    @staticmethod
    def _row(event: Event, seconds: float) -> str:
        kind = event.kind.name.lower() if event.ordered or event.kind.name == "RELEASE" else "change"
        where = "all of it" if event.everything else f"{event.start:#x}-{event.end:#x}"
        where += f" -> {event.to:#x}" if event.to is not None else ""
        where += f" failed, errno {event.error}" if event.error else ""
        size = "" if event.everything else format_size(event.length)
        words = [word.name.lower() for word in (event.source, event.promise, event.reason)]
        return _ROW.format(f"{seconds:.3f}", kind, *words, event.pid, size, where)


def _watch(pid: int, interval_s: float, printer: _Printer) -> None:
    from uspace_mm.notifier import NoProcess, Process, Reason

    ended: Reason | None = None
    while ended is not Reason.EXIT:  # another program in the same process is watched like the first
        try:
            process = Process(pid, interval_s=interval_s)
        except NoProcess:
            if ended is None:
                raise
            return
        with process:
            printer.begin()
            for limit in process.limits:
                print(f"uspace-mm notify: {limit}", file=sys.stderr)
            for event in _events_of(process, printer):
                printer.show(event)
            ended = process.ended


def _events_of(process: Process, printer: _Printer) -> Iterator[Event]:
    from uspace_mm.notifier import events

    with events(space=process, timeout_s=_POLL_S) as stream:
        while process.ended is None:
            yield from stream
            printer.check_time()
        yield from stream


def _run(command: list[str], printer: _Printer) -> int:
    """The command under the preloaded library: what it does is told before and after."""
    from uspace_mm.notifier.preload import Command as Preloaded

    with Preloaded(command, popen={"stdout": sys.stderr}) as program:
        printer.begin()
        while (status := program.process.poll()) is None:
            came = program.poll()
            for event in came:
                printer.show(event)
            printer.check_time()
            if not came:
                time.sleep(_PAUSE_S)
        for event in program:
            printer.show(event)
        if program.lost:
            print(f"uspace-mm notify: {program.lost} events came too fast and are lost", file=sys.stderr)
        if not program.processes:
            why = "it is linked statically, or runs with more rights than its caller"
            print(f"uspace-mm notify: nothing of {command[0]} was seen: {why}", file=sys.stderr)
    return status if status >= 0 else 128 - status


def _demo(printer: _Printer) -> None:
    from uspace_mm.demo import notify

    printer.begin()
    for step in notify.run():
        printer.say(step.text)
        for event in step.events:
            printer.show(event)
        printer.check_time()
