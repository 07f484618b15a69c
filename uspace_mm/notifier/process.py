"""Other processes, and one's own memory that nobody registered: what sampling can see of them."""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
import time
import weakref
from typing import Any, Self, SupportsIndex

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError, KernelError, UspaceError
from uspace_mm.kernel._check import as_pid
from uspace_mm.kernel.process import pidfd_open
from uspace_mm.notifier import _life
from uspace_mm.notifier._looks import Eyes, Look, differences
from uspace_mm.notifier._subscriber import as_ns
from uspace_mm.notifier.errors import ForkedAway, NoProcess, WouldDeadlock
from uspace_mm.notifier.event import Promise, Reason, Source
from uspace_mm.notifier.space import Holder, Space

_log = logging.getLogger("uspace_mm.notifier")
_SHORTEST_S = 0.001


class Process(Space):
    """The address space of process `pid`, for :func:`register` and :func:`events`; a context manager.

    Its end is told exactly once, after the fact (``release``, reason EXIT, source PIDFD, promise AFTER), also
    when it ends before the first registration. Every `interval_s` seconds a thread looks at its mappings and
    at which of its pages are there, and tells what differs: MAP, UNMAP, PROTECT and PRESENCE, of source
    SAMPLE, promise SAMPLED. What came and went between two looks was not seen. Executing another program ends
    the address space (``release``, reason EXEC): make a new Process for the new one.

    `interval_s` None: only its end. `presence` False: mappings only. `scan` False: without PAGEMAP_SCAN, as
    before Linux 6.7. Looking begins with the first registration. ``limits`` says what cannot be seen here.
    At most 256 ranges of pages are told per look; when there are more, the narrowest gaps count as changed.

    `pid` may be this process: for memory whose changes are not made through us.
    Raises NoProcess, and UnsupportedError when its mappings may not be read. Sources: pidfd_open(2),
    proc_pid_maps(5), PAGEMAP_SCAN(2const).
    """

    def __init__(
        self,
        pid: SupportsIndex,
        *,
        interval_s: float | None = 0.2,
        presence: bool = True,
        scan: bool = True,
    ) -> None:
        self._native: Any = None
        number = as_pid("Process", pid)
        self._interval_s = as_ns("interval_s", interval_s, none=0) / 1e9
        if interval_s is not None and self._interval_s < _SHORTEST_S:
            raise InputError(f"interval_s {interval_s}: expected {_SHORTEST_S} s or more, or None")
        self._owner = os.getpid()
        self._holders: weakref.WeakSet[Holder] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        self._eyes: Eyes | None = None
        self._look: Look | None = None
        self._ended: Reason | None = None
        self._pidfd = self._wake = -1
        try:
            self._open(number, interval_s is not None, presence, scan)
        except BaseException:
            self._close_descriptors()
            raise
        _life.register(self)

    def _open(self, number: int, sampled: bool, presence: bool, scan: bool) -> None:
        try:
            self._pidfd = pidfd_open(number)
        except KernelError as error:
            if error.errno in (errno.ESRCH, errno.ENOENT, errno.EINVAL):
                raise NoProcess(f"process {number}: there is none (or it is a thread of one)") from None
            raise
        if sampled and not self._has_ended():
            try:
                self._eyes = Eyes(number, presence=presence, scan=scan)
                empty = self._eyes.look() is None
            except UspaceError:
                # After the pidfd: a number that was given to another process meanwhile is noticed here.
                if not self._has_ended():
                    raise
            else:
                if empty and not self._has_ended() and self._is_kernel_thread(number):
                    raise NoProcess(
                        f"process {number} is a thread of the kernel: it has no memory of its own"
                    )
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        result = ffi.new("struct umm_space **")
        error_number = lib.umm_space_create(number, result)
        if error_number:
            raise KernelError("umm_space_create", error_number)
        self._native = result[0]

    @staticmethod
    def _is_kernel_thread(number: int) -> bool:
        try:
            with open(f"/proc/{number}/stat", "rb") as file:
                # The ninth field, of which PF_KTHREAD is a bit; the name may hold anything but a last ')'.
                return bool(int(file.read().rpartition(b")")[2].split()[6]) & 0x00200000)
        except OSError:
            return False

    @property
    def handle(self) -> Any:
        if self._owner != os.getpid():
            raise ForkedAway(f"this Process belongs to process {self._owner}, from which this one was forked")
        if self._native is None:
            raise InputError("this Process is closed")
        return self._native

    @property
    def ended(self) -> Reason | None:
        """EXIT or EXEC once ``release`` was told."""
        return self._ended

    @property
    def sees(self) -> tuple[str, ...]:
        """What can be seen here: ``end``, ``layout``, ``presence``."""
        if self._eyes is None:
            return ("end",)
        return ("end", "layout", "presence") if self._eyes.sees_presence else ("end", "layout")

    @property
    def limits(self) -> tuple[str, ...]:
        """What cannot be seen here, and why."""
        return () if self._eyes is None else tuple(self._eyes.limits)

    def _begin(self, holder: Holder) -> None:
        with _life.lock:
            self._holders.add(holder)
            if self._thread is not None:
                return
            # Compared with what is there now: whatever changes after register() returned is seen.
            self._look = None if self._eyes is None else self._eyes.look()
            self._thread = threading.Thread(target=self._run, name=f"umm pid {self.pid}"[:15], daemon=True)
            self._thread.start()

    def _end(self, holder: Holder) -> None:
        self._holders.discard(holder)

    def _has_ended(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            wait_ms = None if self._eyes is None else self._interval_s * 1000
            ready = {fd for fd, _ in poll.poll(wait_ms)}
            if self._wake in ready:
                return
            if self._pidfd in ready:
                self._tell_end(Reason.EXIT, Source.PIDFD, Promise.AFTER)
                return
            try:
                if self._sample():
                    return
            except Exception as error:
                _log.error("process %d: it is no longer sampled, only its end is seen: %s", self.pid, error)
                self._eyes = None

    def _sample(self) -> bool:
        """Tells what differs from the last look; True when the address space is gone."""
        if self._eyes is None:
            return False
        look = self._eyes.look()
        if self._eyes.executes_another(gone=look is None) and not self._has_ended():
            self._tell_end(Reason.EXEC, Source.SAMPLE, Promise.AFTER)
            return True
        if look is None:
            return False  # it is ending: the pidfd will say so
        if self._look is not None:
            for reason, start, end in differences(self._look, look):
                lib.umm_notify_post(self._native, start, end, 0, Source.SAMPLE, reason, Promise.SAMPLED)
        self._look = look
        return False

    def _tell_end(self, reason: Reason, source: Source, promise: Promise) -> None:
        self._ended = reason
        lib.umm_space_release(self._native, source, reason, promise)

    def close(self) -> None:
        """Closes its registrations and streams, and ends the thread. Harmless when closed already.

        Raises WouldDeadlock in a callback, which the thread may be waiting for.
        """
        if self._native is None:
            return
        if self._owner != os.getpid():
            self._native = None
            return
        if lib.umm_notify_in_callback():
            raise WouldDeadlock(f"process {self.pid}: cannot be closed in a callback; close it outside of it")
        os.eventfd_write(self._wake, 1)
        if self._thread is not None:
            self._thread.join()
        for holder in list(self._holders):
            holder.close()
        error = lib.umm_space_destroy(self._native)
        if error:
            raise KernelError("umm_space_destroy", error)
        self._native = None
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        for fd in (self._pidfd, self._wake):
            if fd >= 0:
                os.close(fd)
        self._pidfd = self._wake = -1
        if self._eyes is not None:
            self._eyes.close()

    def after_fork(self) -> None:
        """In a forked child there is no thread that looks."""
        self._close_descriptors()

    def at_exit(self, deadline: float) -> None:
        if self._native is not None and self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join(max(deadline - time.monotonic(), 0.0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Process {self.pid if self._native is not None else 'closed'}>"
