"""The source process of the postcopy demo: holds the data, works on it, and hands it over.

``python -m uspace_mm.demo.source OPTIONS_JSON`` is what the demo starts; see :mod:`uspace_mm.demo.side`.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from uspace_mm.demo import report, side, texts
from uspace_mm.demo.options import Emit, Options, ticker
from uspace_mm.demo.work import Index
from uspace_mm.demo.worker import Worker
from uspace_mm.errors import InputError, UspaceError
from uspace_mm.postcopy.errors import ConnectionLost, PeerTimeout, PostcopyError, Stopped
from uspace_mm.postcopy.sender import Sender

_TICK_S = 0.1
_WARM_UP_STEPS = 20


def anonymous_memory(size: int) -> npt.NDArray[np.uint8]:
    """One private anonymous mapping of `size` bytes, which is rounded up to 64 KiB pages."""
    size = -(-size // (1 << 16)) * (1 << 16)
    try:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"size {size}: cannot map that much memory ({error}); give a smaller --size"
        ) from error
    # Writes are found per page: one to a protected huge page would split it anyway.
    try:
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
    except OSError:
        pass  # a kernel without huge pages
    return np.frombuffer(mapping, np.uint8)


class Source:
    """One migration, from the source's point of view."""

    def __init__(self, options: Options, emit: Emit) -> None:
        self.options = options
        self.emit = emit
        self.memory = anonymous_memory(options.size)
        self.index = Index(self.memory)
        different = texts.fill(self.index.text, [Path(name) for name in options.input], options.seed)
        emit("text", bytes=int(self.index.text.nbytes), different_bytes=different)
        self.worker = Worker(self.index)
        self.sender = Sender(self.memory, options.timeout_s)
        self.switched = False
        self.started_ns = 0

    def _progress(self) -> None:
        stats = self.sender.stats()
        self.emit("progress", steps=self.worker.steps, stats=stats, map=report.page_map(self.sender.states()))

    def _accept(self, listener: socket.socket) -> None:
        """Both connections of one destination; whoever is not one is refused and the wait goes on."""
        deadline = time.monotonic() + self.options.accept_s
        first_ns = 0.0
        while self.sender.connections < 2:
            # Once a destination is there, its second connection follows at once or never.
            until = min(deadline, first_ns + self.options.timeout_s) if first_ns else deadline
            listener.settimeout(0.2)
            try:
                connection, peer = listener.accept()
            except TimeoutError:
                if side.peer_gone.is_set():
                    raise ConnectionLost("the destination's process ended before it connected") from None
                if time.monotonic() < until:
                    continue
                what = "its urgent connection" if first_ns else "a destination"
                raise PeerTimeout(f"waited in vain for {what}; start one with --connect") from None
            try:
                self.sender.accept(connection)
                first_ns = first_ns or time.monotonic()
            except (PostcopyError, OSError) as error:
                if isinstance(error, Stopped):
                    raise
                self.emit("refused", peer=str(peer[0]), message=str(error))
                print(f"source: refused a connection from {peer[0]}: {error}", file=sys.stderr, flush=True)

    def _precopy(self) -> None:
        self.started_ns = time.monotonic_ns()
        for number in range(1, self.options.rounds + 1):
            self.options.pause("source", "precopy")
            self.sender.round()
            after = self.worker.steps
            stats = self.sender.stats()
            rest = self.sender.dirty()
            rate = stats["round_pages"] / max(stats["round_ns"], 1) * 1e9
            estimate_s = rest / rate if rate else 0.0
            self.emit("round", number=number, pages=stats["round_pages"], rest=rest, estimate_s=estimate_s)
            # The work is to have written something since: the rest is what postcopy is for.
            if not self.worker.wait_for(after + 1, self.options.timeout_s):
                raise UspaceError("the work stands still")
            if estimate_s < self.options.downtime_goal_s:
                break

    def _switch(self) -> None:
        stopped_ns = self.worker.stop()
        if self.worker.error is not None:
            raise self.worker.error
        self.options.pause("source", "switch")
        state = {"version": 1, "steps": self.worker.steps, "steps_after": self.options.steps}
        self.switched = True
        self.sender.switch(stopped_ns, json.dumps(state).encode())
        self.emit("switched", steps=self.worker.steps, missing=self.sender.stats()["missing_pages"])

    def _replay(self, done: int) -> str:
        """Do here what the destination did, on the data that never moved; its digest."""
        stop = threading.Event()
        alive = threading.Thread(target=ticker, args=(0.5, self.sender.alive, stop.wait), daemon=True)
        alive.start()
        try:
            for _ in range(done):
                self.index.step()
            return self.index.digest()
        finally:
            stop.set()
            alive.join()

    def _finish(self) -> dict[str, Any]:
        finish = report.parse_finish(self.sender.await_finish())
        total_s = (time.monotonic_ns() - self.started_ns) / 1e9
        stats = self.sender.stats()
        digest = self._replay(finish["steps"])
        verdict = report.combine(stats, finish, work_matches=digest == finish["digest"], total_s=total_s)
        self.sender.verdict(json.dumps(verdict).encode())
        return verdict

    def _go_on_after(self, error: PostcopyError) -> PostcopyError:
        """Before the switch nothing is lost: show it by working on."""
        if self.switched:
            kept = (
                "the switch had been sent, so the work may go on there: the frozen data is not touched here"
            )
        else:
            before = self.worker.steps
            self.worker.wait_for(before + 5, self.options.timeout_s)
            steps = self.worker.steps
            kept = (
                "the switch had not happened: the data is still here, "
                f"and the work went on ({before} -> {steps} steps)"
            )
        self.emit("kept", message=kept)
        return type(error)(f"{error}; {kept}", error.errno)

    def run(self) -> dict[str, Any]:
        """Move once; returns the result that both sides have. Raises :class:`UspaceError`."""
        options = self.options
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        stop = threading.Event()
        progress = threading.Thread(target=ticker, args=(_TICK_S, self._progress, stop.wait), daemon=True)
        with self.sender:
            self.worker.start()
            try:
                with socket.create_server((options.host, options.port), family=family) as listener:
                    self.emit("listening", host=options.host, port=listener.getsockname()[1], pid=os.getpid())
                    options.pause("source", "connect")
                    self._accept(listener)
                progress.start()
                if not self.worker.wait_for(_WARM_UP_STEPS, 60.0):
                    raise UspaceError("the work stands still")
                self._precopy()
                self._switch()
                options.pause("source", "postcopy")
                self.sender.serve(options.bulk_bytes_per_s)
                self.emit("verified", **{k: self.sender.stats()[k] for k in ("verified", "mismatched")})
                options.pause("source", "verify")
                return self._finish()
            except PostcopyError as error:
                raise self._go_on_after(error) from error
            except OSError as error:
                if isinstance(error, UspaceError):
                    raise
                raise InputError(
                    f"cannot listen on {options.host}:{options.port}: {error.strerror}"
                ) from error
            except Exception as error:
                self.sender.abort(f"the source failed: {error}")
                raise
            finally:
                stop.set()
                if progress.ident is not None:
                    progress.join()
                self.worker.stop()


def run(options: Options, emit: Emit) -> dict[str, Any]:
    """The source's half of a migration in this process."""
    return Source(options, emit).run()


if __name__ == "__main__":
    sys.exit(side.main("source", run, sys.argv[1]))
