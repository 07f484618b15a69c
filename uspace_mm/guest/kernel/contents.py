"""The bytes of a kernel image, whatever it is packed in: plain, gzip and its like, or an EFI image that
unpacks itself."""

from __future__ import annotations

import bz2
import lzma
import mmap
import os
import shutil
import stat
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from uspace_mm.errors import InputError, UnsupportedError, UspaceError
from uspace_mm.sizes import format_size

# The largest kernels (everything built in, with debugging) are a fifth of this; more is a bomb.
UNPACKED_LIMIT = 512 << 20
_PACKED_LIMIT = UNPACKED_LIMIT
# A vmlinux with all of its debugging information is half of this; a sparse file could take hours to read.
FILE_LIMIT = 2 << 30
# A dictionary above this is not what kernels are packed with (xz's largest preset has 64 MiB).
_MEMORY_LIMIT = 256 << 20
_CHUNK = 1 << 20

_MAGICS = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"BZh", "bzip2"),
    (b"\x5d\x00\x00", "lzma"),
    (b"\x89LZO", "lzo"),
)
_TOOLS = {"zstd": ("zstd", "-dc"), "lz4": ("lz4", "-dc")}


@dataclass(frozen=True)
class Contents:
    """``data`` is the kernel, unpacked. ``packing`` is how the file packs it: "gzip", "zstd in EFI", None
    for not."""

    data: mmap.mmap
    packing: str | None
    file_bytes: int


@contextmanager
def contents(path: Path) -> Iterator[Contents]:
    """Map the kernel in the file at `path`, unpacked in a temporary file where it is packed.

    Memory does not grow with the file. Raises :class:`InputError` for what is no regular file, damaged, or
    larger than :data:`UNPACKED_LIMIT` (not packed: :data:`FILE_LIMIT`), :class:`UnsupportedError` when the
    tool that unpacks it is missing.
    The format of EFI images is that of drivers/firmware/efi/libstub/zboot-header.S.
    """
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(64)
        if len(head) < 64:
            raise InputError(f"{path}: {size} bytes are too short for a kernel image")
        offset, length, kind, where = 0, size, _packing(head), ""
        if head[:2] == b"MZ" and head[4:8] == b"zimg":
            offset, length = struct.unpack_from("<II", head, 8)
            kind = head[24:56].split(b"\0")[0].decode("ascii", "replace")
            where = " in EFI"
            if offset < 64 or offset + length > size:
                raise InputError(
                    f"{path}: an EFI image whose kernel, {length} bytes at {offset}, lies outside of its "
                    f"{size} bytes: the file is truncated or damaged"
                )
        if kind is None:
            if size > FILE_LIMIT:
                raise InputError(
                    f"{path}: {size / 2**30:.1f} GiB, more than {FILE_LIMIT / 2**30:g}: that is no kernel"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield Contents(data, None, size)
            return
        with tempfile.TemporaryFile() as unpacked:
            try:
                _unpack(path, file, offset, length, kind, unpacked)
                unpacked.flush()
            except OSError as error:
                raise UspaceError(
                    f"{path}: cannot unpack it in {tempfile.gettempdir()}: {error.strerror}"
                ) from error
            if unpacked.tell() < 64:
                raise InputError(
                    f"{path}: holds {unpacked.tell()} bytes of {kind}, too few for a kernel image"
                )
            with mmap.mmap(unpacked.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield Contents(data, kind + where, size)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        # A pipe or a terminal would block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{path}: cannot be read: {reason}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path}: not a regular file; give a kernel image")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _packing(head: bytes) -> str | None:
    return next((kind for magic, kind in _MAGICS if head.startswith(magic)), None)


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _unpack(path: Path, file: IO[bytes], offset: int, length: int, kind: str, out: IO[bytes]) -> None:
    file.seek(offset)
    if kind in _TOOLS:
        _unpack_by_tool(path, file, length, kind, out)
        return
    engine: _Decompressor
    if kind == "gzip":
        engine = _Gzip()
    elif kind == "bzip2":
        engine = bz2.BZ2Decompressor()
    elif kind in ("xz", "xzkern", "lzma"):
        engine = lzma.LZMADecompressor(memlimit=_MEMORY_LIMIT)
    else:
        raise InputError(f"{path}: its kernel is packed with {kind!r}, which is not read here")
    left = length
    try:
        while not engine.eof:
            data = b""
            if engine.needs_input:
                data = file.read(min(_CHUNK, left))
                left -= len(data)
                if not data:
                    raise InputError(f"{path}: its {kind} data end too early: the file is truncated")
            # Empty input asks for what the last one holds beyond the limit of the output.
            _write(path, out, engine.decompress(data, _CHUNK))
    except (zlib.error, lzma.LZMAError, OSError, EOFError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{path}: its {kind} data are damaged: {error}") from error


class _Gzip:
    """zlib keeps what exceeds the limit in ``unconsumed_tail``; the others keep it inside."""

    def __init__(self) -> None:
        self._engine = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._engine.eof

    @property
    def needs_input(self) -> bool:
        return not self._engine.unconsumed_tail

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._engine.decompress(self._engine.unconsumed_tail + data, max_length)


def _unpack_by_tool(path: Path, file: IO[bytes], length: int, kind: str, out: IO[bytes]) -> None:
    command = _TOOLS[kind]
    if not shutil.which(command[0]):
        raise UnsupportedError(
            f"lacks: {command[0]} (Debian: apt install {command[0]}); {path} is packed with it"
        )
    # What follows the packed kernel in an EFI image (padding, a signature) would be an error to the tool.
    with tempfile.TemporaryFile() as packed:
        _copy(file, packed, min(length, _PACKED_LIMIT))
        packed.seek(0)
        child = subprocess.Popen(command, stdin=packed, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        with child:
            assert child.stdout is not None
            try:
                while piece := child.stdout.read(_CHUNK):
                    _write(path, out, piece)
            except BaseException:
                child.kill()
                raise
    if child.returncode:
        raise InputError(f"{path}: its {kind} data are damaged or truncated")


def _write(path: Path, out: IO[bytes], piece: bytes) -> None:
    out.write(piece)
    if out.tell() > UNPACKED_LIMIT:
        raise InputError(f"{path}: unpacks to more than {format_size(UNPACKED_LIMIT)}: that is no kernel")


def _copy(source: IO[bytes], to: IO[bytes], length: int) -> None:
    while length and (piece := source.read(min(_CHUNK, length))):
        to.write(piece)
        length -= len(piece)
    to.flush()
