"""Lays out on the host what goes into the guest: the files to load, with what lies beside them."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from uspace_mm.elf import containers
from uspace_mm.elf.records import FileReport
from uspace_mm.elf.source import DescriptorSource, Source
from uspace_mm.errors import UspaceError

# All of it lies in the guest's memory.
LIMIT_BYTES = 2 << 30
_CHUNK = 1 << 20
_LOADERS = ("libc.so.6", "ld-linux-aarch64.so.1", "libc.musl-aarch64.so.1", "ld-musl-aarch64.so.1")


@dataclass
class Staged:
    """One archive, or one directory's files, below ``root``; ``members`` maps names to paths in it."""

    root: Path
    is_wheel: bool
    members: dict[str, PurePosixPath] = field(default_factory=dict)

    def files(self) -> list[PurePosixPath]:
        """All files below the root, as paths relative to it."""
        return sorted(
            PurePosixPath(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()
        )

    def library_folders(self) -> list[PurePosixPath]:
        """Folders that a loader may look for libraries in: not those with a libc of their own."""
        folders: dict[PurePosixPath, set[str]] = {}
        for path in self.files():
            folders.setdefault(path.parent, set()).add(path.name)
        return [
            folder
            for folder, names in folders.items()
            if any(".so" in name for name in names) and not names & set(_LOADERS)
        ][:32]


class StagingError(UspaceError):
    """The files are too large for a guest, or cannot be laid out."""


def stage(container: str, reports: Iterable[FileReport], beside: Iterable[FileReport], to: Path) -> Staged:
    """Lay out the files of `reports`, all in the file `container`, below the folder `to`.

    `container` is an archive (its members follow after ``!`` in the names of `reports`) or an ELF file
    itself, to which the libraries in `beside` that it needs are added. Raises :class:`StagingError`.
    """
    names = [report.name for report in reports]
    budget = _Budget()
    if names == [container]:
        return _stage_file(container, list(beside), to, budget)
    if zipfile.is_zipfile(container):
        return _stage_zip(container, names, to, budget)
    staged = Staged(to, is_wheel=False)
    for found in containers.find(Path(container)):
        if isinstance(found, containers.Found):
            inside = _inside(found.name[len(container) + 1 :])
            _save(found.source, to / inside, budget)
            if found.name in names:
                staged.members[found.name] = inside
    return staged


def _stage_file(name: str, beside: list[FileReport], to: Path, budget: _Budget) -> Staged:
    staged = Staged(to, is_wheel=False)
    libraries = {Path(report.name).name: report for report in beside if "!" not in report.name}
    libraries |= {
        report.image.soname: report
        for report in beside
        if report.image and report.image.soname and "!" not in report.name
    }
    own = next((report for report in beside if report.name == name), None)
    wanted, done = list(own.image.needed) if own and own.image else [], set[str]()
    _copy(Path(name), to / Path(name).name, budget)
    staged.members[name] = PurePosixPath(Path(name).name)
    while wanted:
        library = wanted.pop()
        if library in done or library not in libraries or library in _LOADERS:
            continue
        done.add(library)
        report = libraries[library]
        if not (to / _inside(library)).exists():
            _copy(Path(report.name), to / _inside(library), budget)
        wanted += report.image.needed if report.image else []
    return staged


def _stage_zip(container: str, names: list[str], to: Path, budget: _Budget) -> Staged:
    staged = Staged(to, is_wheel=True)
    with zipfile.ZipFile(container) as archive:
        for info in archive.infolist():
            if info.is_dir() or info.flag_bits & 1:
                continue
            inside = _inside(info.filename)
            target = to / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as stream, target.open("wb") as file:
                while data := stream.read(_CHUNK):
                    budget.take(len(data))
                    file.write(data)
            if f"{container}!{info.filename}" in names:
                staged.members[f"{container}!{info.filename}"] = inside
    return staged


class _Budget:
    def __init__(self) -> None:
        self.left = LIMIT_BYTES

    def take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise StagingError(f"more than {LIMIT_BYTES >> 30} GiB to load: give fewer files")


def _save(source: Source, target: Path, budget: _Budget) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    position = 0
    with target.open("wb") as file:
        while data := source.read_at(position, _CHUNK):
            budget.take(len(data))
            file.write(data)
            position += len(data)


def _copy(path: Path, target: Path, budget: _Budget) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            _save(DescriptorSource(descriptor), target, budget)
    finally:
        os.close(descriptor)


def _inside(name: str) -> PurePosixPath:
    """`name` as a path that stays below a folder, of names that a file system and the probe take."""
    parts = []
    for part in name.replace("!", "/").split("/"):
        text = "".join(c if c.isprintable() else "_" for c in part)[:200]
        if text not in ("", ".", ".."):
            parts.append(text)
    return PurePosixPath(*parts) if parts else PurePosixPath("file")
