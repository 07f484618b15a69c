"""The layers that a caller asks for: more Debian packages, more wheels, directories of files."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from uspace_mm.errors import InputError
from uspace_mm.guest import cache
from uspace_mm.guest.debian import check_name
from uspace_mm.guest.progress import Progress, silent
from uspace_mm.guest.rootfs import base, bytecode, image, wheels
from uspace_mm.guest.rootfs.packages import Set, identity, obtain_again, unpack_all, wanted_in_guest
from uspace_mm.guest.rootfs.remember import remembered
from uspace_mm.guest.rootfs.sources import makers
from uspace_mm.guest.rootfs.target import NOT_NEEDED, USER_SITE

# In the guest these are links into usr, which a directory of the same name in a layer would hide.
_MERGED = ("bin", "sbin", "lib", "lib64")


def check(
    packages: Sequence[str], files: Sequence[Path], names: Sequence[str], directories: Sequence[Path]
) -> None:
    """Raises :class:`InputError` for what can be seen to be wrong without asking anybody."""
    for package in packages:
        check_name(package)
    wheels.Wheels(names, files)
    for directory in directories:
        if not directory.is_dir():
            raise InputError(f"overlay {directory}: no such directory")


def of_packages(names: Sequence[str], progress: Progress = silent) -> Path:
    """An image with the Debian packages `names` and what they need beyond the base."""

    def wanted() -> Set:
        exclude: list[object] = [*base.resolve(progress), *NOT_NEEDED]
        return Set(names, dependencies=True, exclude=exclude)  # type: ignore[arg-type]

    def make(entry: Path) -> None:
        started_s = image.start()
        debs = wanted().fetch(progress)
        with tempfile.TemporaryDirectory(dir=entry) as folder:
            tree = Path(folder) / "tree"
            tree.mkdir()
            unpack_all(debs, tree, progress, wanted_in_guest)
            _merge_usr(tree)
            base.certificates(tree)
            image.normalise(tree, started_s)
            bytecode.compile_tree(tree, progress)
            image.pack(tree, entry / image.NAME, started_s, progress)

    def inputs(afresh: bool) -> dict[str, object]:
        return {
            "packages": identity(wanted().resolve(progress, afresh=afresh)),
            **_makers(progress, "packages", "base"),
        }

    return obtain_again("root-packages", inputs, make, progress) / image.NAME


def of_wheels(files: Sequence[Path], names: Sequence[str], progress: Progress = silent) -> Path:
    """An image with the wheels `files`, what pip finds for `names`, and what they need beyond the base."""
    wanted = wheels.Wheels(names, files, present=wheels.base())

    def make(entry: Path) -> None:
        started_s = image.start()
        found = wanted.fetch(progress)
        with tempfile.TemporaryDirectory(dir=entry) as folder:
            tree = Path(folder) / "tree"
            tree.mkdir()
            wheels.unpack(found, tree, USER_SITE, "usr/local/bin", progress)
            image.normalise(tree, started_s)
            bytecode.compile_tree(tree, progress)
            image.pack(tree, entry / image.NAME, started_s, progress)

    def inputs(_: bool) -> dict[str, object]:
        return {"wheels": wanted.identity(progress), **_makers(progress, "wheels", "pip")}

    return obtain_again("root-wheels", inputs, make, progress) / image.NAME


def of_directory(directory: Path, progress: Progress = silent) -> Path:
    """An image with the files of `directory` (``__pycache__`` is left out) for the root of the guest."""
    check([], [], [], [directory])
    progress(f"looking through {directory}")
    listed = sorted(_entries(directory), key=lambda entry: (entry[0], entry[2]))

    def make(entry: Path) -> None:
        started_s = image.start()
        with tempfile.TemporaryDirectory(dir=entry) as folder:
            tree = Path(folder) / "tree"
            tree.mkdir()
            for number, (name, status, path) in enumerate(listed):
                if number % 500 == 0:
                    progress(f"copying {directory}", number / len(listed))
                _copy(path, status, tree / name)
            for name, status, _ in reversed(listed):
                if stat.S_ISDIR(status.st_mode):
                    (tree / name).chmod(stat.S_IMODE(status.st_mode))
            bytecode.compile_tree(tree, progress)
            image.pack(tree, entry / image.NAME, started_s, progress, readable=False)

    inputs = {
        "files": _digest(listed),
        **_makers(progress),
    }
    return cache.obtain("root-overlay", inputs, make, progress=progress) / image.NAME


def _makers(progress: Progress, *modules: str) -> dict[str, object]:
    return {
        "bytecode": identity(bytecode.host_python().resolve(progress)),
        "image": image.identity(),
        "makers": makers("layers", "bytecode", "image", "target", *modules),
    }


def _entries(directory: Path) -> Iterator[tuple[str, os.stat_result, Path]]:
    """What lies under `directory`, parents first: its path in the guest, its status, where it is."""
    pending = [(directory, "")]
    while pending:
        folder, prefix = pending.pop()
        try:
            children = sorted(os.scandir(folder), key=lambda child: child.name)
        except PermissionError as error:
            raise InputError(f"overlay: {folder} cannot be read: {error.strerror}") from error
        for child in children:
            name = f"{prefix}{child.name}"
            status = child.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                if child.name == "__pycache__":
                    continue
                if name in _MERGED:
                    name = f"usr/{name}"
                pending.append((Path(child.path), f"{name}/"))
            elif not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
                raise InputError(f"overlay: {child.path} is a device, pipe or socket: remove it from there")
            yield name, status, Path(child.path)


def _digest(listed: Sequence[tuple[str, os.stat_result, Path]]) -> str:
    """Digest of names, rights, times and bytes; these are read only when some file's status changed."""
    seen = [
        [
            os.fsencode(name).hex(),
            status.st_mode,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_ino,
        ]
        for name, status, _ in listed
    ]

    def read() -> str:
        return cache.digest_of({"files": [_describe(*item) for item in listed]})

    # A file written to within the clock's grain of its last look would look the same.
    newest_ns = max((status.st_ctime_ns for _, status, _ in listed), default=0)
    fresh = time.time_ns() - newest_ns < 2_000_000_000
    return read() if fresh else str(remembered("overlay", {"seen": seen}, read))


def _describe(name: str, status: os.stat_result, path: Path) -> list[object]:
    if stat.S_ISLNK(status.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(status.st_mode):
        content = cache.digest_file(path)
    else:
        content = ""
    # Times are part of a file: compiled modules refer to them.
    return [os.fsencode(name).hex(), status.st_mode, int(status.st_mtime), content]


def _copy(source: Path, status: os.stat_result, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if stat.S_ISDIR(status.st_mode):
        to.mkdir(exist_ok=True)
        return
    to.unlink(missing_ok=True)  # both bin/NAME and usr/bin/NAME
    if stat.S_ISLNK(status.st_mode):
        to.symlink_to(os.readlink(source))
    else:
        try:
            shutil.copyfile(source, to)
        except PermissionError as error:
            raise InputError(f"overlay: {source} cannot be read: {error.strerror}") from error
        to.chmod(stat.S_IMODE(status.st_mode))
        os.utime(to, ns=(status.st_mtime_ns, status.st_mtime_ns))


def _merge_usr(tree: Path) -> None:
    for name in _MERGED:
        if (tree / name).is_dir() and not (tree / name).is_symlink():
            shutil.copytree(tree / name, tree / "usr" / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(tree / name)
