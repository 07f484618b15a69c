"""What a test run on one page size came to: built from the records, test by test."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal, get_args

from uspace_mm.guest.testing.records import Record

Status = Literal["failed", "error", "xpassed", "xfailed", "skipped", "passed"]
# A test has several reports (set-up, call, tear-down, subtests): the first of these that one of them has is
# its own.
RANKS: tuple[Status, ...] = get_args(Status)
BAD: frozenset[Status] = frozenset({"failed", "error"})


@dataclass
class CaseResult:
    """One test, or one file that could not be collected.

    ``reason`` is one line (why it failed, was skipped, was expected to fail), ``details`` what pytest prints
    about a failure, ``output`` what it captured, as pairs of heading and text. ``duration_s`` is set-up, call
    and tear-down.
    """

    id: str
    status: Status = "passed"
    duration_s: float = 0.0
    reason: str = ""
    details: list[str] = field(default_factory=list)
    output: list[tuple[str, str]] = field(default_factory=list)
    finished: bool = False
    # By time.monotonic(), on the host.
    started_s: float = 0.0

    @property
    def bad(self) -> bool:
        return self.status in BAD

    def add(self, record: Record) -> None:
        """Take a ``report`` record in."""
        report = record["report"]
        text = str(record.get("text") or "")
        status = _status(record)
        self.duration_s += float(report.get("duration") or 0)
        self.output = [(str(name), str(content)) for name, content in report.get("sections", ())]
        if status is None:
            return
        if status in BAD:
            self.details.append(text)
        if RANKS.index(status) < RANKS.index(self.status):
            self.status = status
            self.reason = _reason(report, text)

    def fail(self, reason: str, details: str = "") -> None:
        """The test did not live to report: `reason` says what happened to it."""
        self.status = "failed"
        if self.started_s:
            self.duration_s = time.monotonic() - self.started_s
        self.reason = reason
        self.details.append(f"{reason}\n{details}".rstrip())
        self.finished = True


@dataclass
class Timings:
    """Seconds: until the guest ran commands, until pytest had its tests, until it ended, and all of it."""

    boot_s: float = 0.0
    collection_s: float = 0.0
    tests_s: float = 0.0
    total_s: float = 0.0


@dataclass
class SizeResult:
    """All of one page size. ``problems`` are lines: harness outcomes, what kept tests from running."""

    size: str
    page_size_bytes: int = 0
    tests: dict[str, CaseResult] = field(default_factory=dict)
    planned: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[Record] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)
    boots: int = 0
    pytest_status: int | None = None
    output: str = ""

    @property
    def counts(self) -> dict[Status, int]:
        """How many tests have each status; only those that occur, worst first."""
        found = [test.status for test in self.tests.values()]
        return {status: found.count(status) for status in RANKS if status in found}

    @property
    def exit_status(self) -> int:
        """0 when tests ran and none was bad, 2 when pytest refused its arguments, else 1."""
        if self.pytest_status == 4 and not self.tests:
            return 2
        clean = self.tests and not self.problems and not self.not_run
        return 0 if clean and not any(test.bad for test in self.tests.values()) else 1


def _status(record: Record) -> Status | None:
    """The status that the project's pytest gives a report; None where a phase says nothing about the test."""
    report = record["report"]
    category = str(record.get("category") or "")
    outcome = str(report.get("outcome") or "")
    if report.get("$report_type") == "CollectReport":
        return "skipped" if outcome == "skipped" else "error"
    for status in RANKS:
        if category == status:
            return status
    if outcome == "failed":  # a category of a plugin's own: a subtest, a rerun
        return None if category == "rerun" else "failed"
    return "skipped" if outcome == "skipped" and report.get("when") != "teardown" else None


def _reason(report: Record, text: str) -> str:
    """One line: why."""
    expected = report.get("wasxfail")
    if expected is not None:
        return str(expected).removeprefix("reason: ")
    represented = report.get("longrepr")
    if isinstance(represented, (list, tuple)) and len(represented) == 3:
        return str(represented[2]).removeprefix("Skipped: ")
    if isinstance(represented, dict):
        crash = represented.get("reprcrash") or {}
        message = str(crash.get("message") or "")
        if message:
            return message.splitlines()[0]
    errors = [line for line in text.splitlines() if line.startswith("E  ")]
    return (errors or text.strip().splitlines() or [""])[-1].removeprefix("E").strip()
