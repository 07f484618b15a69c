"""A ``struct umm_subscriber`` in pull mode, and the objects behind its subscriptions.

Python never runs on a thread that changes memory: events wait in the subscriber's queue, and a thread of ours
takes them with :meth:`Subscriber.next`, without the GIL while it waits.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError, KernelError
from uspace_mm.notifier import _life
from uspace_mm.notifier.errors import Released
from uspace_mm.notifier.event import Kind
from uspace_mm.notifier.space import Space

_LONGEST_S = 1e6
_QUEUE = (8, 1 << 20)
NO_LIMIT_NS = (1 << 64) - 1

T = TypeVar("T")


def as_ns(name: str, seconds: float | None, *, none: int) -> int:
    """`seconds` in ns; `none` for None. InputError when it is no time that can be waited."""
    if seconds is None:
        return none
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise InputError(f"{name} must be seconds, not {type(seconds).__name__}")
    if not 0 <= seconds <= _LONGEST_S or math.isnan(seconds):
        raise InputError(f"{name} {seconds}: expected seconds from 0 to {_LONGEST_S:.0f}, or None")
    return int(seconds * 1e9)


@dataclass(frozen=True, slots=True)
class NotifierStats:
    """Counts since the notifier was made.

    ``calls``: callbacks begun, by kind. ``again``: changes that could not wait and were put off.
    ``late``: changes that went on, or were given up, without its answer. ``lost``: events that found the
    queue full. ``failed``: callbacks that raised. ``queued``: events that wait now. ``busy_s``: how long the
    callback that runs now has been running, else 0.
    """

    calls: dict[Kind, int]
    again: int = 0
    late: int = 0
    lost: int = 0
    failed: int = 0
    queued: int = 0
    busy_s: float = 0.0

    def __add__(self, other: NotifierStats) -> NotifierStats:
        return NotifierStats(
            {kind: self.calls[kind] + other.calls[kind] for kind in Kind},
            self.again + other.again,
            self.late + other.late,
            self.lost + other.lost,
            self.failed + other.failed,
            self.queued + other.queued,
            self.busy_s + other.busy_s,
        )


NOTHING = NotifierStats(dict.fromkeys(Kind, 0))


class Subscriber(Generic[T]):
    """Owns the native subscriber; each subscription on it carries an object of type T."""

    def __init__(self, name: str, *, wait_s: float | None, keep: bool, queue: int) -> None:
        if not isinstance(name, str) or not name or "\0" in name:
            raise InputError(f"notifier name {name!r}: expected a text that is not empty")
        if isinstance(queue, bool) or not isinstance(queue, int) or not _QUEUE[0] <= queue <= _QUEUE[1]:
            raise InputError(f"notifier {name}: queue {queue!r}: expected {_QUEUE[0]} to {_QUEUE[1]} events")
        text = ffi.new("char[]", name.encode(errors="replace"))
        options = ffi.new("struct umm_subscriber_options *")
        options.name = text
        options.sleeping = True
        options.pull = True
        options.late = lib.UMM_LATE_KEEP if keep else lib.UMM_LATE_GO_ON
        options.limit_ns = as_ns(f"notifier {name}: wait_s", wait_s, none=0)
        options.queue = queue
        result = ffi.new("struct umm_subscriber **")
        error = lib.umm_subscriber_create(options, result)
        if error:
            raise KernelError("create a subscriber", error)
        self.handle = result[0]
        self.owner = os.getpid()
        self._objects: dict[int, T] = {}
        self._numbers = itertools.count(1)
        self._event = ffi.new("struct umm_notify_event *")
        self._subscription = ffi.new("struct umm_subscription **")

    def subscribe(self, space: Space, start: int, end: int, what: T) -> tuple[int, Any]:
        """The number and the native subscription. Events may be taken before this returns."""
        number = next(self._numbers)
        self._objects[number] = what
        result = ffi.new("struct umm_subscription **")
        context = ffi.cast("void *", number)
        error = lib.umm_subscribe(space.handle, self.handle, start, end, context, result)
        if error:
            del self._objects[number]
            if error == -errno.ESRCH:
                raise Released(f"process {space.pid}: its address space is gone already")
            raise KernelError("subscribe", error, address=start, length=end - start)
        return number, result[0]

    def objects(self) -> list[T]:
        """Those of all subscriptions."""
        return list(self._objects.values())

    def forget(self, number: int) -> None:
        """The subscription ended."""
        self._objects.pop(number, None)

    def next(self, timeout_ns: int) -> tuple[T | None, Any] | None:
        """(object, native event); None when there is none within `timeout_ns`.

        :meth:`done` follows, in the same thread. Raises EOFError when the subscriber was closed.
        """
        result = lib.umm_subscriber_next(self.handle, timeout_ns, self._event, self._subscription)
        if result == -errno.ETIMEDOUT:
            return None
        if result:
            raise EOFError
        number = int(ffi.cast("uintptr_t", lib.umm_subscription_context(self._subscription[0])))
        return self._objects.get(number), self._event

    def done(self, result: int = 0) -> None:
        """The answer to the event that :meth:`next` gave."""
        lib.umm_subscriber_done(self.handle, result)

    def failed(self) -> None:
        """Counts a callback that raised."""
        lib.umm_subscriber_failed(self.handle)

    def fileno(self) -> int:
        """A descriptor that is readable while events wait; the subscriber's own."""
        fd = int(lib.umm_subscriber_fd(self.handle))
        if fd < 0:
            raise KernelError("eventfd", fd)
        return fd

    def stats(self) -> NotifierStats:
        """What was counted so far."""
        native = ffi.new("struct umm_subscriber_stats *")
        lib.umm_subscriber_stats(self.handle, native)
        return NotifierStats(
            {kind: native.calls[kind] for kind in Kind},
            native.again,
            native.late,
            native.lost,
            native.failed,
            native.queued,
            native.busy_ns / 1e9,
        )

    def close(self) -> None:
        """:meth:`next` ends from now on, also one that waits."""
        with _life.lock:
            if self.handle:
                lib.umm_subscriber_close(self.handle)

    def abandon(self) -> None:
        """In a forked child: closes what the copy of the parent's has open.

        Its subscriptions are left as they are: another thread of the parent's may have been ending one, which
        nobody here can know.
        """
        if self.handle and not lib.umm_notify_in_callback():  # that may be of this one, and will be answered
            lib.umm_subscriber_destroy(self.handle)
            self.handle = ffi.NULL

    def destroy(self) -> None:
        """Frees it; it has no subscriptions any more."""
        with _life.lock:
            error = lib.umm_subscriber_destroy(self.handle)
            if error:
                raise KernelError("destroy a subscriber", error)
            self.handle = ffi.NULL
