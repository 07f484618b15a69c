"""Finds the ELF files under paths: in directories, wheels, zips, Debian packages, tars, images and their
layers.

What a file is, its first bytes say. Archives are read forward, one member at a time; a member that is an
ELF file or an archive itself is unpacked into memory or, when larger, a temporary file, and is gone when
the next one is asked for.
"""

from __future__ import annotations

import lzma
import os
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from uspace_mm.elf import image
from uspace_mm.elf.decompress import DamagedError, ForwardFile, compression_of, open_stream
from uspace_mm.elf.limits import Budget, Limits, RefusedError, Total
from uspace_mm.elf.records import Problem
from uspace_mm.elf.source import DescriptorSource, OversizeError, Source, SourceReader
from uspace_mm.errors import InputError

_HEAD = 512  # enough to tell a tar


@dataclass(frozen=True, slots=True)
class Found:
    """An ELF file; ``source`` can be read until the next one is asked for."""

    name: str
    source: Source


def find(path: Path, limits: Limits | None = None) -> Iterator[Found | Problem]:
    """The ELF files at or under `path`, and what could not be looked into.

    Links inside a directory are not followed (what they name is found where it lies, or is not part of the
    directory), special files are not opened, a file with several names is judged once. Raises
    :class:`~uspace_mm.errors.InputError` when `path` does not exist.
    """
    limits = limits or Limits()
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file or a directory") from error
    except ValueError as error:
        raise InputError(f"{str(path)!r}: {error}") from error
    if stat.S_ISDIR(status.st_mode):
        yield from _directory(path, limits, Total(limits))
    elif stat.S_ISREG(status.st_mode):
        yield from _file(path, str(path), limits, Total(limits))
    else:
        yield Problem(str(path), "neither a file nor a directory: not opened")


def _directory(top: Path, limits: Limits, total: Total) -> Iterator[Found | Problem]:
    seen: set[tuple[int, int]] = set()
    problems: list[Problem] = []

    def failed(error: OSError) -> None:
        problems.append(Problem(os.fspath(error.filename), f"cannot be listed: {error.strerror}"))

    for folder, folders, names in os.walk(top, onerror=failed):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            try:
                status = path.lstat()
            except OSError as error:
                problems.append(Problem(str(path), f"cannot be read: {error.strerror}"))
                continue
            if not stat.S_ISREG(status.st_mode) or (status.st_dev, status.st_ino) in seen:
                continue
            if status.st_nlink > 1:
                seen.add((status.st_dev, status.st_ino))
            yield from _file(path, str(path), limits, total)
        yield from problems
        problems.clear()
    yield from problems


def _file(path: Path, name: str, limits: Limits, total: Total) -> Iterator[Found | Problem]:
    try:
        # O_NONBLOCK: should it have become a FIFO since, opening it does not wait.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        yield Problem(name, f"cannot be read: {error.strerror}")
        return
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            source = DescriptorSource(descriptor)
            yield from _open(source, name, Budget(limits, source.size, total), 0)
    except OSError as error:
        yield Problem(name, f"cannot be read: {error.strerror or error}")
    finally:
        os.close(descriptor)


def _open(source: Source, name: str, budget: Budget, depth: int) -> Iterator[Found | Problem]:
    head = source.read_at(0, _HEAD)
    if head.startswith(image.MAGIC):
        yield Found(name, source)
        return
    reader = _reader_of(head)
    if reader is None:
        return
    if depth >= budget.limits.depth:
        yield Problem(name, f"archives in archives, more than {budget.limits.depth} deep: not opened")
        return
    try:
        yield from reader(source, name, budget, depth)
    except (DamagedError, RefusedError, OversizeError) as error:
        yield Problem(name, str(error))
        if depth and (budget.left < 0 or budget.members < 0):
            raise _SpentError from error
    except _SpentError:
        if depth:
            raise
    except (zipfile.BadZipFile, tarfile.TarError, NotImplementedError, EOFError, zlib.error) as error:
        yield Problem(name, f"damaged archive: {error}")
    except (ValueError, KeyError, IndexError, OverflowError, RuntimeError, MemoryError) as error:
        # What zipfile and tarfile let through on archives made to hurt.
        yield Problem(name, f"damaged archive: {type(error).__name__}: {error}")


class _SpentError(Exception):
    """The budget of the whole path is used up; the reason has been told."""


_Reader = Callable[[Source, str, Budget, int], Iterator["Found | Problem"]]


def _reader_of(head: bytes) -> _Reader | None:
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return _zip
    if head.startswith(b"!<arch>\ndebian-binary"):
        return _deb
    if compression_of(head):
        return _compressed
    if head[257:262] == b"ustar":
        return _plain_tar
    return None


def _wanted(head: bytes) -> bool:
    return head.startswith(image.MAGIC) or _reader_of(head) is not None


def _zip(source: Source, name: str, budget: Budget, depth: int) -> Iterator[Found | Problem]:
    with zipfile.ZipFile(SourceReader(source, limit=budget.limits.table_bytes)) as archive:
        for info in archive.infolist():
            budget.count()
            if info.is_dir():
                continue
            member = f"{name}!{info.filename}"
            if info.flag_bits & 1:
                yield Problem(member, "encrypted: cannot be read")
                continue
            try:
                # bz2 and lzma have no bound on what one piece of input becomes: small pieces.
                piece = 1 << 20 if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else _HEAD
                with archive.open(info) as stream:
                    unpacked = _unpack(stream.read, member, budget, piece)
            except NotImplementedError as error:
                yield Problem(member, f"cannot be unpacked: {error}")
                continue
            except (zipfile.BadZipFile, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
                yield Problem(member, f"damaged: {error}")
                continue
            yield from _member(unpacked, member, budget, depth)


def _deb(source: Source, name: str, budget: Budget, depth: int) -> Iterator[Found | Problem]:
    """deb(5): an ar archive; the files are in data.tar, compressed or not."""
    position = 8
    while position + 60 <= source.size:
        budget.count()
        header = source.read_at(position, 60)
        if header[58:60] != b"`\n" or not header[48:58].strip().isdigit():
            raise DamagedError(f"damaged: no member header at {position:#x}")
        length = int(header[48:58])
        position += 60
        if header.startswith(b"data.tar"):
            if position + length > source.size:
                yield Problem(name, "truncated: data.tar goes past the end of the package")
            compression = compression_of(source.read_at(position, 16))
            if compression:
                stream = open_stream(source, position, length, compression, budget)
            else:
                stream = _forward(source, position, length, budget)
            yield from _tar(stream, name, budget, depth)
        position += length + length % 2


def _compressed(source: Source, name: str, budget: Budget, depth: int) -> Iterator[Found | Problem]:
    compression = compression_of(source.read_at(0, 16)) or ""
    stream = open_stream(source, 0, source.size, compression, budget)
    head = stream.read(_HEAD)
    stream.seek(0)
    if head[257:262] == b"ustar":
        yield from _tar(stream, name, budget, depth)
    elif _wanted(head):
        yield from _member(_unpack(stream.read, name, budget, 1 << 20, paid=True), name, budget, depth)


def _plain_tar(source: Source, name: str, budget: Budget, depth: int) -> Iterator[Found | Problem]:
    yield from _tar(_forward(source, 0, source.size, budget), name, budget, depth)


def _forward(source: Source, start: int, length: int, budget: Budget) -> ForwardFile:
    reader = SourceReader(source, start=start, length=length, limit=budget.limits.table_bytes)
    return ForwardFile(reader.read, budget)


def _tar(stream: ForwardFile, name: str, budget: Budget, depth: int) -> Iterator[Found | Problem]:
    with tarfile.open(fileobj=stream, mode="r:", errorlevel=1) as archive:
        while (info := archive.next()) is not None:
            # It keeps a record of every member, which nobody asks for again.
            archive.members.clear()  # type: ignore[attr-defined]
            budget.count()
            if not info.isreg() or info.size < 16:
                continue
            member = f"{name}!{info.name.removeprefix('./')}"
            content = archive.extractfile(info)
            if content is None:
                continue
            with closing(content):
                unpacked = _unpack(content.read, member, budget, 1 << 20, paid=True)
            yield from _member(unpacked, member, budget, depth)


def _unpack(
    read: Callable[[int], bytes], name: str, budget: Budget, piece: int, *, paid: bool = False
) -> Source | Problem | None:
    """What `read` yields, when it is an ELF file or an archive; `paid`: the stream counts its bytes."""
    head = read(_HEAD)
    while head and len(head) < _HEAD and (more := read(_HEAD - len(head))):
        head += more
    if not paid:
        budget.unpack(len(head))
    if not _wanted(head):
        return None
    source = _Spooled(budget.limits.memory_bytes)
    try:
        data = head
        while data:
            source.append(data)
            if source.size > budget.limits.member_bytes:
                source.close()
                return Problem(name, f"larger than {budget.limits.member_bytes >> 20} MiB: not unpacked")
            data = read(piece)
            if not paid:
                budget.unpack(len(data))
    except BaseException:
        source.close()
        raise
    return source


def _member(
    unpacked: Source | Problem | None, name: str, budget: Budget, depth: int
) -> Iterator[Found | Problem]:
    if isinstance(unpacked, Problem):
        yield unpacked
    elif isinstance(unpacked, _Spooled):
        with closing(unpacked):
            yield from _open(unpacked, name, budget, depth + 1)


def _temporary(memory_bytes: int) -> tempfile.SpooledTemporaryFile[bytes]:
    return tempfile.SpooledTemporaryFile(max_size=memory_bytes, prefix="uspace-mm-elf-")


class _Spooled:
    """An unpacked member: in memory while it is small."""

    def __init__(self, memory_bytes: int) -> None:
        self.size = 0
        self._file = _temporary(memory_bytes)

    def append(self, data: bytes) -> None:
        self._file.seek(self.size)
        self._file.write(data)
        self.size += len(data)

    def read_at(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset >= self.size:
            return b""
        self._file.seek(offset)
        return self._file.read(min(length, self.size - offset))

    def close(self) -> None:
        self._file.close()
