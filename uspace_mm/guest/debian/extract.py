"""Unpack a ``.deb`` without root and without its scripts, never outside of the given directory."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from uspace_mm.errors import InputError, UnsupportedError

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60
_MEMBERS = ("data.tar", "data.tar.gz", "data.tar.xz", "data.tar.bz2", "data.tar.zst")


def extract(deb: Path, to: Path, *, only: Callable[[str], bool] | None = None) -> None:
    """Unpack the files of `deb` under `to`, which may hold others already (a symlink to a directory stays).

    `only` is asked about each path (``usr/bin/python3``, no leading slash); directories are made as needed.
    Owners are not kept, times and rights are. Raises :class:`InputError` for a damaged package and for one
    whose paths or links lead out of `to`, :class:`UnsupportedError` where zstd is needed and missing.
    """
    to.mkdir(parents=True, exist_ok=True)
    unpack = _Unpacker(deb, to.resolve())
    try:
        with _data(deb) as stream, tarfile.open(fileobj=stream, mode="r|*") as archive:
            for member in archive:
                name = member.name.removeprefix("./").rstrip("/")
                if name in ("", "."):
                    continue
                if only is None or only(name):
                    unpack.member(archive, member, name)
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{deb}: not a whole Debian package: {error}") from error
    unpack.finish()


class _Unpacker:
    def __init__(self, deb: Path, root: Path) -> None:
        self._deb = deb
        self._root = root
        self._parents: set[Path] = set()
        self._modes: dict[Path, int] = {}

    def member(self, archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> None:
        path = self._inside(name)
        if member.isdir():
            if not path.is_dir():
                path.mkdir()
            # Set at the end: nothing can be unpacked into a directory without the right to write.
            self._modes[path] = member.mode & 0o7777
            return
        if path.is_symlink() or path.is_file():
            path.unlink()
        if member.issym():
            path.symlink_to(member.linkname)
        elif member.islnk():
            target = self._inside(member.linkname.removeprefix("./"))
            os.link(target, path, follow_symlinks=False)
        elif member.isfile():
            source = archive.extractfile(member)
            assert source is not None
            with path.open("xb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                os.fchmod(file.fileno(), member.mode & 0o7777)
            os.utime(path, (member.mtime, member.mtime))
        else:
            raise InputError(f"{self._deb}: {name} is a device or pipe, which no package of ours has")

    def finish(self) -> None:
        for path, mode in self._modes.items():
            path.chmod(mode | 0o700)

    def _inside(self, name: str) -> Path:
        """Where `name` lies under the root, its directory made; links on the way must not lead out."""
        path = self._root / name
        if name.startswith("/") or ".." in Path(name).parts:
            raise InputError(f"{self._deb}: the path {name!r} leads out of the package")
        if path.parent not in self._parents:
            # An absolute link would mean the host's file here: resolve() follows it, and it is refused.
            if not path.parent.resolve().is_relative_to(self._root):
                raise InputError(f"{self._deb}: the path {name!r} leads through a link out of {self._root}")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._parents.add(path.parent)
        return path


@contextmanager
def _data(deb: Path) -> Iterator[IO[bytes]]:
    """The tar stream with the package's files: by dpkg-deb, or without it by ar, tar and zstd."""
    if not shutil.which("dpkg-deb"):
        with _member(deb) as stream:
            yield stream
        return
    with _filtered(["dpkg-deb", "--fsys-tarfile", str(deb)], deb, None) as stream:
        yield stream


@contextmanager
def _member(deb: Path) -> Iterator[IO[bytes]]:
    with deb.open("rb") as file:
        if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
            raise InputError(f"{deb}: not a Debian package")
        while header := file.read(_AR_HEADER):
            if len(header) < _AR_HEADER or header[58:] != b"`\n":
                raise InputError(f"{deb}: not a whole Debian package")
            name, size = header[:16].decode("latin-1").strip().rstrip("/"), int(header[48:58])
            if name not in _MEMBERS:
                file.seek(size + size % 2, os.SEEK_CUR)
                continue
            data = file.read(size)
            if len(data) < size:
                raise InputError(f"{deb}: not a whole Debian package")
            if not name.endswith(".zst"):
                yield io.BytesIO(data)
                return
            if not shutil.which("zstd"):
                raise UnsupportedError(f"lacks: zstd (Debian: zstd); {deb.name} is packed with it")
            # Descriptor to descriptor, so that no thread is needed to feed the pipe.
            file.seek(-size, os.SEEK_CUR)
            with _filtered(["zstd", "-dc"], deb, file) as stream:
                yield stream
            return
    raise InputError(f"{deb}: a Debian package without files (no data.tar)")


@contextmanager
def _filtered(command: list[str], deb: Path, stdin: IO[bytes] | None) -> Iterator[IO[bytes]]:
    if stdin is not None:
        os.lseek(stdin.fileno(), stdin.tell(), os.SEEK_SET)
    child = subprocess.Popen(
        command, stdin=stdin or subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None and child.stderr is not None
        try:
            yield child.stdout
            while child.stdout.read(1 << 20):  # what follows the end of the archive
                pass
            said = child.stderr.read().decode(errors="replace").strip().splitlines()
            child.wait()
        except BaseException as error:
            child.kill()
            if isinstance(error, tarfile.TarError):
                said = child.stderr.read().decode(errors="replace").strip().splitlines()
                if said:
                    raise InputError(f"{deb}: {said[-1].removeprefix('dpkg-deb: error: ')}") from error
            raise
    if child.returncode:
        raise InputError(f"{deb}: {said[-1].removeprefix('dpkg-deb: error: ') if said else 'damaged'}")
