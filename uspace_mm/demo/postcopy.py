"""Both sides of the postcopy demo on this machine: two processes, one connection over loopback."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from signal import Signals
from typing import Any

from uspace_mm.demo.options import Options
from uspace_mm.postcopy.errors import PostcopyError

Event = dict[str, Any]


class DemoFailed(PostcopyError):
    """One of the two processes did not reach the end; the message says what each of them said."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class _Side:
    """A child process and what it told."""

    def __init__(self, name: str, options: Options, events: queue.Queue[Event]) -> None:
        self.name = name
        self.error: Event | None = None
        self.result: dict[str, Any] | None = None
        self.done = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"uspace_mm.demo.{name}", options.to_json()],
            stdin=subprocess.PIPE,  # held open: a child leaves when it ends
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, args=(events,), daemon=True)
        self._reader.start()

    def _read(self, events: queue.Queue[Event]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            events.put(json.loads(line))
        events.put({"event": "ended", "side": self.name})

    def tell_peer_is_gone(self) -> None:
        """For a side that waits for a peer it is not connected to yet."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write("the other side has ended\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """Make sure that the process is gone, and nothing of it is left."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        self.process.stdout.close()

    def story(self) -> str:
        """How it went, for the message of a failed demo."""
        if self.error is not None:
            return f"{self.name}: {self.error['message']}"
        status = self.process.returncode
        if status is not None and status < 0:
            return f"{self.name}: killed by {Signals(-status).name}"
        return f"{self.name}: ended with status {status} before the end" if self.result is None else ""


def run_both(options: Options, show: Callable[[Event], None]) -> dict[str, Any]:
    """Start source and destination, pass their events to `show`, return the result both agree on.

    Raises :class:`DemoFailed` when one of them does not reach the end; no process is left then either.
    """
    events: queue.Queue[Event] = queue.Queue()
    sides = {"source": _Side("source", options, events)}
    give_up_at: float | None = None
    try:
        while not all(side.done for side in sides.values()):
            try:
                event = events.get(timeout=0.2)
            except queue.Empty:
                if give_up_at is not None and time.monotonic() > give_up_at:
                    break
                continue
            side = sides[event["side"]]
            match event["event"]:
                case "listening":
                    sides["destination"] = _Side("destination", replace(options, port=event["port"]), events)
                case "error":
                    side.error = event
                case "result":
                    side.result = event["result"]
                case "ended":
                    side.done = True
                    # A side that lost its peer finds out within the idle timeout.
                    if side.result is None and give_up_at is None:
                        give_up_at = time.monotonic() + options.timeout_s + 5.0
                        for other in sides.values():
                            other.tell_peer_is_gone()
            show(event)
    finally:
        for side in sides.values():
            side.end()
    results = [side.result for side in sides.values()]
    if len(results) < 2 or None in results:
        stories = [story for story in (side.story() for side in sides.values()) if story]
        statuses = [side.error["status"] for side in sides.values() if side.error]
        raise DemoFailed("; ".join(stories), max(statuses, default=1))
    result = sides["destination"].result
    assert result is not None
    return result
