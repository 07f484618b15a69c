"""What is fed to a command's stdin, in pieces no larger than what the other side has room for."""

from __future__ import annotations

import os
from typing import IO

_READ_BYTES = 64 << 10


class Feed:
    """Bytes, or what is read from a descriptor; `source` None is no stdin at all.

    A descriptor is read only once it was found readable, so that nothing waits for it.
    """

    def __init__(self, source: IO[bytes] | int | bytes | None) -> None:
        self.is_empty = source is None
        #: To wait for with poll(2), while there may be more to read; else None.
        self.descriptor: int | None = None
        self._data = b""
        self._ended = source is None
        self._end_told = source is None
        if isinstance(source, bytes):
            self._data, self._ended = source, True
        elif source is not None:
            self.descriptor = source if isinstance(source, int) else source.fileno()

    def read(self) -> None:
        """Read what the descriptor has; call when it is readable."""
        if self.descriptor is None or self._data:
            return
        try:
            self._data = os.read(self.descriptor, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:  # a terminal that hung up: no more will come
            self._data = b""
        if not self._data:
            self.descriptor, self._ended = None, True

    def take(self, room: int) -> bytes | None:
        """Up to `room` bytes to send now; after the last, once, b"" for the end; None: there is nothing."""
        if self._data:
            part, self._data = self._data[:room], self._data[room:]
            return part or None
        if self._ended and not self._end_told:
            self._end_told = True
            return b""
        return None
