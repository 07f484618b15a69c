"""The project under test: where it begins, which of its files travel, and as what image.

It becomes a layer of the guest's root file system, at :data:`PROJECT`, beside the reporter and the driver.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from uspace_mm.errors import InputError, UnsupportedError, UspaceError
from uspace_mm.guest.testing.machine import Place
from uspace_mm.sizes import format_size

PLACE = Place(project="/project", harness="/opt/uspace_mm/testing", python="/usr/bin/python3")
# What pytest and its users take for the top of a project.
MARKS = frozenset(
    {"pyproject.toml", "pytest.ini", ".pytest.ini", "pytest.toml", "tox.ini", "setup.cfg", "setup.py", ".git"}
)
# What is not taken along from a folder that git knows nothing of.
LEFT_OUT = frozenset(
    {".git", ".hg", ".svn", ".venv", "venv", "__pycache__", "build", "dist", "node_modules", ".tox", ".nox"}
    | {".eggs", ".cache", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis"}
)
# Where the code of a project lies beside its top: editable installs of the host do not travel.
SOURCE_FOLDERS = ("src", "lib")
# Never useful in the guest: bytecode of another Python.
_NEVER = frozenset(("__pycache__", ".pytest_cache"))


@dataclass(frozen=True)
class Project:
    """A folder, and the files of it that travel, relative to it; ``total_bytes`` is their content."""

    root: Path
    files: tuple[str, ...]
    total_bytes: int

    def inside(self, path: Path) -> str | None:
        """`path` relative to the project, None when it lies elsewhere."""
        try:
            return path.resolve().relative_to(self.root).as_posix()
        except ValueError:
            return None


def find_root(start: Path) -> Path:
    """The nearest folder from `start` upwards that looks like the top of a project, else `start` itself."""
    start = start.resolve()
    for folder in (start, *start.parents):
        if any((folder / mark).exists() for mark in MARKS):
            return folder
    return start


def source_paths(project: Project) -> tuple[str, ...]:
    """Folders of the project, and itself, that Python in the guest looks into as well."""
    return (".", *(name for name in SOURCE_FOLDERS if (project.root / name).is_dir()))


def load(root: Path) -> Project:
    """The project at `root`; raises :class:`InputError` when that is no folder."""
    root = root.resolve()
    if not root.is_dir():
        raise InputError(f"--project {root}: no such folder")
    names = _git_files(root)
    if names is None:
        names = list(_walk(root, root))
    total = sum((root / name).lstat().st_size for name in names)
    return Project(root, tuple(sorted(names)), total)


def _git_files(root: Path) -> list[str] | None:
    """Tracked files and those that are not ignored; None without git or outside its trees."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        return None
    ignored = [git, "-C", str(root), "check-ignore", "--quiet", "."]
    if subprocess.run(ignored, capture_output=True, stdin=subprocess.DEVNULL).returncode == 0:
        return None  # a folder that git is told not to look into, such as one that a build made
    names = []
    for name in dict.fromkeys(os.fsdecode(part) for part in done.stdout.split(b"\0") if part):
        path = root / name
        if path.is_dir() and not path.is_symlink():  # a submodule, or a repository inside this one
            inner = _git_files(path)
            names += [
                f"{name.rstrip('/')}/{part}" for part in (inner if inner is not None else _walk(path, path))
            ]
        elif _travels(path):
            names.append(name)
    return names


def _walk(folder: Path, root: Path) -> Iterator[str]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in LEFT_OUT and not (path / "pyvenv.cfg").exists():
                yield from _walk(path, root)
        elif _travels(path):
            yield path.relative_to(root).as_posix()


def _travels(path: Path) -> bool:
    try:
        mode = path.lstat().st_mode
    except OSError:  # tracked, but deleted
        return False
    return (stat.S_ISREG(mode) or stat.S_ISLNK(mode)) and not _NEVER.intersection(path.parts)


def make_layer(project: Project, harness: Mapping[str, Path], image: Path) -> None:
    """Write a squashfs `image` with the project and the `harness` (name to file).

    Raises :class:`UnsupportedError` without squashfs-tools, and :class:`UspaceError` when it fails.
    """
    tool = shutil.which("sqfstar")
    if tool is None:
        raise UnsupportedError("lacks: sqfstar (Debian: squashfs-tools)")
    # Uncompressed: it is read once or twice, and the emulated CPU is the slower part.
    # The superblock names a compressor all the same, and our kernels have this one.
    command = [tool, "-quiet", "-no-progress", "-comp", "zstd", "-noI", "-noD", "-noF", "-noX"]
    command += ["-root-mode", "755", str(image)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stderr is not None
        try:
            with (
                process.stdin,
                tarfile.open(fileobj=process.stdin, mode="w|", format=tarfile.PAX_FORMAT) as tar,
            ):
                _fill(tar, project, harness)
        except BrokenPipeError:
            pass  # it says why below
        lines = process.stderr.read().decode(errors="replace").strip().splitlines()
    if process.returncode != 0:
        why = lines[0] if lines else f"exit status {process.returncode}"
        raise UspaceError(f"sqfstar could not write {image} ({format_size(project.total_bytes)}): {why}")


def _fill(tar: tarfile.TarFile, project: Project, harness: Mapping[str, Path]) -> None:
    made: set[str] = set()

    def add(path: Path, name: str) -> None:
        folders = [parent.as_posix() for parent in reversed(Path(name).parents) if parent.as_posix() != "."]
        for folder in folders:
            if folder not in made:
                made.add(folder)
                info = tarfile.TarInfo(folder)
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(info)
        info = tar.gettarinfo(str(path), arcname=name)
        info.uid = info.gid = 0
        info.uname = info.gname = "root"
        if info.islnk():  # two names of one file: sent twice, the other name may not travel
            info.type, info.size = tarfile.REGTYPE, path.stat().st_size
        if info.isreg():
            with path.open("rb") as file:
                tar.addfile(info, file)
        else:
            tar.addfile(info)

    for name, path in harness.items():
        add(path, f"{PLACE.harness}/{name}".lstrip("/"))
    for name in project.files:
        add(project.root / name, f"{PLACE.project}/{name}".lstrip("/"))
    if not project.files:
        info = tarfile.TarInfo(PLACE.project.lstrip("/"))
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(info)
