"""Events as an iterator, and as an asyncio stream: news, for which nobody waits."""

from __future__ import annotations

import asyncio
import os
import select
import time
from typing import Any, Self, SupportsIndex

from uspace_mm._native import lib
from uspace_mm.errors import InputError
from uspace_mm.notifier import _life
from uspace_mm.notifier._subscriber import NO_LIMIT_NS, Subscriber, as_ns
from uspace_mm.notifier.errors import ForkedAway
from uspace_mm.notifier.event import Event, Kind, event_of
from uspace_mm.notifier.space import Space, as_interval, as_space


class _Stream:
    """A subscription whose events are taken one by one. Ends with the ``release`` of the address space."""

    def __init__(self, start: Any, end: SupportsIndex | None, space: Space | None, queue: int) -> None:
        self._closed = True
        low, high = as_interval(start, end)
        self.space = as_space(space)
        self._subscriber: Subscriber[None] = Subscriber("events", wait_s=None, keep=False, queue=queue)
        self._ended = False
        try:
            self._number, self._handle = self._subscriber.subscribe(self.space, low, high, None)
        except BaseException:
            self._subscriber.destroy()
            raise
        self._closed = False
        self._fd = self._subscriber.fileno()
        _life.register(self)
        try:
            self.space._begin(self)
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def _take(self) -> Event | None:
        """The next event, when there is one. Raises EOFError after the last."""
        if self._subscriber.owner != os.getpid():
            raise ForkedAway(
                "these events are those of the process that this one was forked from: ask anew here"
            )
        if self._closed or self._ended:
            raise EOFError
        while (taken := self._subscriber.next(0)) is not None:
            event = event_of(taken[1])
            self._subscriber.done()
            if event.kind is Kind.RELEASE:
                self._ended = True
            # AGE is a question, not an event; a stream holds nothing that could be young.
            if event.kind is not Kind.AGE:
                return event
        return None

    def close(self) -> None:
        """No more events. Harmless when closed already."""
        if self._closed:
            return
        self._closed = True
        if self._subscriber.owner != os.getpid():
            return
        lib.umm_subscription_claim_release(self._handle)
        lib.umm_unsubscribe(self._handle)
        self._subscriber.forget(self._number)
        self._subscriber.destroy()
        self.space._end(self)

    def after_fork(self) -> None:
        """In a forked child: the copy of the parent's is of no use."""
        self._subscriber.abandon()

    def at_exit(self, deadline: float) -> None:
        """Nothing waits for a stream."""

    def __del__(self) -> None:
        if not self._closed and self._subscriber.owner == os.getpid():
            self.close()


class Events(_Stream):
    """Made by :func:`events`: an iterator and a context manager, for one thread."""

    def __init__(
        self, start: Any, end: SupportsIndex | None, space: Space | None, timeout_s: float | None, queue: int
    ) -> None:
        self._closed = True
        self._timeout_ns = as_ns("timeout_s", timeout_s, none=NO_LIMIT_NS)
        super().__init__(start, end, space, queue)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        deadline = time.monotonic() + self._timeout_ns / 1e9
        while True:
            try:
                event = self._take()
            except EOFError:
                raise StopIteration from None
            if event is not None:
                return event
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise StopIteration
            # Python's poll, not the core's wait: signal handlers run. Rounded up, so that it does not spin.
            self._poll.poll(None if self._timeout_ns == NO_LIMIT_NS else left_s * 1000 + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncEvents(_Stream):
    """Made by :func:`aevents`: an asynchronous iterator and context manager, for one task of one loop."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        loop = asyncio.get_running_loop()
        while True:
            try:
                event = self._take()
            except EOFError:
                raise StopAsyncIteration from None
            if event is not None:
                return event
            readable: asyncio.Future[None] = loop.create_future()

            def wake(waiter: asyncio.Future[None] = readable) -> None:
                if not waiter.done():
                    waiter.set_result(None)

            if self._waiter is not None:
                raise InputError("aevents: another task is waiting for the next event of this stream")
            self._waiter = readable
            loop.add_reader(self._fd, wake)
            try:
                await readable
            finally:
                self._waiter = None
                loop.remove_reader(self._fd)

    _waiter: asyncio.Future[None] | None = None

    async def aclose(self) -> None:
        """No more events; a task that waits for one sees the end."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
            self._waiter.get_loop().remove_reader(self._fd)
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def events(
    start: Any = None,
    end: SupportsIndex | None = None,
    space: Space | None = None,
    timeout_s: float | None = None,
    *,
    queue: int = 1024,
) -> Events:
    """What happens to [start, end) of `space` from now on, as an iterator; the range as in :func:`register`.

    Ends when nothing came for `timeout_s` seconds (None: waits for ever), after the release of the address
    space, or with ``close()``. Nobody waits for the reader: when more than `queue` events pile up, the rest
    comes as one of Reason.LOST.
    """
    return Events(start, end, space, timeout_s, queue)


def aevents(
    start: Any = None, end: SupportsIndex | None = None, space: Space | None = None, *, queue: int = 1024
) -> AsyncEvents:
    """As :func:`events`, for ``async for``; the loop waits on a descriptor, no thread is used."""
    return AsyncEvents(start, end, space, queue)
