"""Packs a tree into a read-only image: squashfs with lz4, which is cheapest to read under emulation.

Measured (QEMU 7.2, TCG, processor time of a boot, ``import numpy`` and one pytest, 64K and 4K pages): lz4 4.9
and 6.1 s, not compressed 5.6 and 6.0 s, zstd 5.7 and 6.7 s. Blocks of less than 64 KiB cannot be mounted with
64K pages; 64 KiB and 1 MiB were slower than 128 KiB. -Xhc saves a sixth of the size for ten times the time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from uspace_mm.errors import UnsupportedError, UspaceError
from uspace_mm.guest import cache
from uspace_mm.guest.progress import Progress, silent

NAME = "root.squashfs"
# Files that were made just now get this time, so that the same input gives the same image.
TIME_S = 1735689600
_OPTIONS = ("-comp", "lz4", "-b", "131072")


def identity() -> dict[str, object]:
    """What the image depends on besides the tree. An image that another version of mksquashfs packed does as
    well: that of another machine, in a container, is taken as it is."""
    return {"options": _OPTIONS}


def start() -> float:
    """The time since which what is written counts as made now, for :func:`pack`.

    Raises :class:`UnsupportedError` without mksquashfs, before anything is fetched or made.
    """
    if not shutil.which("mksquashfs"):
        raise UnsupportedError("lacks: mksquashfs (Debian: squashfs-tools); the guest's root is made with it")
    return time.time()


def normalise(tree: Path, started_s: float, *, readable: bool = True) -> None:
    """Give what was made since `started_s` one time; with `readable` every user of the guest may read it."""
    for folder, folders, files in os.walk(tree, topdown=False):
        for name in files:
            path = Path(folder, name)
            status = path.lstat()
            if path.is_symlink():
                if status.st_mtime >= started_s:
                    os.utime(path, (TIME_S, TIME_S), follow_symlinks=False)
                continue
            mode = status.st_mode & 0o7777
            wanted = mode | 0o444 | (0o111 if mode & 0o100 else 0)
            if readable and mode != wanted:
                path.chmod(wanted)
            if status.st_mtime >= started_s:
                os.utime(path, (TIME_S, TIME_S))
        for name in folders:
            if Path(folder, name).is_symlink():
                os.utime(f"{folder}/{name}", (TIME_S, TIME_S), follow_symlinks=False)
        if readable and folder != f"{tree}/root":
            Path(folder).chmod(Path(folder).stat().st_mode & 0o7777 | 0o755)
        os.utime(folder, (TIME_S, TIME_S))


def pack(
    tree: Path, image: Path, started_s: float, progress: Progress = silent, *, readable: bool = True
) -> None:
    """Write `image` with the files of `tree`, all owned by root."""
    normalise(tree, started_s, readable=readable)
    progress("packing the image")
    command = ["mksquashfs", str(tree), str(image), *_OPTIONS, "-noappend", "-all-root", "-no-xattrs"]
    command += ["-root-mode", "0755", "-mkfs-time", "0", "-no-progress", "-quiet"]
    environment = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as child:
        try:
            said = child.communicate()[0].decode(errors="replace")
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        if "No space left" in said or "Disk quota" in said:
            raise cache.CacheError(
                f"no space left in {image.parent.parent}: free some, or set UMM_GUEST_CACHE to another folder"
            )
        lines = [line for line in said.splitlines() if "ERROR" in line] or said.splitlines() or ["no reason"]
        raise UspaceError(f"mksquashfs failed: {lines[0].strip()}")
    image.chmod(0o644)
