"""A notifier's interest in an interval of an address space."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, Self, SupportsIndex

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError, KernelError
from uspace_mm.kernel._check import as_int
from uspace_mm.notifier import _life
from uspace_mm.notifier._subscriber import NO_LIMIT_NS, as_ns
from uspace_mm.notifier.errors import ForkedAway, ReadTimeout, Released, WouldDeadlock
from uspace_mm.notifier.event import Event, Kind, Promise, Reason, Source
from uspace_mm.notifier.notifier import Notifier
from uspace_mm.notifier.space import Space, as_interval, as_space

_SLICE_NS = 100_000_000


class _State(Enum):
    NEW = 0  # being made; events may come already
    OPEN = 1
    CLOSED = 2


class Registration:
    """Made by :func:`register`; a context manager. ``notifier`` is told of its interval of ``space``."""

    def __init__(self, notifier: Notifier, space: Space, start: int, end: int) -> None:
        self.notifier = notifier
        self.space = space
        self.start = start
        self.end = end
        self._owner = os.getpid()
        self._state = _State.NEW
        self._handle: Any = None
        self._released = threading.Event()
        self._gone = threading.Event()
        self._calls: list[str] = []
        self._is_over = False  # for the thread of the notifier
        self._worker = notifier._hire()
        try:
            self._number, handle = self._worker.subscriber.subscribe(space, start, end, self)
        except BaseException:
            notifier._dismiss(self._worker)
            raise
        with _life.lock:
            self._handle = handle
            closed = self._state is _State.CLOSED
            if not closed:
                self._state = _State.OPEN
        if closed:  # by the first callback
            self._finish()
            return
        try:
            space._begin(self)
        except BaseException:
            self.close()
            raise

    @property
    def range(self) -> tuple[int, int]:
        """(start, end) in bytes."""
        return self.start, self.end

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called; also in a forked child, whose memory it never was about."""
        return self._state is _State.CLOSED or self._owner != os.getpid()

    @property
    def released(self) -> bool:
        """Whether the notifier's ``release`` was called for it."""
        return self._released.is_set()

    def close(self) -> None:
        """No callback for it runs any more when this returns, except the one that this is called from.

        Calls ``release`` (reason UNREGISTER) if it was not called yet. Harmless when closed already: then it
        waits for the one who closes, unless in a callback. Ctrl-C while it waits leaves it open. Raises
        WouldDeadlock when two callbacks close each other's registration: it is closed, but the other callback
        may still be running.
        """
        if self._owner != os.getpid():
            return
        with _life.lock:
            before, self._state = self._state, _State.CLOSED
        if before is _State.NEW:
            # In its first callback, while register() is still at it: that does the rest before it returns.
            self._is_over = True
        elif before is _State.OPEN:
            self._finish()
        elif not lib.umm_notify_in_callback():
            self._gone.wait()

    def _finish(self) -> None:
        handle = self._handle
        self._await_callback()
        try:
            claimed = lib.umm_subscription_claim_release(handle)
            error = lib.umm_unsubscribe(handle)
            # After it: an end that its thread was just taking does not come after the last word.
            if claimed:
                self.notifier._call(self._release_event(), self._worker.subscriber)
                self._released.set()
        finally:
            self._worker.subscriber.forget(self._number)
            self.space._end(self)
            self._gone.set()
            self.notifier._dismiss(self._worker)
        if error == -errno.EDEADLK:
            raise WouldDeadlock(
                f"{self!r} is closed, but its callback still runs, and closes the registration of this one"
            )
        if error:
            raise KernelError("unsubscribe", error, address=self.start)

    def _await_callback(self) -> None:
        """Until nobody is in a call of ours, and no callback runs: here, so that Ctrl-C ends the waiting.

        What is left for the core to wait for is short, or (in a callback, with others that close each other)
        known to it alone.
        """
        self._is_over = True
        try:
            while self._calls:  # they leave as soon as they see the state
                time.sleep(0.001)
            nap_s = 0.00005
            while self._worker.current is self and not lib.umm_notify_in_callback():
                time.sleep(nap_s)
                nap_s = min(2 * nap_s, 0.02)
        except BaseException:
            self._is_over, self._state = False, _State.OPEN
            raise

    def _release_event(self) -> Event:
        return Event(
            kind=Kind.RELEASE,
            start=self.start,
            end=self.end,
            to=None,
            id=0,
            generation=self.space.generation,
            error=0,
            source=Source.LIBRARY,
            reason=Reason.UNREGISTER,
            promise=Promise.ORDERED,
            blockable=True,
            voluntary=False,
            pid=self.space.pid,
            registration=self,
        )

    @contextmanager
    def _live(self, call: str) -> Iterator[Any]:
        """The native handle, which is not freed meanwhile."""
        if self._owner != os.getpid():
            raise ForkedAway(
                f"{call}: {self!r} belongs to process {self._owner}, from which this one was forked: "
                "register anew here"
            )
        # Noted before the state is read: close() either sees the call or hides the handle.
        self._calls.append(call)
        try:
            if self._state is _State.NEW:
                raise WouldDeadlock(f"{call}: {self!r} is still being made")
            if self._state is not _State.OPEN:
                raise InputError(f"{call}: {self!r} is closed")
            yield self._handle
        finally:
            self._calls.pop()

    def read_begin(self, timeout_s: float | None = None) -> int:
        """Waits until no change of the interval is under way; a number for :meth:`read_retry`.

        As the kernel's mmu_interval_read_begin: between the two, look the pages up, and use what was found
        when ``read_retry`` says False. Raises ReadTimeout after `timeout_s` (None: never), WouldDeadlock in a
        callback, Released when the address space is gone.
        """
        call = "read_begin"
        limit_ns = as_ns("timeout_s", timeout_s, none=NO_LIMIT_NS)
        result = ffi.new("uint64_t *")
        error = -errno.ETIMEDOUT
        deadline = time.monotonic() + limit_ns / 1e9
        while error == -errno.ETIMEDOUT:
            # In slices: close() and signal handlers of Python are not held up.
            left_ns = int(max(deadline - time.monotonic(), 0) * 1e9)
            with self._live(call) as handle:
                error = lib.umm_read_begin(handle, min(left_ns, _SLICE_NS), result)
            if error == -errno.ETIMEDOUT and left_ns <= _SLICE_NS:
                raise ReadTimeout(f"{self!r}: a change of it has been under way for {timeout_s} s")
        if error == -errno.EDEADLK:
            raise WouldDeadlock(f"{self!r}: {call} in a callback would wait for the callback's own change")
        if error == -errno.ESRCH:
            raise Released(f"{self!r}: its address space is gone")
        if error:
            raise KernelError(call, error, address=self.start)
        return int(result[0])

    def read_retry(self, seq: SupportsIndex) -> bool:
        """Whether a change of the interval began since :meth:`read_begin` gave `seq`."""
        number = as_int("read_retry", "seq", seq)
        with self._live("read_retry") as handle:
            return bool(lib.umm_read_retry(handle, number))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Registration of {self.notifier._label()!r} on {self.start:#x}-{self.end:#x}>"


def register(
    notifier: Notifier, start: Any = None, end: SupportsIndex | None = None, space: Space | None = None
) -> Registration:
    """Have `notifier` told of changes that touch [start, end) of `space` (None: this process).

    `start` may be memory instead of an address: a region, a mapping, a numpy array, a buffer; it is not kept.
    Without both: all addresses. When this returns, changes that began before have ended (within a second).
    A notifier may have any number of registrations; ``event.registration`` says which one it is about.
    Raises InputError for a range that is empty, Released when the process of `space` has ended.
    """
    if not isinstance(notifier, Notifier):
        raise InputError(f"register: expected a Notifier, not {type(notifier).__name__}")
    low, high = as_interval(start, end)
    return Registration(notifier, as_space(space), low, high)
