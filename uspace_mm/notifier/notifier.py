"""The base class of notifiers, and the thread that runs their callbacks."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, Self

from uspace_mm._native import lib
from uspace_mm.notifier import _life, _reports
from uspace_mm.notifier._subscriber import NO_LIMIT_NS, NOTHING, NotifierStats, Subscriber
from uspace_mm.notifier.event import Event, Kind, event_of
from uspace_mm.notifier.space import this_process

if TYPE_CHECKING:
    from uspace_mm.notifier.registration import Registration

_log = logging.getLogger("uspace_mm.notifier")


class Notifier:
    """Told before memory goes away. Override what you need; :func:`register` says of which memory.

    Callbacks run in a thread of this object's own, one after the other, never on the thread that changes the
    memory. That one waits for the answer, ``wait_s`` seconds at most; then the change happens without it,
    and the next event of the range is :attr:`Reason.LOST`. With ``keep``, changes that can be done without
    (evictions) are given up instead. ``queue``: events that may wait; what comes above is told as LOST.

    ``wait_s`` of None or 0: nobody waits, so the events are news of what may have happened already. Waiting
    cannot help where who changes the memory holds the GIL (code in C that frees memory): it takes wait_s.

    A callback that raises is reported by the logger ``uspace_mm.notifier`` with name and event, counted, and
    later events still come; one that takes longer than wait_s is reported by name. In a callback: a
    registration may be closed and made; memory of a region must not be touched, evicted or closed. The
    ``release`` of a registration that is closed runs in the thread that closes it.
    """

    name: str = ""
    wait_s: float | None = 1.0
    keep: bool = False
    queue: int = 1024

    _worker: _Worker | None
    _past: NotifierStats

    def __new__(cls, *_: Any, **__: Any) -> Self:
        # Not in __init__: a subclass need not call that.
        self = super().__new__(cls)
        self._worker = None
        self._past = NOTHING
        return self

    def __init__(
        self,
        name: str | None = None,
        *,
        wait_s: float | None | str = "",
        keep: bool | None = None,
        queue: int | None = None,
    ) -> None:
        if name is not None:
            self.name = name
        if wait_s != "":
            self.wait_s = wait_s  # type: ignore[assignment]  # looked at when it is used
        if keep is not None:
            self.keep = keep
        if queue is not None:
            self.queue = queue

    def release(self, event: Event) -> None:
        """The address space goes away (EXIT, EXEC), or the registration ends (UNREGISTER): exactly once for
        each registration, whichever comes first, before the memory (a foreign process's: after)."""

    def invalidate_range_start(self, event: Event) -> None:
        """Drop what you hold of the range: it changes when this returns."""

    def invalidate_range_end(self, event: Event) -> None:
        """For each start: the change is over, or failed with ``event.error``."""

    def invalidate_page(self, event: Event) -> None:
        """One unit has gone already, and is not used anew before this returns."""

    def age(self, event: Event) -> bool:
        """Whether you used the range since the last call."""
        return False

    def change(self, event: Event) -> None:
        """The same address has other pages with the same content."""

    def stats(self) -> NotifierStats:
        """Counts over all registrations, the closed ones included."""
        with _life.lock:
            worker, past = self._worker, self._past
            return past if worker is None else past + worker.subscriber.stats()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._label()!r}>"

    def _label(self) -> str:
        return self.name or type(self).__name__

    def _hire(self) -> _Worker:
        """The worker, with one more registration that needs it."""
        with _life.lock:
            if self._worker is None:
                self._worker = _Worker(self)
            self._worker.users += 1
            return self._worker

    def _dismiss(self, worker: _Worker) -> None:
        """One registration less; with the last one the thread ends, and has ended when this returns (not when
        called in a callback, which that thread may be waiting for)."""
        with _life.lock:
            worker.users -= 1
            if worker.users:
                return
            if self._worker is worker:
                self._worker = None
        worker.stop()

    def _answer(self, event: Event) -> int:
        if event.kind is Kind.START:
            self.invalidate_range_start(event)
        elif event.kind is Kind.END:
            self.invalidate_range_end(event)
        elif event.kind is Kind.PAGE:
            self.invalidate_page(event)
        elif event.kind is Kind.AGE:
            return 1 if self.age(event) else 0
        elif event.kind is Kind.CHANGE:
            self.change(event)
        else:
            self.release(event)
        return 0

    def _call(self, event: Event, subscriber: Subscriber[Registration]) -> int:
        """What the callback answers. One that raises is reported; its range counts as used."""
        try:
            return self._answer(event)
        except BaseException as error:  # SystemExit and KeyboardInterrupt of a callback are its own, too
            subscriber.failed()
            where = traceback.extract_tb(error.__traceback__)[-1:]
            place = f" at {where[0].filename}:{where[0].lineno}" if where else ""
            what = "".join(traceback.format_exception_only(error)).strip().replace("\n", " ")
            _log.error("notifier %s: %s raised %s%s", self._label(), event, what, place)
            _log.debug("notifier %s: %s", self._label(), event, exc_info=True)
            return 1 if event.kind is Kind.AGE else 0


class _Worker:
    """A subscriber and the thread that takes its events; lives as long as there are registrations."""

    def __init__(self, notifier: Notifier) -> None:
        self.users = 0
        self.current: Registration | None = None  # whose callback runs
        self._at_end = False
        self._notifier = notifier
        name = notifier._label()
        self.subscriber: Subscriber[Registration] = Subscriber(
            name, wait_s=notifier.wait_s, keep=notifier.keep, queue=notifier.queue
        )
        # A daemon, so that the interpreter's end is not waited for here: it has to come first, in _life.
        self._thread = threading.Thread(target=self._run, name=f"umm {name}"[:15], daemon=True)
        self._thread.start()
        _reports.begin()
        _life.register(self)

    def _run(self) -> None:
        subscriber, notifier = self.subscriber, self._notifier
        # A handler in C that changes memory would wait here for this thread itself.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            try:
                taken = subscriber.next(NO_LIMIT_NS)
            except EOFError:
                break
            if taken is None:
                continue
            registration, native = taken
            answer = 0
            if registration is not None and (not registration._is_over or native.kind == Kind.RELEASE):
                self.current = registration
                event = event_of(native, registration)
                answer = notifier._call(event, subscriber)
                if event.kind is Kind.RELEASE:
                    registration._released.set()
                self.current = None
            subscriber.done(answer)
        if self._at_end or subscriber.owner != os.getpid():
            return
        with _life.lock:
            notifier._past += subscriber.stats()
            subscriber.destroy()
        _reports.end()

    def stop(self) -> None:
        """End the thread, once its callback has returned."""
        if self.subscriber.owner != os.getpid():
            return
        self.subscriber.close()
        if not lib.umm_notify_in_callback():
            self._thread.join()

    def after_fork(self) -> None:
        """In a forked child: a notifier without registrations, as new."""
        if self._notifier._worker is self:
            self._notifier._worker = None
        self.subscriber.abandon()

    def at_exit(self, deadline: float) -> None:
        for registration in self.subscriber.objects():
            # Other processes live on: nothing is released.
            if registration.space is this_process():
                registration._released.wait(max(deadline - time.monotonic(), 0.0))
        self._at_end = True  # its registrations stay: nobody is there to close them
        self.subscriber.close()
        self._thread.join(max(deadline - time.monotonic(), 0.0))
