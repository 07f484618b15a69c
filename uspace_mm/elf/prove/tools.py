"""The programs that load files in the guest (native/elf), compiled with the cross compiler and cached."""

from __future__ import annotations

import subprocess
from pathlib import Path

from uspace_mm.errors import UspaceError
from uspace_mm.guest import cache
from uspace_mm.guest.progress import Progress, silent
from uspace_mm.guest.rootfs.toolchain import compiler
from uspace_mm.guest.sources import native_sources

FOLDER = "/umm-elf"  # in the guest
PROBE = "probe"
OPENERS = {"glibc": "opener-glibc", "musl": "opener-musl"}
# The name under which each libc is needed, and its loader.
_LIBCS = {
    "glibc": ("libc.so.6", "/lib/ld-linux-aarch64.so.1"),
    "musl": ("libc.so", "/lib/ld-musl-aarch64.so.1"),
}


def obtain(progress: Progress = silent) -> dict[str, Path]:
    """Paths of the programs by their names in the guest.

    Raises :class:`~uspace_mm.errors.UnsupportedError` without a compiler for aarch64.
    """
    sources = native_sources() / "elf"
    gcc, version = compiler()
    digests = {path.name: cache.digest_file(path) for path in sorted(sources.glob("*.[ch]"))}

    def make(folder: Path) -> None:
        progress("compiling the programs that load files in the guest")
        _compile(gcc, sources, folder)

    entry = cache.obtain("elf-tools", {"sources": digests, "compiler": version}, make, progress=progress)
    return {name: entry / name for name in (PROBE, *OPENERS.values())}


def _compile(gcc: str, sources: Path, folder: Path) -> None:
    flags = [gcc, "-O2", "-std=gnu11", "-fno-builtin"]
    _run([*flags, "-static", "-o", f"{folder / PROBE}", f"{sources / 'probe.c'}", f"{sources / 'compare.c'}"])
    for libc, (soname, loader) in _LIBCS.items():
        # The opener is linked against the names alone, so that no libc for the target is needed for it.
        stub = folder / f"stub-{libc}.so"
        _run(
            [
                *flags,
                "-w",
                "-shared",
                "-nostdlib",
                f"-Wl,-soname,{soname}",
                "-o",
                f"{stub}",
                f"{sources / 'stub.c'}",
            ]
        )
        command = [*flags, "-fPIE", "-pie", "-nostdlib", "-fno-stack-protector"]
        command += [f"-Wl,-z,max-page-size=0x10000,--dynamic-linker={loader}"]
        _run([*command, "-o", f"{folder / OPENERS[libc]}", f"{sources / 'opener.c'}", f"{stub}"])
        stub.unlink()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UspaceError(
            f"{command[0]} could not compile {command[-2]}: {last}; is it complete (libc6-dev-arm64-cross)?"
        )
