"""Results while they come: a line per test and page size in a pipe, a line per test on a terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import TextIO

from uspace_mm.guest.pagesize import PageSize
from uspace_mm.guest.testing.results import CaseResult
from uspace_mm.guest.testing.size_run import Listener

_MARKS = {"passed": "\x1b[32m", "xfailed": "\x1b[33m", "skipped": "\x1b[33m", "xpassed": "\x1b[33m"}
_RED, _PLAIN, _CLEAR = "\x1b[31m", "\x1b[0m", "\r\x1b[K"


class Lines(Listener):
    """For pipes and logs: ``16k  passed   tests/test_a.py::test_b  0.12 s``."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._lock = threading.Lock()

    def finished(self, size: PageSize, result: CaseResult) -> None:
        reason = f"  ({_one_line(result.reason)})" if result.reason else ""
        with self._lock:
            name = printable(result.id)
            self._out.write(f"{size.name:<4} {result.status:<8} {name}  {result.duration_s:.2f} s{reason}\n")
            self._out.flush()


class Terminal(Listener):
    """A line per test once every page size has it, and below them one that says what each guest does."""

    def __init__(self, sizes: Sequence[PageSize], out: TextIO | None = None, width: int = 100) -> None:
        self._out = out or sys.stdout
        self._width = width
        self._lock = threading.Lock()
        self._names = [size.name for size in sizes]
        self._doing = dict.fromkeys(self._names, "waiting")
        self._planned: dict[str, set[str]] = {}
        self._done: dict[str, dict[str, str]] = {}
        self._counts = dict.fromkeys(self._names, 0)
        self._over: set[str] = set()

    def phase(self, size: PageSize, what: str) -> None:
        with self._lock:
            self._doing[size.name] = what
            if what == "done":
                self._over.add(size.name)
            self._show(self._ready())

    def planned(self, size: PageSize, ids: list[str]) -> None:
        with self._lock:
            self._planned[size.name] = set(ids)

    def started(self, size: PageSize, test: str) -> None:
        with self._lock:
            total = len(self._planned.get(size.name, ()))
            self._doing[size.name] = f"{self._counts[size.name] + 1}/{total} {test.rpartition('::')[2]}"
            self._show([])

    def finished(self, size: PageSize, result: CaseResult) -> None:
        with self._lock:
            self._counts[size.name] += 1
            self._done.setdefault(result.id, {})[size.name] = result.status
            self._show(self._ready([result.id]))

    def _ready(self, tests: Sequence[str] | None = None) -> list[str]:
        """Tests that no other page size will still report, taken out of the waiting ones."""
        ready = []
        for test in list(self._done) if tests is None else tests:
            missing = [
                name
                for name in self._names
                if name not in self._done[test]
                and name not in self._over
                and (name not in self._planned or test in self._planned[name])
            ]
            if not missing:
                ready.append(self._line(test, self._done.pop(test)))
        return ready

    def _line(self, test: str, found: dict[str, str]) -> str:
        cells = [
            f"{_MARKS.get(found.get(name, '-'), _RED)}{name} {found.get(name, '-')}{_PLAIN}"
            for name in self._names
        ]
        return f"{printable(test)}  {'  '.join(cells)}"

    def _show(self, lines: list[str]) -> None:
        for line in lines:
            self._out.write(f"{_CLEAR}{line}\n")
        if len(self._over) < len(self._names):
            share = max(12, self._width // len(self._names) - 2)
            doing = (printable(f"{name} {what}")[:share].ljust(share) for name, what in self._doing.items())
            self._out.write(f"{_CLEAR}{'  '.join(doing)[: self._width]}")
        else:
            self._out.write(_CLEAR)
        self._out.flush()

    def close(self) -> None:
        """Take the line of what is being done away."""
        with self._lock:
            self._out.write(_CLEAR)
            self._out.flush()


def printable(text: str) -> str:
    """`text` with escapes for control characters and lone surrogates, which terminals cannot take."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _one_line(text: str) -> str:
    return printable(text if len(text) <= 120 else f"{text[:117]}...")
