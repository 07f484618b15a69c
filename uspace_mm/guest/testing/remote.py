"""Items of a pytest session on the host whose tests run in guests, one boot for all of a page size."""

from __future__ import annotations

import importlib
import re
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest

from uspace_mm.errors import UspaceError
from uspace_mm.guest.pagesize import PageSize, parse_page_size
from uspace_mm.guest.testing.job import Job
from uspace_mm.guest.testing.machine import Boot, Machine
from uspace_mm.guest.testing.records import Record
from uspace_mm.guest.testing.results import CaseResult
from uspace_mm.guest.testing.size_run import Listener, SizeRun

# The name in a line of faulthandler's stacks.
_STACK_FILE = re.compile(r'(?<=^  File ")[^"]+', re.MULTILINE)
# A session that ran all its tests waits so long for the guests' pytest to end.
ENDING_S = 20.0


class Wanted(NamedTuple):
    """An item, the page size it is for, and its name in the guest."""

    item: pytest.Item
    size: str
    name: str

    @property
    def guest_id(self) -> str:
        parent = self.item.parent
        assert parent is not None
        return f"{parent.nodeid}::{self.name}"


@dataclass
class Ready:
    """What makes guests for a session: built once, before the first of them."""

    boot: Boot
    job: Callable[[Sequence[Wanted]], Job]
    parallel: int
    # Paths of the guest in reports, as the host has them.
    on_host: Callable[[str], str]
    close: Callable[[], None]


@dataclass
class _Case:
    records: list[Record] = field(default_factory=list)
    result: CaseResult | None = None


class _Size(Listener):
    """One page size: its run in a thread, and what it has reported so far."""

    def __init__(self, size: PageSize, changed: threading.Condition, print_output: bool) -> None:
        self.size = size
        self.cases: dict[str, _Case] = defaultdict(_Case)
        self.warnings: list[Record] = []
        self.ended = ""
        self.machine: Machine | None = None
        self.thread: threading.Thread | None = None
        self.run: SizeRun | None = None
        self._changed = changed
        self._print = print_output

    def record(self, size: PageSize, record: Record) -> None:
        with self._changed:
            if record["kind"] == "report":
                self.cases[str(record["report"].get("nodeid"))].records.append(record)
            elif record["kind"] == "warning" and record.get("when") == "runtest":
                self.warnings.append(record)

    def finished(self, size: PageSize, result: CaseResult) -> None:
        with self._changed:
            self.cases[result.id].result = result
            self._changed.notify_all()

    def output(self, size: PageSize, data: bytes) -> None:
        if self._print:  # -s
            print(data.decode(errors="replace"), end="", flush=True)

    def start(self, boot: Boot, job: Job, gate: threading.Semaphore, keep: bool) -> None:
        self.ended = ""
        self.run = SizeRun(self.size, boot, job, self, machine=self.machine, keep=keep)
        self.thread = threading.Thread(
            target=self._go, args=(self.run, gate), name=f"umm-guest-{self.size}", daemon=True
        )
        self.thread.start()

    def _go(self, run: SizeRun, gate: threading.Semaphore) -> None:
        try:
            with gate:
                result = run.go()
            why = (
                "; ".join(result.problems)
                or result.output.strip()[-2000:]
                or "pytest in the guest left it out"
            )
        except UspaceError as error:
            why = str(error)
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"
        with self._changed:
            self.machine = run.machine
            self.ended = why
            self._changed.notify_all()


class Remote:
    """The guests of a session. Under xdist each worker has its own, and runs item after item."""

    def __init__(self, config: pytest.Config, wanted: Sequence[Wanted], ready: Ready | None = None) -> None:
        self._config = config
        self._wanted = {id(want.item): want for want in wanted}
        self._one_by_one = hasattr(config, "workerinput")
        self._changed = threading.Condition()
        self._ready = ready
        self._failure = ""
        show = config.option.capture == "no"
        names = dict.fromkeys(want.size for want in wanted)
        self._sizes = {name: _Size(parse_page_size(name), self._changed, show) for name in names}
        self._started = False

    def _start(self) -> None:
        self._started = True
        try:
            if self._ready is None:
                from uspace_mm.guest.testing.prepare import for_session

                self._ready = for_session(self._config, [size.size for size in self._sizes.values()])
            self._gate = threading.Semaphore(self._ready.parallel)
            if not self._one_by_one:
                for name, size in self._sizes.items():
                    mine = [want for want in self._wanted.values() if want.size == name]
                    size.start(self._ready.boot, self._ready.job(mine), self._gate, keep=False)
        except UspaceError as error:
            self._failure = str(error)

    def run(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """pytest_runtest_protocol of an item: its reports as they come from the guest."""
        want = self._wanted[id(item)]
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        if not self._started:
            self._start()
        for report in self._reports(want):
            hook.pytest_runtest_logreport(report=report)
        # Fixtures of earlier items of this machine end here, where the next item does not need them.
        call = pytest.CallInfo.from_call(
            lambda: item.session._setupstate.teardown_exact(nextitem),
            when="teardown",
            reraise=(pytest.exit.Exception, KeyboardInterrupt),
        )
        if call.excinfo:
            hook.pytest_runtest_logreport(report=hook.pytest_runtest_makereport(item=item, call=call))
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def _reports(self, want: Wanted) -> list[pytest.TestReport]:
        if self._failure:
            return [self._error(want, self._failure)]
        assert self._ready is not None
        size = self._sizes[want.size]
        guest_id = want.guest_id
        if self._one_by_one:
            size.cases.pop(guest_id, None)
            size.start(self._ready.boot, self._ready.job([want]), self._gate, keep=True)
        with self._changed:
            while size.cases[guest_id].result is None and not size.ended:
                self._changed.wait(1.0)  # with a limit, so that an interrupt gets through
            case = size.cases.pop(guest_id)
        if self._one_by_one and size.thread is not None:
            size.thread.join()
        if case.result is None:
            return [self._error(want, f"guest {want.size}: {size.ended}")]
        reports = [self._report(record, want) for record in case.records]
        if not any(report.failed for report in reports) and case.result.bad:
            text = "\n\n".join(case.result.details) or case.result.reason
            on_host = self._ready.on_host
            text = _STACK_FILE.sub(lambda match: on_host(match[0]), text)
            reports.append(self._failed(want, f"guest {want.size}: {text}", case.result))
        return reports

    def _report(self, record: Record, want: Wanted) -> pytest.TestReport:
        assert self._ready is not None
        data: dict[str, Any] = dict(record["report"])
        item = want.item
        data["longrepr"] = _mapped(data.get("longrepr"), self._ready.on_host)
        data["nodeid"], data["location"] = item.nodeid, item.location
        data["keywords"] = {**data.get("keywords", {}), **dict.fromkeys(item.keywords, 1)}
        properties = [tuple(pair) for pair in data.get("user_properties") or ()]
        data["user_properties"] = [*properties, ("page_size", want.size)]
        data["sections"] = [tuple(section) for section in data["sections"]]
        if isinstance(data["longrepr"], list):
            data["longrepr"] = tuple(data["longrepr"])
        report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
        assert isinstance(report, pytest.TestReport)
        return report

    def _error(self, want: Wanted, why: str) -> pytest.TestReport:
        return self._made(want, "setup", why, 0.0, [])

    def _failed(self, want: Wanted, why: str, result: CaseResult) -> pytest.TestReport:
        when = "setup" if result.status == "error" else "call"
        return self._made(want, when, why, result.duration_s, result.output)

    def _made(
        self, want: Wanted, when: Any, why: str, duration_s: float, output: list[tuple[str, str]]
    ) -> pytest.TestReport:
        item = want.item
        return pytest.TestReport(
            item.nodeid,
            item.location,
            dict.fromkeys(item.keywords, 1),
            "failed",
            why,
            when,
            output,
            duration_s,
            user_properties=[("page_size", want.size)],
        )

    def _warn(self, record: Record, nodeid: str) -> None:
        category: type[Warning] = UserWarning
        try:
            found = getattr(importlib.import_module(str(record["module"])), str(record["category"]))
            if isinstance(found, type) and issubclass(found, Warning):
                category = found
        except (ImportError, AttributeError):
            pass  # a class that only the guest can import
        assert self._ready is not None
        filename = self._ready.on_host(str(record["filename"]))
        message = warnings.WarningMessage(
            category(str(record["message"])), category, filename, int(record["lineno"])
        )
        self._config.hook.pytest_warning_recorded.call_historic(
            kwargs={
                "warning_message": message,
                "when": "runtest",
                "nodeid": nodeid,
                "location": None,
            }
        )

    def close(self, *, ended_early: bool) -> None:
        """End all guests, and hand on their warnings, which pytest gives out after a test's reports.

        A session that ran all its tests gives the guests a moment to end by themselves.
        """
        patience = time.monotonic() + (0.0 if ended_early or self._failure else ENDING_S)
        for size in self._sizes.values():
            if size.run is not None and size.thread is not None:
                size.thread.join(max(0.0, patience - time.monotonic()))
                size.run.stop()
                size.thread.join()
            if size.machine is not None:
                size.machine.close()
        for name, size in self._sizes.items():
            nodes = {want.guest_id: want.item.nodeid for want in self._wanted.values() if want.size == name}
            for record in size.warnings:
                self._warn(record, nodes.get(str(record.get("id")), ""))
            for problem in size.run.result.problems if size.run is not None else ():
                about = {"message": f"guest {name}: {problem}", "filename": __file__, "lineno": 0}
                self._warn({**about, "module": "pytest", "category": "PytestWarning"}, "")
        if self._ready is not None:
            self._ready.close()


def _mapped(value: Any, on_host: Callable[[str], str]) -> Any:
    """Paths within a serialised traceback, skip location or text."""
    if isinstance(value, dict):
        return {
            key: on_host(part) if key == "path" and isinstance(part, str) else _mapped(part, on_host)
            for key, part in value.items()
        }
    if isinstance(value, list):
        if len(value) == 3 and isinstance(value[0], str) and isinstance(value[1], int):
            return [on_host(value[0]), value[1], value[2]]
        return [_mapped(part, on_host) for part in value]
    return value
