"""Callbacks that take too long, as lines in the log.

While there are notifiers, a thread takes the core's reports: the callback itself cannot say so, and who waits
for it must not run Python.
"""

from __future__ import annotations

import logging
import os
import threading
import time

from uspace_mm._native import ffi, lib
from uspace_mm.notifier import _life
from uspace_mm.notifier.event import event_of

_log = logging.getLogger("uspace_mm.notifier")
_EVERY_S = 0.1

_users = 0
_watch: _Watch | None = None


class _Watch:
    def __init__(self) -> None:
        # Kept for us to take, instead of a line on stderr.
        lib.umm_notify_set_reporter(ffi.addressof(lib, "umm_notify_keep_reports"), ffi.NULL)
        self._end = threading.Event()
        self._owner = os.getpid()
        self._thread = threading.Thread(target=self._run, name="umm reports", daemon=True)
        self._thread.start()
        _life.register(self)

    def _run(self) -> None:
        report = ffi.new("struct umm_notify_report *")
        ended = False
        while not ended:
            ended = self._end.wait(_EVERY_S)
            while lib.umm_notify_take_report(report):
                name = ffi.string(report.name).decode(errors="replace")
                waited_s = report.waited_ns / 1e9
                event = event_of(report.event)
                _log.warning("notifier %s: no answer for %.1f s to %s", name, waited_s, event)

    def stop(self, timeout_s: float | None = None) -> None:
        self._end.set()
        if self._owner == os.getpid():
            self._thread.join(timeout_s)

    def after_fork(self) -> None:
        global _users, _watch
        _users, _watch = 0, None
        lib.umm_notify_set_reporter(ffi.NULL, ffi.NULL)

    def at_exit(self, deadline: float) -> None:
        self.stop(max(deadline - time.monotonic(), 0.0))


def begin() -> None:
    """One more notifier with a thread. The caller holds the lock."""
    global _users, _watch
    _users += 1
    if _watch is None:
        _watch = _Watch()


def end() -> None:
    """One less."""
    global _users, _watch
    with _life.lock:
        _users -= 1
        if _users or _watch is None:
            return
        watch, _watch = _watch, None
        lib.umm_notify_set_reporter(ffi.NULL, ffi.NULL)
    watch.stop()
