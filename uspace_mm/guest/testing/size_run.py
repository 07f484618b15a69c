"""One page size: boots, runs pytest, and goes on after tests that took the interpreter or the guest down.

    boot -> pytest process -> records ... -> end of session       all done
                 |                 |
                 |                 +-> process died   -> the test that ran failed; a new process for the rest
                 +-> deadline passed, or guest died   -> the test that ran failed; a new boot for the rest

The number of processes and boots is bounded; tests that are left then are named as not run.
"""

from __future__ import annotations

import queue
import threading
import time
from contextlib import suppress
from pathlib import Path

from uspace_mm.errors import UspaceError
from uspace_mm.guest.outcome import ChannelLost, HarnessOutcome, Outcome, Panicked
from uspace_mm.guest.pagesize import PageSize
from uspace_mm.guest.testing import session
from uspace_mm.guest.testing.job import Job, join
from uspace_mm.guest.testing.machine import Boot, BootFailed, Machine
from uspace_mm.guest.testing.records import Decoder
from uspace_mm.guest.testing.results import CaseResult, SizeResult

# Kept of what pytest prints, for the case that it does not even start.
OUTPUT_MAX = 64 << 10
# A process that does not end within that after its machine was closed is a bug of the harness; it is left
# behind.
CLOSE_S = 30.0

DRIVER = "umm_driver.py"
REPORTER = "umm_reporter.py"
SOURCES = {DRIVER: Path(__file__).with_name("driver.py"), REPORTER: Path(__file__).with_name("reporter.py")}


class Listener:
    """Told what happens while it happens, from the run's own thread; the base does nothing."""

    def phase(self, size: PageSize, what: str) -> None:
        """``booting``, ``collecting``, ``running``, ``done``."""

    def planned(self, size: PageSize, ids: list[str]) -> None:
        """The tests that will run, once they are known."""

    def started(self, size: PageSize, test: str) -> None: ...

    def record(self, size: PageSize, record: dict[str, object]) -> None:
        """Every record as it came."""

    def finished(self, size: PageSize, result: CaseResult) -> None: ...

    def output(self, size: PageSize, data: bytes) -> None:
        """What the command wrote to its stdout or stderr."""


class SizeRun:
    """Runs one job on one page size; `go` once.

    It begins with `machine` where one is given. With `keep` the last one is left running as :attr:`machine`,
    unless it is gone; the caller closes it.
    """

    def __init__(
        self,
        size: PageSize,
        boot: Boot,
        job: Job,
        listener: Listener,
        *,
        machine: Machine | None = None,
        keep: bool = False,
    ) -> None:
        self.size = size
        self.machine = machine
        self._keep = keep
        self.result = SizeResult(size.name)
        self._boot = boot
        self._job = job
        self._listener = listener
        self._events: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._session = session.Session(size, self.result, listener)

    def stop(self) -> None:
        """End it soon, from any thread; what has not run is listed as not run."""
        self._stopped.set()
        self._events.put(("stop", None))

    def go(self) -> SizeResult:
        """Run to the end. Raises what keeps a guest from being made at all (:class:`UspaceError`)."""
        started = time.monotonic()
        deadline = started + self._job.limits.total_s
        limits = self._job.limits
        processes = 0
        try:
            while not (self._session.over or self._stopped.is_set()) and self.result.boots < limits.boots:
                machine = self.machine or self._boot_one()
                if machine is None:
                    break
                self.machine = None
                intact = True
                try:
                    while intact and not self._session.over and processes < limits.processes:
                        processes += 1
                        intact = self._process(machine, deadline)
                except BaseException:
                    intact = False
                    raise
                finally:
                    if intact and self._keep:
                        self.machine = machine
                    else:
                        machine.close()
                if processes >= limits.processes:
                    break
            if not self._session.over and not self._stopped.is_set() and not self.result.problems:
                self.result.problems.append(
                    f"gave up after {self.result.boots} boots and {processes} pytest processes"
                )
        finally:
            self._session.close()
            self.result.timings.total_s = time.monotonic() - started
            self._listener.phase(self.size, "done")
        return self.result

    def _boot_one(self) -> Machine | None:
        self._listener.phase(self.size, "booting")
        started = time.monotonic()
        self.result.boots += 1
        try:
            machine = self._boot(self.size)
        except BootFailed as error:
            self.result.problems.append(str(error))
            self.result.output += error.console
            return None
        self.result.timings.boot_s += time.monotonic() - started
        if machine.page_size_bytes != self.size.bytes:
            machine.close()
            raise UspaceError(
                f"the guest has pages of {machine.page_size_bytes} bytes, {self.size} was asked for: "
                "give a kernel of that page size"
            )
        self.result.page_size_bytes = machine.page_size_bytes
        return machine

    def _process(self, machine: Machine, deadline: float) -> bool:
        """One pytest process; returns whether the machine is still of use."""
        decoder = Decoder()
        state = self._session
        state.begin()
        self._events = queue.SimpleQueue()  # what a process that was given up still says is nobody's
        self._listener.phase(self.size, "collecting")
        began = time.monotonic()
        limits = self._job.limits
        thread = threading.Thread(
            target=self._run, args=(machine, self._events), name=f"umm-tests-{self.size}", daemon=True
        )
        thread.start()
        last = began
        outcome: Outcome | None = None
        intact = True
        reason = ""
        while outcome is None:
            until = min(last + state.limit_s(limits) + limits.grace_s, deadline)
            try:
                if self._stopped.is_set():
                    raise queue.Empty
                what, value = self._events.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                reason = self._why_late(machine, deadline)
                if time.monotonic() >= deadline:
                    state.over = True
                machine.close()
                intact = False
                thread.join(CLOSE_S)
                outcome = ChannelLost(reason)
                break
            if what == "report" and isinstance(value, bytes):
                records = decoder.feed(value)
                for record in records:
                    state.take(record)
                if records:
                    last = time.monotonic()
            elif what == "output" and isinstance(value, bytes):
                self._listener.output(self.size, value)
                self.result.output = (self.result.output + value.decode(errors="replace"))[-OUTPUT_MAX:]
            elif what == "end":
                if isinstance(value, BaseException):
                    raise value
                assert isinstance(value, Outcome)
                outcome = value
        self._drain(decoder)
        decoder.end()
        noise = decoder.take_noise()
        if isinstance(outcome, HarnessOutcome):
            intact = False
        if isinstance(outcome, Panicked):
            noise = f"{noise}\n{outcome.oops}"
        state.process_ended(outcome, reason, noise, limits)
        self.result.timings.collection_s += (state.collected_at or time.monotonic()) - began
        if state.collected_at:
            self.result.timings.tests_s += time.monotonic() - state.collected_at
        return intact

    def _drain(self, decoder: Decoder) -> None:
        with suppress(queue.Empty):
            while True:
                what, value = self._events.get_nowait()
                if what == "report" and isinstance(value, bytes):
                    for record in decoder.feed(value):
                        self._session.take(record)

    def _why_late(self, machine: Machine, deadline: float) -> str:
        if self._stopped.is_set():
            return session.STOPPED
        if time.monotonic() >= deadline:
            return f"the whole run took more than {self._job.limits.total_s:g} s"
        limit = self._session.limit_s(self._job.limits)
        if machine.answers(self._job.limits.answer_s):
            return f"took more than {limit:g} s; the guest answers, its Python does not (stopped?)"
        return f"took more than {limit:g} s, and the guest does not answer any more (a lockup of its kernel?)"

    def _run(self, machine: Machine, events: queue.SimpleQueue[tuple[str, object]]) -> None:
        place = machine.place
        job = self._job.rest(self._session.only(self._job.only), tuple(self._session.ignore))
        put = events.put
        try:
            outcome: object = machine.run(
                [place.python, "-X", "faulthandler", f"{place.harness}/{DRIVER}"],
                cwd=join(place.project, job.cwd),
                env={**job.env, "UMM_GUEST_PAGE_SIZE": self.size.name},
                stdin=job.text(place),
                on_stdout=lambda data: put(("output", data)),
                on_stderr=lambda data: put(("output", data)),
                on_report=lambda data: put(("report", data)),
            )
        except BaseException as error:  # handed to the run's own thread
            outcome = error
        put(("end", outcome))
