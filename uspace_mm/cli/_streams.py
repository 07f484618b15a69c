"""Where a guest's output goes: to descriptors as it comes, or kept for a report; a terminal in raw mode."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from uspace_mm.guest.boot import GuestError
from uspace_mm.guest.outcome import TimedOut

_KEPT_BYTES = 1 << 20


class Deadline:
    """When the command has to have ended: a reader of ours that reads no more must not hold that up."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._end = time.monotonic() + limit_s

    def left_s(self) -> float:
        """Raises :class:`GuestError` with TimedOut when nothing is left."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise GuestError(TimedOut("command", self._limit_s))
        return left


def writer(descriptor: int, deadline: Deadline | None = None) -> Callable[[bytes], None]:
    """Writes all of what it is given to `descriptor`, no later than `deadline`."""
    poller = select.poll()
    poller.register(descriptor, select.POLLOUT)

    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            while deadline is not None and not poller.poll(deadline.left_s() * 1000 + 1):
                pass
            # A pipe that is ready takes this much without blocking (pipe(7)).
            part = view if deadline is None else view[: select.PIPE_BUF]
            try:
                view = view[os.write(descriptor, part) :]
            except BlockingIOError:
                poller.poll(1000)

    return write


class _Kept:
    """The last part of a stream."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._total = 0

    def add(self, data: bytes) -> None:
        self._data += data
        self._total += len(data)
        if len(self._data) > 2 * _KEPT_BYTES:
            del self._data[:-_KEPT_BYTES]

    def to_dict(self, name: str) -> dict[str, Any]:
        text = bytes(self._data[-_KEPT_BYTES:]).decode(errors="replace")
        return {name: text, f"{name}_bytes": self._total}


class Collected:
    """stdout and stderr of a command, for JSON: the last MiB of each, and how long they were."""

    def __init__(self) -> None:
        self.out, self.err = _Kept(), _Kept()

    def to_dict(self) -> dict[str, Any]:
        return self.out.to_dict("stdout") | self.err.to_dict("stderr")


class RawTerminal:
    """Tells when the size of the terminal changed."""

    def __init__(self) -> None:
        self._changed = True

    def change(self) -> None:
        self._changed = True

    def resized(self) -> tuple[int, int] | None:
        if not self._changed:
            return None
        self._changed = False
        size = os.get_terminal_size(sys.stdout.fileno())
        return size.lines, size.columns


@contextmanager
def raw_terminal(nudge: Callable[[], None]) -> Iterator[RawTerminal]:
    """stdin in raw mode, as it was before afterwards; `nudge` is called when the size changed."""
    terminal = RawTerminal()
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def on_change(number: int, frame: object) -> None:
        terminal.change()
        nudge()

    handler = signal.signal(signal.SIGWINCH, on_change)
    try:
        tty.setraw(descriptor)
        yield terminal
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, handler)
