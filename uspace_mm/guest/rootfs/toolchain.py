"""Compiles C for the guest: the host's cross compiler, headers and libraries of the guest's Debian."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache as once
from pathlib import Path

from uspace_mm.errors import UnsupportedError, UspaceError
from uspace_mm.guest.progress import Progress, silent
from uspace_mm.guest.rootfs.packages import Set, identity, unpacked
from uspace_mm.guest.rootfs.target import MACHINE, SYSROOT_PACKAGES, TRIPLET

_FAULT = re.compile(r"error: (?!ld returned)|undefined reference|multiple definition|cannot find")


@once
def compiler() -> tuple[str, str]:
    """Path and version of a gcc that compiles for the guest. Raises :class:`UnsupportedError` without one."""
    names = [f"{TRIPLET}-gcc", *(["gcc"] if platform.machine() == MACHINE else [])]
    for name in names:
        if path := shutil.which(name):
            done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
            return path, done.stdout.partition("\n")[0]
    raise UnsupportedError(
        f"lacks: {TRIPLET}-gcc (Debian: gcc-{TRIPLET}), which compiles what runs in the guest"
    )


def sysroot_packages() -> Set:
    """Headers and libraries of the guest's C library and Python."""
    return Set(SYSROOT_PACKAGES)


def key(progress: Progress = silent) -> dict[str, object]:
    """What the output depends on besides its sources and options."""
    return {"compiler": compiler()[1], "sysroot": identity(sysroot_packages().resolve(progress))}


@contextmanager
def toolchain(progress: Progress = silent) -> Iterator[Toolchain]:
    """A compiler with its sysroot, for as long as it is needed."""
    with unpacked("sysroot", sysroot_packages(), _needed, progress) as root:
        for name in ("lib", "lib64"):  # the linker scripts name libraries by their old places
            if not (root / name).exists():
                (root / name).symlink_to("usr/lib")
        yield Toolchain(root)


class Toolchain:
    """Compiles and links against the sysroot in `root`."""

    def __init__(self, root: Path) -> None:
        gcc = compiler()[0]
        own = subprocess.run([gcc, "-print-file-name=include"], capture_output=True, text=True, check=False)
        include, libraries = root / "usr/include", root / f"usr/lib/{TRIPLET}"
        self.include = include
        # Debian's cross gcc looks into its own libc's folders first, whatever --sysroot says: its headers may
        # be older, its libc newer than the guest's.
        self._base = [gcc, f"--sysroot={root}", "-nostdinc", "-isystem", own.stdout.strip()]
        self._base += ["-isystem", f"{include}/{TRIPLET}", "-isystem", f"{include}"]
        self._base += [f"-B{libraries}/", f"-L{libraries}", "-pipe"]

    def compile(self, sources: Sequence[Path], to: Path, options: Sequence[str]) -> list[Path]:
        """Object files in the folder `to`, as many at a time as there are CPUs."""
        objects = [to / f"{number}-{source.stem}.o" for number, source in enumerate(sources)]
        jobs = len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(jobs) as pool:
            tasks = [
                pool.submit(self._run, ["-c", str(source), "-o", str(target), *options], source)
                for source, target in zip(sources, objects, strict=True)
            ]
            try:
                for task in tasks:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
        return objects

    def link(self, objects: Sequence[Path], to: Path, options: Sequence[str]) -> None:
        """One file of `objects`."""
        self._run([*(str(path) for path in objects), "-o", str(to), *options], to)

    def _run(self, arguments: Sequence[str], what: Path) -> None:
        done = subprocess.run(
            [*self._base, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = done.stderr.splitlines() or ["no reason given"]
            why = next((line for line in said if _FAULT.search(line)), said[-1])
            raise UspaceError(f"{what.name} cannot be compiled for the guest: {why}")


def _needed(path: str) -> bool:
    if path.startswith("usr/lib/linux/uapi/"):  # the kernel's headers of every architecture
        return "/arm64/" in path
    return path.startswith(("usr/include/", "usr/lib/")) and not (
        "/gconv/" in path or "/python3" in path and path.startswith("usr/lib/")
    )
