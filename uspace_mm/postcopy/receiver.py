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
    """How faults were served: nanoseconds, from the handler's notice to the wake."""

    faults: int
    p50_ns: int
    p99_ns: int
    p999_ns: int
    slowest_ns: int
    slowest_stage: str
    #: (low, high, count) of each bucket with something in it, bounds in nanoseconds
    histogram: tuple[tuple[int, int, int], ...]


class Receiver:
    """Memory that moves here from a :class:`~uspace_mm.postcopy.sender.Sender`.

    Raises the classes of :mod:`uspace_mm.postcopy.errors`. :meth:`memory` is gone after :meth:`close`.
    """

    def __init__(self, idle_s: float = 10.0) -> None:
        self._receiver: Any = None
        self._pager: Any = None
        self._region: Any = None
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
        options = _ffi.new("struct umm_pager_options *", {"uffd_source": 3})  # any way that works
        out = _ffi.new("struct umm_pager **")
        raise_for(_lib.umm_pager_create(options, out), "umm_pager_create", "")
        self._pager = out[0]
        region = _ffi.new("struct umm_region **")
        result = _lib.umm_receiver_enter(self._receiver, self._pager, region)
        self._region = region[0]
        self._check(result, "umm_receiver_enter")
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
        raise_for(_lib.umm_guard_enter(), "umm_guard_enter", "")
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        lost = _ffi.new("struct umm_lost *")
        _lib.umm_guard_leave(lost)
        if lost.units:
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
        stats = _ffi.new("struct umm_pager_stats *")
        if self._region is not None:
            raise_for(_lib.umm_region_stats(self._region, stats), "umm_region_stats", "")
        latency = stats.latency
        stages = {name: int(getattr(latency, name).max) for name in ("queue", "fetch", "install")}
        low, high = _ffi.new("uint64_t *"), _ffi.new("uint64_t *")
        buckets = []
        counts = np.frombuffer(_ffi.buffer(latency.total.buckets), np.uint64)
        for bucket in np.flatnonzero(counts):
            _lib.umm_histogram_bounds(int(bucket), low, high)
            buckets.append((int(low[0]), int(high[0]), int(counts[bucket])))

        def quantile(q: float) -> int:
            return int(_lib.umm_histogram_quantile(_ffi.addressof(latency.total), q))

        return FaultReport(
            faults=int(latency.total.count),
            p50_ns=quantile(0.5),
            p99_ns=quantile(0.99),
            p999_ns=quantile(0.999),
            slowest_ns=int(latency.total.max),
            slowest_stage=max(stages, key=lambda name: stages[name]) if latency.total.count else "",
            histogram=tuple(buckets),
        )

    def close(self) -> None:
        """Close the connections and unmap the memory. Pages that are missing fail first, so nobody hangs."""
        if self._receiver is None:
            return
        _lib.umm_receiver_stop(self._receiver)
        _lib.umm_receiver_join(self._receiver)
        if self._region is not None:
            raise_for(_lib.umm_region_close(self._region), "umm_region_close", "")
            self._region = None
        _lib.umm_receiver_destroy(self._receiver)
        self._receiver = None
        if self._pager is not None:
            raise_for(_lib.umm_pager_destroy(self._pager), "umm_pager_destroy", "")
            self._pager = None

    def __enter__(self) -> Receiver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


__all__ = ["ConnectionLost", "FaultReport", "PagesLost", "Receiver"]
