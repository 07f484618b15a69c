"""Unpack the tarball of a kernel's source: only what an arm64 guest needs, nothing outside, no bombs."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.guest.progress import Progress
from uspace_mm.sizes import format_size

# Linux 6.12 has 92,000 files of 1.4 GB in all.
FILES_LIMIT = 300_000
BYTES_LIMIT = 6 << 30
_EXTENSION_LIMIT = 1 << 20
_EXTENSIONS = (b"L", b"K", b"x", b"X", b"g")  # of GNU tar and of POSIX
_MAGICS = (
    (b"\xfd7zXZ\0", ("xz", "-dc", "-T0"), "xz-utils"),
    (b"\x1f\x8b", ("gzip", "-dc"), "gzip"),
    (b"BZh", ("bzip2", "-dc"), "bzip2"),
    (b"\x28\xb5\x2f\xfd", ("zstd", "-dc"), "zstd"),
)
# Code that no guest of ours compiles is half of the files. Makefiles and Kconfig files are kept, they are
# all read.
_NOT_COMPILED = re.compile(
    r"(?:[^/]+/)?(?:"
    r"Documentation/|samples/|sound/|tools/(?:testing|perf)/|arch/(?!arm64/|arm/include/|Kconfig)"
    r"|drivers/(?:accel|comedi|gpu|hid|hwmon|iio|infiniband|media|mtd|pinctrl|platform|regulator|s390|scsi|staging|usb)/"
    r"|drivers/(?:net/(?:ethernet|wireless)|video|watchdog)/"
    r"|fs/(?:bcachefs|btrfs|xfs|ocfs2|smb)/"
    r").*\.(?:c|S|h|rst|txt|yaml|json|dts|dtsi|dtso|sh|py|svg|fuc.*|uc)"
    r"|(?:[^/]+/)?arch/arm64/boot/dts/.*\.dtso?i?"
)


def unpack(path: Path, to: Path, progress: Progress) -> Path:
    """Unpack `path` under `to`, which is made; returns the folder that holds the tree.

    Raises :class:`InputError` for what is no tarball, is damaged, leads out of `to` or exceeds
    :data:`FILES_LIMIT` or :data:`BYTES_LIMIT`; :class:`UnsupportedError` when the tool that unpacks it is
    missing.
    """
    to.mkdir()
    unpacker = _Unpacker(path, to)
    size = path.stat().st_size
    progress(f"unpacking {path.name}", 0.0)
    try:
        with (
            path.open("rb", buffering=0) as file,
            _stream(path, file) as stream,
            tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20, tarinfo=_Member) as archive,
        ):
            for count, member in enumerate(archive):
                unpacker.member(archive, member)
                if count % 500 == 0:
                    # The tool shares the open file, so its place in it is how far it has read.
                    progress(f"unpacking {path.name}", file.tell() / max(1, size))
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path}: not a whole tarball: {error}") from error
    tops = list(to.iterdir())
    return tops[0] if len(tops) == 1 and tops[0].is_dir() else to


class _Member(tarfile.TarInfo):
    """A header whose extension (a long name, attributes) is not larger than any real one: tarfile reads it
    whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)  # type: ignore[arg-type]
        if member.type in _EXTENSIONS and member.size > _EXTENSION_LIMIT:
            raise InputError(
                f"{member.name!r} has a header of {member.size} bytes: this is no tarball of a kernel"
            )
        return member


class _Unpacker:
    def __init__(self, path: Path, to: Path) -> None:
        self._path = path
        self._to = to
        self._folders = {PurePosixPath("."): to}
        self._files = 0
        self._bytes = 0

    def member(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self._files += 1
        self._bytes += member.size
        if self._files > FILES_LIMIT or self._bytes > BYTES_LIMIT:
            raise InputError(
                f"{self._path}: holds more than {FILES_LIMIT} files or {format_size(BYTES_LIMIT)}: "
                "that is no kernel"
            )
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts:
            raise self._refused(name, "leads out of it")
        if _NOT_COMPILED.fullmatch(str(name)):
            return
        try:
            if member.isdir():
                self._folder(name)
            elif member.isfile():
                self._file(archive, member, name)
            elif member.issym():
                inside = os.path.normpath(name.parent / member.linkname)
                if inside.startswith(("/", "..")):
                    raise self._refused(name, f"is a link to {member.linkname}, out of it")
                (self._folder(name.parent) / name.name).symlink_to(member.linkname)
            else:
                raise self._refused(name, "is neither file, folder nor symbolic link")
        except FileExistsError as error:
            raise self._refused(name, "is there twice, or below what is no folder") from error
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise self._refused(name, "has a name that no file can have") from error

    def _file(self, archive: tarfile.TarFile, member: tarfile.TarInfo, name: PurePosixPath) -> None:
        data = archive.extractfile(member)
        assert data is not None
        # "x" neither follows a link nor overwrites.
        with (self._folder(name.parent) / name.name).open("xb") as out:
            shutil.copyfileobj(data, out, 1 << 20)
            if member.mode & 0o100:
                os.fchmod(out.fileno(), 0o755)

    def _folder(self, name: PurePosixPath) -> Path:
        """The folder, made by us: so no part of its path is a link."""
        if name not in self._folders:
            path = self._folder(name.parent) / name.name
            path.mkdir()
            self._folders[name] = path
        return self._folders[name]

    def _refused(self, name: PurePosixPath, why: str) -> InputError:
        return InputError(f"{self._path}: {str(name)!r} {why}; this is no tarball of a kernel")


@contextmanager
def _stream(path: Path, file: io.FileIO) -> Iterator[IO[bytes]]:
    """The tar stream in `file`, unpacked by a process of its own so that both CPUs have work."""
    head = file.read(8)
    file.seek(0)
    found = next(((tool, package) for magic, tool, package in _MAGICS if head.startswith(magic)), None)
    if found is None:
        yield file
        return
    tool, package = found
    if not shutil.which(tool[0]):
        raise UnsupportedError(f"lacks: {tool[0]} (Debian: apt install {package}); {path} is packed with it")
    child = subprocess.Popen(tool, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with child:
        assert child.stdout is not None
        try:
            yield child.stdout
            # The padding after the archive; the tool of one that goes on and on is ended.
            padding = sum(len(child.stdout.read(1 << 16)) for _ in range(64))
            if padding == 64 << 16:
                raise InputError(f"{path}: goes on after the end of its archive")
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        raise InputError(f"{path}: damaged or truncated: {tool[0]} cannot unpack it to its end")
