"""A thread that does the demo's work step by step, and stops only between two steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from uspace_mm.demo.work import Index


class Worker:
    """Runs ``index.step()`` over and over. `around` is entered around each step; an error ends the work."""

    def __init__(
        self,
        index: Index,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        first_step: int = 0,
    ) -> None:
        self._index = index
        self._around = around
        self._stop = threading.Event()
        self._stepped = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="work", daemon=True)
        self.steps = first_step
        self.stopped_ns = 0
        self.error: Exception | None = None

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                with self._around():
                    self._index.step()
                with self._stepped:
                    self.steps += 1
                    self._stepped.notify_all()
        except Exception as error:
            self.error = error
            with self._stepped:
                self._stepped.notify_all()
        self.stopped_ns = time.monotonic_ns()

    def start(self) -> None:
        self._thread.start()

    def wait_for(self, steps: int, timeout_s: float) -> bool:
        """Wait until `steps` steps are done, or the work failed; False after `timeout_s`."""
        with self._stepped:
            return self._stepped.wait_for(lambda: self.steps >= steps or self.error is not None, timeout_s)

    def stop(self) -> int:
        """Stop at the next border of steps; returns when that was (``time.monotonic_ns``)."""
        self._stop.set()
        self._thread.join()
        return self.stopped_ns
