"""The destination process of the postcopy demo: takes the work over before its data has arrived.

``python -m uspace_mm.demo.destination OPTIONS_JSON`` is what the demo starts; see :mod:`uspace_mm.demo.side`.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from typing import Any

import psutil

from uspace_mm.demo import report, side
from uspace_mm.demo.options import Emit, Options, ticker
from uspace_mm.demo.work import Index
from uspace_mm.demo.worker import Worker
from uspace_mm.errors import InputError, UspaceError
from uspace_mm.postcopy.errors import PostcopyError, ProtocolError
from uspace_mm.postcopy.receiver import Receiver

_SAMPLE_S = 0.01
_TICK_S = 0.1


class Destination:
    """One migration, from the destination's point of view."""

    def __init__(self, options: Options, emit: Emit) -> None:
        self.options = options
        self.emit = emit
        self.receiver = Receiver(options.timeout_s)
        self.worker: Worker | None = None
        self.started_ns = time.monotonic_ns()
        self.timeline: list[tuple[float, str]] = []
        self._ticked_ns = 0

    def _sample(self) -> None:
        """Page states for the picture: often during postcopy, which is short; progress less often."""
        now = time.monotonic_ns()
        tick = now - self._ticked_ns >= _TICK_S * 1e9
        stats = self.receiver.stats()
        arriving = self.worker is not None and stats["arrived_pages"] < stats["missing_pages"]
        if not (tick or arriving):
            return
        states = report.page_map(self.receiver.states())
        self.timeline.append(((now - self.started_ns) / 1e9, states))
        if tick:
            self._ticked_ns = now
            faults = self.receiver.faults()
            steps = self.worker.steps if self.worker else 0
            self.emit(
                "progress",
                steps=steps,
                stats=stats,
                map=states,
                faults=faults.faults,
                p50_ns=faults.p50_ns,
                p99_ns=faults.p99_ns,
            )
            if self.worker is not None:
                self.receiver.alive()

    def _connect(self) -> None:
        host, port = self.options.host, self.options.port
        for _ in range(2):
            try:
                connection = socket.create_connection((host, port), self.options.timeout_s)
            except OSError as error:
                why = error.strerror or str(error)
                raise PostcopyError(
                    f"cannot connect to {host}:{port}: {why}; start the source first"
                ) from error
            self.receiver.connect(connection, psutil.virtual_memory().available)

    def _enter(self, state: dict[str, int]) -> tuple[Index, Worker]:
        memory = self.receiver.enter()
        index = Index(memory)
        worker = Worker(index, self.receiver.guard)
        self.worker = worker
        self.receiver.running()
        worker.start()
        self.emit("running", steps=state["steps"])
        return index, worker

    def _work_until_complete(self, worker: Worker, steps: int) -> None:
        """Every page here and compared, and at least `steps` steps done here."""
        while not self.receiver.await_complete(0.2):
            if worker.error is not None:
                raise worker.error
        stats = self.receiver.stats()
        self.emit("complete", verified=stats["verified"], mismatched=stats["mismatched"])
        while not worker.wait_for(steps, 1.0):
            pass
        worker.stop()
        if worker.error is not None:
            raise worker.error

    def _result(self, index: Index, worker: Worker) -> dict[str, Any]:
        faults = self.receiver.faults()
        message = report.finish_message(
            worker.steps, index.digest(), self.receiver.stats(), faults, index.totals()
        )
        frequent = index.most_frequent(5)
        self.options.pause("destination", "verify")
        verdict = report.parse_verdict(self.receiver.finish(message))
        self.emit("details", timeline=self.timeline, histogram=faults.histogram, frequent=frequent)
        return verdict

    def run(self) -> dict[str, Any]:
        """Receive once; returns the result that both sides have. Raises :class:`UspaceError`."""
        stop = threading.Event()
        sampler = threading.Thread(target=ticker, args=(_SAMPLE_S, self._sample, stop.wait), daemon=True)
        options = self.options
        try:
            options.pause("destination", "connect")
            self._connect()
            self.emit("connected", bytes=self.receiver.memory().nbytes, pid=os.getpid())
            sampler.start()
            options.pause("destination", "precopy")
            state = report.parse_state(self.receiver.precopy())
            options.pause("destination", "switch")
            index, worker = self._enter(state)
            options.pause("destination", "postcopy")
            self._work_until_complete(worker, state["steps_after"])
            if index.steps != state["steps"] + worker.steps:
                raise ProtocolError("the state of the work does not fit its memory")
            return self._result(index, worker)
        except UspaceError as error:
            self.receiver.abort(f"the destination failed: {error}")
            raise self._explain(error) from error
        finally:
            stop.set()
            if sampler.ident is not None:
                sampler.join()
            # What the work still waits for fails now, so it ends; then nobody uses the memory any more.
            self.receiver.stop()
            if self.worker is not None:
                self.worker.stop()
            self.receiver.close()

    def _explain(self, error: UspaceError) -> UspaceError:
        if not isinstance(error, PostcopyError):
            return error
        stats = self.receiver.stats()
        if self.worker is None:
            there = "the work had not come here yet: it is the source's still"
        elif stats["arrived_pages"] < stats["missing_pages"]:
            lost = stats["missing_pages"] - stats["arrived_pages"]
            there = (
                f"the work had moved here: {lost} of {stats['pages_total']} pages never arrived and are lost"
            )
        else:
            there = "the work had moved here with every page: only its comparison with the source is missing"
        return type(error)(f"{error}; {there}", error.errno)


def run(options: Options, emit: Emit) -> dict[str, Any]:
    """The destination's half of a migration in this process."""
    if not options.port:
        raise InputError("--connect needs the port on which the source listens")
    return Destination(options, emit).run()


if __name__ == "__main__":
    sys.exit(side.main("destination", run, sys.argv[1]))
