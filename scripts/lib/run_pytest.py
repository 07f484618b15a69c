"""Run pytest so that a crash loses nothing: every start and outcome goes to a record at once.

Usage: run_pytest.py RECORD [arguments of pytest]. Tests that the record already holds are left out, so that
a second call goes on after a crash. A test that hangs is ended by a watchdog in C: a Python timer would wait
for the GIL, which a thread that is blocked in a page fault keeps.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

TEST_LIMIT_S = float(os.environ.get("UMM_TEST_LIMIT_S", "120"))
SLOW_TEST_LIMIT_S = 5 * TEST_LIMIT_S


class Recorder:
    """The pytest plugin: one line of JSON per start and per outcome."""

    def __init__(self, path: str) -> None:
        self._done = {
            line["id"]
            for line in map(json.loads, Path(path).read_text().splitlines() if Path(path).exists() else [])
        }
        self._pid = os.getpid()
        self._record = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        # Kept from pytest's capture, which replaces descriptor 2.
        self._stderr = os.dup(2)

    def _write(self, test: str, outcome: str, reason: str = "") -> None:
        if os.getpid() == self._pid:  # a test that forks must not speak for its parent
            os.write(
                self._record, json.dumps({"id": test, "outcome": outcome, "reason": reason}).encode() + b"\n"
            )

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        rest = [item for item in items if item.nodeid not in self._done]
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self._done])
        items[:] = rest

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._write(report.nodeid, report.outcome, reason_of(report))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        limit = SLOW_TEST_LIMIT_S if item.get_closest_marker("slow") else TEST_LIMIT_S
        self._write(item.nodeid, "started")
        faulthandler.dump_traceback_later(limit, exit=True, file=self._stderr)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._write(item.nodeid, "finished")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._write(report.nodeid, report.outcome, reason_of(report))


def reason_of(report: pytest.CollectReport | pytest.TestReport) -> str:
    """Why a test was skipped, in one line."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return str(getattr(report, "wasxfail", ""))


def main(record: str, arguments: list[str]) -> int:
    return int(pytest.main(arguments, plugins=[Recorder(record)]))


if __name__ == "__main__":
    # A shell starts its background jobs with SIGINT ignored, and so would be all that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # pytest run as `python -m pytest` has the current directory here, not the directory of this file.
    sys.path[0] = str(Path.cwd())
    sys.exit(main(sys.argv[1], sys.argv[2:]))
