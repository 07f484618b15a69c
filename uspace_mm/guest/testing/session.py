"""What is known of a page size's tests across pytest processes: who ran, who runs, what is left."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from uspace_mm.guest.outcome import Exited, Killed, Outcome
from uspace_mm.guest.pagesize import PageSize
from uspace_mm.guest.testing.job import Limits
from uspace_mm.guest.testing.records import Record
from uspace_mm.guest.testing.results import CaseResult, SizeResult

if TYPE_CHECKING:
    from uspace_mm.guest.testing.size_run import Listener

STOPPED = "stopped"
# Exit statuses: of the reporter when its descriptor was closed, of the driver without pytest; pytest's own.
CLOSED, NO_PYTEST = 71, 72
INTERRUPTED, INTERNAL_ERROR = 2, 3
# How faulthandler's dump begins when a limit passed.
TIMEOUT_DUMP = "Timeout ("
_HARNESS_FRAME = re.compile(r'\s+File ".*/(_pytest/|pluggy/|umm_driver\.py)')


class Session:
    """Takes records and the ends of processes in, and keeps a :class:`SizeResult` up to date."""

    def __init__(self, size: PageSize, result: SizeResult, listener: Listener) -> None:
        self.over = False
        self.ignore: list[str] = []
        self.collected_at: float | None = None
        self._size = size
        self._result = result
        self._listener = listener
        self._running: dict[str, CaseResult] = {}
        self._collecting = ""
        self._begun = False
        self._ended: Record | None = None
        self._interrupt = ""
        self._maxfail = 0
        self._known = False
        self._warned: set[tuple[str, ...]] = set()
        # Files in whose collection a process ended, and how.
        self._died: dict[str, str] = {}

    def begin(self) -> None:
        """A new process starts."""
        self.collected_at = None
        self._running.clear()
        self._collecting = ""
        self._begun = False
        self._ended = None

    def left(self) -> list[str]:
        """Tests that were planned and have not finished, in order."""
        tests = self._result.tests
        return [i for i in self._result.planned if i not in tests or not tests[i].finished]

    def only(self, asked: Sequence[str] | None) -> tuple[str, ...] | None:
        """What the next process is to run."""
        if self._known:
            return tuple(self.left())
        return None if asked is None else tuple(asked)

    def take(self, record: Record) -> None:
        """One record of the running process."""
        kind = record["kind"]
        handler = getattr(self, f"_take_{kind.replace(' ', '_')}", None)
        try:
            if handler is not None:
                handler(record)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            # Whole, but not of the reporter's making. Said once, and it makes the run a failed one.
            problem = f"a record of kind {kind!r} makes no sense: does a test write to the report descriptor?"
            if problem not in self._result.problems:
                self._result.problems.append(problem)
            self._result.output += f"{error!r}\n"
            return
        self._listener.record(self._size, record)

    def _take_session(self, record: Record) -> None:
        self._begun = True
        self._maxfail = int(record.get("maxfail") or 0)
        self._result.versions = {
            name: str(record.get(name, "")) for name in ("python", "pytest", "kernel", "machine", "rootdir")
        }
        page_size = int(record.get("page_size") or 0)
        if page_size != self._size.bytes:
            self._result.problems.append(
                f"Python in the guest sees pages of {page_size} bytes, {self._size} was asked for"
            )

    def _take_collecting(self, record: Record) -> None:
        self._collecting = str(record["id"]) if record.get("file") else ""

    def _take_items(self, record: Record) -> None:
        self.collected_at = time.monotonic()
        self._collecting = ""
        if not self._known:
            self._known = True
            self._result.planned = [str(i) for i in record["ids"]]
            self._listener.planned(self._size, self._result.planned)
        self._listener.phase(self._size, "running")

    def _take_missing(self, record: Record) -> None:
        for nodeid in map(str, record["ids"]):
            reason = "pytest in the guest does not collect this test: is it collected on the host only?"
            if (file := nodeid.partition("::")[0]) in self.ignore:
                reason = f"its file could not be collected again: {self._died[file]}"
            result = CaseResult(nodeid, "error", reason=reason, details=[reason], finished=True)
            self._result.tests[nodeid] = result
            self._listener.finished(self._size, result)

    def _take_start(self, record: Record) -> None:
        nodeid = str(record["id"])
        self._running[nodeid] = self._result.tests[nodeid] = CaseResult(nodeid, started_s=time.monotonic())
        self._listener.started(self._size, nodeid)

    def _take_report(self, record: Record) -> None:
        report = record["report"]
        nodeid = str(report.get("nodeid") or "")
        result = self._result.tests.setdefault(nodeid, CaseResult(nodeid))
        result.add(record)
        if report.get("$report_type") == "CollectReport":
            result.finished = True
            self._listener.finished(self._size, result)

    def _take_finish(self, record: Record) -> None:
        result = self._running.pop(str(record["id"]), None)
        if result is not None:
            result.finished = True
            if not result.bad:
                result.output = []  # nobody asks for it, and it may be megabytes
            self._listener.finished(self._size, result)

    def _take_warning(self, record: Record) -> None:
        key = tuple(str(record.get(name)) for name in ("when", "id", "filename", "lineno", "message"))
        if key not in self._warned:  # a second process collects once more
            self._warned.add(key)
            self._result.warnings.append(record)

    def _take_interrupt(self, record: Record) -> None:
        name = str(record.get("name"))
        if name != "Interrupted":  # that is pytest itself: after errors in collection, or --maxfail
            name = "pytest.exit" if name == "Exit" else name
            self._interrupt = f"{name}: {record['text']}".rstrip(": ")
        elif not self._result.problems:
            self._result.problems.append(f"pytest stopped: {record['text']}")

    def _take_internal_error(self, record: Record) -> None:
        lines = str(record.get("text")).strip().splitlines() or [""]
        self._result.problems.append(f"INTERNALERROR in pytest: {lines[-1]}")
        self._result.output += str(record.get("text"))

    def _take_end(self, record: Record) -> None:
        self._ended = record

    def limit_s(self, limits: Limits) -> float:
        """For what is being done now: collecting, or a test."""
        return limits.test_s if self.collected_at else limits.collect_s

    def process_ended(self, outcome: Outcome, late: str, noise: str, limits: Limits) -> None:
        """The process (or its machine) is gone: name who ran, and decide whether anything is left to run.

        `late` says why the host ended it, when it did; `noise` is what came on the channel beside records.
        """
        if late == STOPPED:
            self.over = True
            self._result.problems.append("stopped before its end")
            for nodeid in self._running:  # neither passed nor failed
                del self._result.tests[nodeid]
            return
        if self._ended is not None:
            for result in self._running.values():
                if result.bad:  # xdist reports a worker that died, and the test it ran
                    result.finished = True
                else:
                    result.fail(self._interrupt or "the session ended while this test ran")
                self._listener.finished(self._size, result)
            self._session_ended(self._ended, outcome, late)
            return
        if isinstance(outcome, Exited) and not self._begun and not late:
            self.over = True
            self._result.pytest_status = outcome.status
            if outcome.status == NO_PYTEST:
                self._result.problems.append("the guest's Python has no pytest: add it with --pip pytest")
            elif outcome.status not in (0, 4):
                said = [line for line in self._result.output.splitlines() if line.strip()]
                why = f": {said[-1].strip()}" if said else ""
                self._result.problems.append(f"pytest did not start: it {outcome}{why}")
            return
        why = late or _reason(outcome, noise, self.limit_s(limits), self._collecting)
        noise = without_harness_frames(noise)
        if self._running:
            for result in self._running.values():
                result.fail(why, noise)
                self._listener.finished(self._size, result)
            self._running.clear()
        elif self._collecting:
            self._file_died(self._collecting, why, noise)
        else:
            where = "after the last test" if self._known and not self.left() else "outside any test"
            self._result.problems.append(f"{where}: {why}")
            self.over = not self._known
        if self._known and not self.left():
            self.over = True
        failures = sum(test.bad for test in self._result.tests.values())
        if self._maxfail and failures >= self._maxfail:
            self.over = True

    def _file_died(self, file: str, why: str, noise: str) -> None:
        """The process ended while it collected `file`; one that was collected before gets another try."""
        if file not in self._died and any(test.startswith(f"{file}::") for test in self._result.planned):
            self._died[file] = why
            return
        self._died[file] = why
        self.ignore.append(file)
        result = CaseResult(file, "error", reason=why, finished=True)
        result.details.append(f"{why}\n{noise}".rstrip())
        self._result.tests[file] = result
        self._listener.finished(self._size, result)

    def _session_ended(self, ended: Record, outcome: Outcome, late: str) -> None:
        self.over = True
        self._result.pytest_status = status = int(ended["status"])
        if self._interrupt:
            self._result.problems.append(f"the run was ended by a test: {self._interrupt}")
        elif late:
            self._result.problems.append(
                "pytest did not exit after its last test (a thread that is no daemon?)"
            )
        elif not isinstance(outcome, Exited):
            self._result.problems.append(f"after the last test: {outcome}")
        elif outcome.status != status:
            self._result.problems.append(
                f"after the last test: pytest's status is {status}, the process {outcome}"
            )

    def close(self) -> None:
        """No process will come any more: the rest was not run, unless pytest left it out (``-x``)."""
        stopped = self._ended is not None and self._ended.get("stopped") and not self._interrupt
        failures = sum(test.bad for test in self._result.tests.values())
        if not stopped and not (self._maxfail and failures >= self._maxfail):
            self._result.not_run = self.left()


def without_harness_frames(stacks: str) -> str:
    """faulthandler's dump without the frames that every test has."""
    return "\n".join(line for line in stacks.splitlines() if not _HARNESS_FRAME.match(line))


def _reason(outcome: Outcome, noise: str, limit_s: float, collecting: str) -> str:
    # A dump of threads that run may crash itself.
    if TIMEOUT_DUMP in noise and isinstance(outcome, (Exited, Killed)):
        return f"took more than {limit_s:g} s" + (" to import" if collecting else "")
    if isinstance(outcome, Killed):
        return f"the interpreter was {outcome}"
    if isinstance(outcome, Exited):
        if outcome.status == CLOSED:
            return "closed the descriptor that results are reported through"
        return f"ended the interpreter with exit status {outcome.status} (os._exit?)"
    return str(outcome)
