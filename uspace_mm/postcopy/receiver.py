"""The destination's side: see ``native/postcopy/receiver.h`` for who may call what when."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from uspace_mm._native import ffi, lib
from uspace_mm.postcopy.errors import ConnectionLost, PostcopyError, raise_for
from uspace_mm.postcopy.sender import struct_to_dict, text_of

_ffi: Any = ffi
_lib: Any = lib


class PagesLost(PostcopyError):
    """Memory was used that can never arrive, because the connection to the source is gone."""


@dataclass(frozen=True)
class FaultReport:
    """How faults that had to ask the source were served: nanoseconds, from the asking to the wake."""

    faults: int
    p50_ns: int
    p99_ns: int
    p999_ns: int
    slowest_ns: int
    #: where the slowest one was longest: ``queue`` (until the request was sent), ``fetch``, ``install``
    slowest_stage: str
    #: faults (not in ``faults``) whose page the stream had brought before the handler looked
    overtaken: int
    #: (low, high, count) of each bucket with something in it, bounds in nanoseconds
    histogram: tuple[tuple[int, int, int], ...]


class Receiver:
    """Memory that moves here from a :class:`~uspace_mm.postcopy.sender.Sender`.

    Raises the classes of :mod:`uspace_mm.postcopy.errors`. :meth:`memory` is gone after :meth:`close`.
    """

    def __init__(self, idle_s: float = 10.0) -> None:
        self._receiver: Any = None
        out = _ffi.new("struct umm_receiver **")
        raise_for(_lib.umm_receiver_create(int(idle_s * 1000), out), "umm_receiver_create", "")
        self._receiver = out[0]

    def _check(self, result: int, call: str) -> None:
        raise_for(result, call, text_of(_lib.umm_receiver_error(self._receiver)))

    def connect(self, connection: socket.socket, max_bytes: int) -> None:
        """Take a connection over and shake hands: first the data one, then the urgent one.

        More than `max_bytes` of the source's memory is a :class:`ProtocolError`, before any is allocated.
        """
        result = _lib.umm_receiver_connect(self._receiver, connection.detach(), max_bytes)
        self._check(result, "umm_receiver_connect")

    def precopy(self) -> bytes:
        """Receive the rounds, up to the switch; returns the state of the work."""
        text, length = _ffi.new("char **"), _ffi.new("uint32_t *")
        self._check(_lib.umm_receiver_precopy(self._receiver, text, length), "umm_receiver_precopy")
        return bytes(_ffi.buffer(text[0], length[0]))

    def enter(self) -> npt.NDArray[np.uint8]:
        """Let the memory be used before it is complete; a touch of what is missing fetches it."""
        self._check(_lib.umm_receiver_enter(self._receiver), "umm_receiver_enter")
        return self.memory()

    def memory(self) -> npt.NDArray[np.uint8]:
        """The memory as bytes. It is unmapped by :meth:`close`, whoever still holds the array."""
        address = _ffi.cast("char *", _lib.umm_receiver_address(self._receiver))
        return np.frombuffer(_ffi.buffer(address, _lib.umm_receiver_size(self._receiver)), np.uint8)

    def running(self) -> None:
        """Tell the source that the work goes on here; the source starts to stream."""
        self._check(_lib.umm_receiver_running(self._receiver), "umm_receiver_running")

    def await_complete(self, timeout_s: float) -> bool:
        """Whether every page has arrived and was compared, after at most `timeout_s`."""
        result = _lib.umm_receiver_await_complete(self._receiver, max(int(timeout_s * 1000), 1))
        if result < 0 and not self.stats()["error"]:
            return False
        self._check(result, "umm_receiver_await_complete")
        return True

    def finish(self, report: bytes) -> bytes:
        """Send the result of the work (at most 64 KiB), return the source's verdict on it."""
        text, length = _ffi.new("char **"), _ffi.new("uint32_t *")
        result = _lib.umm_receiver_finish(self._receiver, report, len(report), text, length)
        self._check(result, "umm_receiver_finish")
        return bytes(_ffi.buffer(text[0], length[0]))

    def alive(self) -> None:
        """Tell the source that something is still going on here."""
        _lib.umm_receiver_alive(self._receiver)

    def abort(self, reason: str) -> None:
        """Tell the source why this side gives up; whether it can still be told does not matter."""
        _lib.umm_receiver_abort(self._receiver, reason.encode()[:500])

    def stop(self) -> None:
        """End every wait with :class:`Stopped`; pages that are missing fail."""
        _lib.umm_receiver_stop(self._receiver)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around an access to the memory: raises :class:`PagesLost` if it met pages that never arrived.

        Inside the block such pages read as a fill byte (``umm_guard_enter`` in ``native/pager/pager.h``), so
        whatever the block computed from them is to be thrown away; an error that it caused is replaced.
        """
        raise_for(_lib.umm_receiver_guard_enter(self._receiver), "umm_guard_enter", "")
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        lost = _ffi.new("uint64_t *")
        raise_for(_lib.umm_receiver_guard_leave(self._receiver, lost), "umm_guard_leave", "")
        if lost[0]:
            why = text_of(_lib.umm_receiver_error(self._receiver))
            total = self.stats()["lost_pages"]
            raise PagesLost(f"{total} pages of the source never arrived, and the work touched one: {why}")
        if failure is not None:
            raise failure

    def stats(self) -> dict[str, int]:
        """Fields of ``struct umm_receiver_stats``: pages, bytes, nanoseconds."""
        if self._receiver is None:
            raise PostcopyError("the receiver is closed")
        stats = _ffi.new("struct umm_receiver_stats *")
        _lib.umm_receiver_stats(self._receiver, stats)
        return struct_to_dict(stats[0])

    def states(self) -> npt.NDArray[np.uint8]:
        """A copy of the state of each page, ``enum umm_page_state``; empty before the first connection."""
        pages = self.stats()["pages_total"]
        return np.frombuffer(_ffi.buffer(_lib.umm_receiver_states(self._receiver), pages), np.uint8).copy()

    def faults(self) -> FaultReport:
        """Latency of the faults so far; all zero before :meth:`enter`."""
        found = _ffi.new("struct umm_receiver_faults *")
        raise_for(_lib.umm_receiver_faults(self._receiver, found), "umm_region_stats", "")
        stages = {name: int(getattr(found, f"slowest_{name}_ns")) for name in ("queue", "fetch", "install")}
        buckets = found.buckets[0 : found.buckets_used]
        return FaultReport(
            faults=int(found.count),
            p50_ns=int(found.p50_ns),
            p99_ns=int(found.p99_ns),
            p999_ns=int(found.p999_ns),
            slowest_ns=int(found.max_ns),
            slowest_stage=max(stages, key=lambda name: stages[name]) if found.count else "",
            overtaken=int(found.overtaken),
            histogram=tuple((int(b.low), int(b.high), int(b.count)) for b in buckets),
        )

    def close(self) -> None:
        """Close the connections and unmap the memory. Pages that are missing fail first, so nobody hangs."""
        if self._receiver is None:
            return
        result = _lib.umm_receiver_leave(self._receiver)
        _lib.umm_receiver_destroy(self._receiver)
        self._receiver = None
        raise_for(result, "umm_receiver_leave", "")

    def __enter__(self) -> Receiver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


__all__ = ["ConnectionLost", "FaultReport", "PagesLost", "Receiver"]
