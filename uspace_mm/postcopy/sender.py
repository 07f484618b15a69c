"""The source's side: see ``native/postcopy/sender.h`` for who may call what when."""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from uspace_mm._native import ffi, lib
from uspace_mm.postcopy.errors import PostcopyError, raise_for

_ffi: Any = ffi
_lib: Any = lib


def struct_to_dict(struct: Any) -> dict[str, int]:
    """The integer fields of a cffi structure, by name."""
    return {name: int(getattr(struct, name)) for name, _ in _ffi.typeof(struct).fields}


def text_of(pointer: Any) -> str:
    """A C string of the core; text of a peer may be anything, so nothing is refused here."""
    return bytes(_ffi.string(pointer)).decode("utf-8", "replace")


class Sender:
    """Moves private anonymous memory of this process to a :class:`~uspace_mm.postcopy.receiver.Receiver`.

    `memory` is an array over it, page aligned in address and size; it must not be unmapped before
    :meth:`close`. `idle_s` is the time without a byte after which the peer counts as dead. Raises
    :class:`UnsupportedError` where written pages cannot be found (before Linux 6.7), and the classes of
    :mod:`uspace_mm.postcopy.errors`. All methods but :meth:`stats`, :meth:`states`, :meth:`alive` and
    :meth:`stop` belong to one thread.
    """

    def __init__(self, memory: npt.NDArray[np.uint8], idle_s: float = 10.0) -> None:
        self._memory = memory
        self._sender: Any = None
        out = _ffi.new("struct umm_sender **")
        result = _lib.umm_sender_create(memory.ctypes.data, memory.nbytes, int(idle_s * 1000), out)
        raise_for(result, "umm_sender_create", "")
        self._sender = out[0]

    def _check(self, result: int, call: str) -> None:
        raise_for(result, call, text_of(_lib.umm_sender_error(self._sender)))

    def accept(self, connection: socket.socket) -> None:
        """Take a connection over and shake hands: the first is the data one, the second the urgent one.

        After an error `connection` is closed, and another may be tried.
        """
        self._check(_lib.umm_sender_accept(self._sender, connection.detach()), "umm_sender_accept")

    @property
    def connections(self) -> int:
        """Connections whose handshake is done, 0 to 2."""
        return self.stats()["connected"]

    def round(self) -> None:
        """Send every page written since the last round (in the first: every page there is)."""
        self._check(_lib.umm_sender_round(self._sender), "umm_sender_round")

    def dirty(self) -> int:
        """Pages that a round would send now."""
        out = _ffi.new("uint64_t *")
        self._check(_lib.umm_sender_dirty(self._sender, out), "umm_sender_dirty")
        return int(out[0])

    def switch(self, stopped_ns: int, state: bytes) -> None:
        """Hand over work that stopped at `stopped_ns` (``time.monotonic_ns()``); `state`: at most 64 KiB."""
        self._check(_lib.umm_sender_switch(self._sender, stopped_ns, state, len(state)), "umm_sender_switch")

    def serve(self, bulk_bytes_per_s: int = 0) -> None:
        """Serve the missing pages until the destination has verified all of them."""
        self._check(_lib.umm_sender_serve(self._sender, bulk_bytes_per_s), "umm_sender_serve")

    def await_finish(self) -> bytes:
        """The destination's report on its work."""
        text, length = _ffi.new("char **"), _ffi.new("uint32_t *")
        self._check(_lib.umm_sender_await_finish(self._sender, text, length), "umm_sender_await_finish")
        return bytes(_ffi.buffer(text[0], length[0]))

    def alive(self) -> None:
        """Tell the destination that something is still going on here; whether it hears it does not matter."""
        _lib.umm_sender_alive(self._sender)

    def verdict(self, text: bytes) -> None:
        """The last message: at most 64 KiB."""
        self._check(_lib.umm_sender_verdict(self._sender, text, len(text)), "umm_sender_verdict")

    def abort(self, reason: str) -> None:
        """Tell the destination why this side gives up; whether it can still be told does not matter."""
        _lib.umm_sender_abort(self._sender, reason.encode()[:500])

    def stop(self) -> None:
        """End every wait of the other methods with :class:`Stopped`."""
        _lib.umm_sender_stop(self._sender)

    def stats(self) -> dict[str, int]:
        """Fields of ``struct umm_sender_stats``: pages, bytes, nanoseconds."""
        if self._sender is None:
            raise PostcopyError("the sender is closed")
        stats = _ffi.new("struct umm_sender_stats *")
        _lib.umm_sender_stats(self._sender, stats)
        return struct_to_dict(stats[0])

    def states(self) -> npt.NDArray[np.uint8]:
        """A copy of the state of each page, ``enum umm_page_state``."""
        pages = self.stats()["pages_total"]
        return np.frombuffer(_ffi.buffer(_lib.umm_sender_states(self._sender), pages), np.uint8).copy()

    def close(self) -> None:
        """Close the connections and stop tracking writes. The memory stays."""
        if self._sender is not None:
            _lib.umm_sender_destroy(self._sender)
            self._sender = None

    def __enter__(self) -> Sender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
