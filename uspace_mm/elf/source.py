"""Bytes to judge: a file, or a member of an archive that was unpacked into a temporary one."""

from __future__ import annotations

import io
import os
from typing import Protocol


class Source(Protocol):
    """Something of known size that can be read anywhere; reads past the end are short."""

    @property
    def size(self) -> int: ...

    def read_at(self, offset: int, length: int) -> bytes: ...


class DescriptorSource:
    """A regular file behind a descriptor, which stays the caller's."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`, fewer at the end of the file (which may have moved since)."""
        if offset < 0 or offset >= self.size:
            return b""
        parts = []
        while length > 0:
            part = os.pread(self.descriptor, min(length, 1 << 24), offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)


class BytesSource:
    """Bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def read_at(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length] if offset >= 0 else b""


class SourceReader(io.RawIOBase):
    """A seekable file object over a source that refuses to read more than `limit` bytes at once.

    ``zipfile`` and ``tarfile`` read tables of the length that the archive claims; this is where the claim
    ends.
    """

    def __init__(self, source: Source, *, start: int = 0, length: int | None = None, limit: int) -> None:
        self._source = source
        self._start = start
        self._length = source.size - start if length is None else length
        self._limit = limit
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("seek to before the start")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._length - self._position, 0)
        size = left if size is None or size < 0 else min(size, left)
        if size > self._limit:
            raise OversizeError(f"a table of {size} bytes, the audit reads {self._limit} at most")
        data = self._source.read_at(self._start + self._position, size)
        self._position += len(data)
        return data


class OversizeError(Exception):
    """An archive claims a table that is larger than any honest one."""
