"""Compressed streams (gzip, bzip2, xz, zstd) as file objects that are read forward in bounded memory."""

from __future__ import annotations

import bz2
import io
import lzma
import os
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol, cast

from uspace_mm.elf.limits import Budget, RefusedError
from uspace_mm.elf.source import Source

MAGICS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_CHUNK = 1 << 16
# Reads before this much of what was read last are possible: tarfile looks one byte back.
_KEPT = 1 << 10


class DamagedError(Exception):
    """A compressed stream or an archive that cannot be read on; the text says why."""


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's object with the interface of bz2's and lzma's, which keep input not used yet."""

    def __init__(self) -> None:
        self._object = zlib.decompressobj(wbits=31)
        self._full = False

    @property
    def eof(self) -> bool:
        return self._object.eof

    @property
    def needs_input(self) -> bool:
        return not self._full and not self._object.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._object.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._object.decompress(self._object.unconsumed_tail + data, max_length)
        self._full = len(out) == max_length
        return out


class _Zstd:
    """zstandard's object, which has no bound on what it returns: it gets its input in small pieces.

    A block of 4 bytes becomes 128 KiB at most (RFC 8878, 3.1.1.2), so a piece becomes 32 MiB at most.
    """

    _PIECE = 1 << 10

    def __init__(self, window_bytes: int) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._object = zstandard.ZstdDecompressor(max_window_size=window_bytes).decompressobj()
        self._input = b""
        self._output = memoryview(b"")

    @property
    def eof(self) -> bool:
        return self._object.eof and not self._output

    @property
    def needs_input(self) -> bool:
        return not self._output and not self._input

    @property
    def unused_data(self) -> bytes:
        return self._object.unused_data + self._input

    def decompress(self, data: bytes, max_length: int) -> bytes:
        self._input += data
        if not self._output and not self._object.eof:
            piece, self._input = self._input[: self._PIECE], self._input[self._PIECE :]
            try:
                self._output = memoryview(self._object.decompress(piece))
            except self._error as error:
                raise ValueError(str(error)) from error
        out, self._output = self._output[:max_length], self._output[max_length:]
        return bytes(out)


def compression_of(head: bytes) -> str | None:
    """The name of the compression that begins with `head`, None when it is none of ours."""
    return next((name for magic, name in MAGICS.items() if head.startswith(magic)), None)


def open_stream(source: Source, start: int, length: int, name: str, budget: Budget) -> ForwardFile:
    """The bytes that `length` compressed bytes of `source` from `start` on stand for.

    `name` is what :func:`compression_of` said. Reading raises :class:`DamagedError`, and
    :class:`~uspace_mm.elf.limits.RefusedError` when it is more than `budget` allows.
    """
    if name == "zstd" and find_spec("zstandard") is None:
        raise RefusedError("compressed with zstd: install the Python package zstandard")
    make: dict[str, Callable[[], object]] = {
        "gzip": _Gzip,
        "bzip2": bz2.BZ2Decompressor,
        "zstd": lambda: _Zstd(budget.limits.decoder_bytes >> 1),
        "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=budget.limits.decoder_bytes),
    }
    factory = cast("Callable[[], _Decoder]", make[name])
    return ForwardFile(_Streams(source, start, length, name, factory).read, budget)


class _Streams:
    """Streams one after the other, as pigz, Alpine's packages and some xz files have them."""

    def __init__(
        self, source: Source, start: int, length: int, name: str, make: Callable[[], _Decoder]
    ) -> None:
        self._source = source
        self._position = start
        self._end = min(start + length, source.size)
        self._name = name
        self._make = make
        self._decoder: _Decoder | None = None
        self._pending = b""
        self._ended = False
        self._any = False

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none at the end."""
        while not self._ended:
            if self._decoder is None:
                self._fill()
                self._pending = self._pending.lstrip(b"\0")  # padding between streams
                if self._any and compression_of(self._pending) != self._name:
                    self._ended = True  # what follows the last stream is ignored, as gzip and tar do
                    break
                self._decoder = self._make()
            if self._decoder.needs_input:
                self._fill()
                if not self._pending:
                    raise DamagedError("truncated: the compressed data ends too early")
            try:
                out = self._decoder.decompress(self._pending, size)
            except (OSError, zlib.error, lzma.LZMAError, EOFError, ValueError) as error:
                if "memory" in str(error).lower():  # xz: usage limit reached; zstd: requires too much
                    raise RefusedError("wants more memory to be unpacked than the audit grants") from error
                raise DamagedError(f"damaged: {error}") from error
            self._pending = b""
            if self._decoder.eof:
                self._pending = self._decoder.unused_data
                self._decoder = None
                self._any = True
            if out:
                return out
        return b""

    def _fill(self) -> None:
        if len(self._pending) < 16 and self._position < self._end:
            data = self._source.read_at(self._position, min(_CHUNK, self._end - self._position))
            if not data:
                self._end = self._position  # the file became shorter
            self._position += len(data)
            self._pending += data


class ForwardFile(io.RawIOBase):
    """A file object over a stream that only goes forward; seeking ahead reads, a little way back is kept.

    No single read is larger than the limit for tables: honest archives are read in pieces.
    """

    def __init__(self, read: Callable[[int], bytes], budget: Budget) -> None:
        self._read = read
        self._budget = budget
        self._kept = b""  # the bytes before _end
        self._end = 0  # how much was taken from the stream
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset += self._position
        elif whence == os.SEEK_END:
            raise OSError("the end of a stream is not known")
        if offset < self._end - len(self._kept):
            raise OSError("a stream cannot be read again")
        while self._end < offset:
            if not self._pull(min(offset - self._end, _CHUNK)):
                break
        self._position = min(offset, self._end)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0 or size > self._budget.limits.table_bytes:
            raise RefusedError(
                f"claims a table of {size} bytes, the audit reads {self._budget.limits.table_bytes} at most"
            )
        parts = []
        if self._position < self._end:
            begin = len(self._kept) - (self._end - self._position)
            parts.append(self._kept[begin : begin + size])
            self._position += len(parts[0])
            size -= len(parts[0])
        while size > 0:
            data = self._pull(min(size, 1 << 20))
            if not data:
                break
            parts.append(data)
            size -= len(data)
            self._position = self._end
        return b"".join(parts)

    def _pull(self, size: int) -> bytes:
        data = self._read(size)
        self._budget.unpack(len(data))
        self._end += len(data)
        self._kept = data[-_KEPT:] if len(data) >= _KEPT else (self._kept + data)[-_KEPT:]
        return data
