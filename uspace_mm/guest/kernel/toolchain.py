"""The programs that build an arm64 kernel: found, or named as missing with the package that has them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from uspace_mm.errors import UnsupportedError

# Program and Debian package. The configuration needs neither libssl nor libelf (no modules, no BTF).
_HOST_TOOLS = (
    ("make", "make"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("gcc", "gcc"),
    ("perl", "perl"),
)
_TARGET_TOOLS = ("gcc", "ld", "objcopy", "nm", "ar")


@dataclass(frozen=True)
class Toolchain:
    """``prefix`` is what CROSS_COMPILE is set to, ``compiler`` the first line of its ``--version``."""

    prefix: str
    compiler: str


def find_toolchain() -> Toolchain:
    """The compiler for arm64: that of ``$CROSS_COMPILE``, the machine's own on arm64, else
    ``aarch64-linux-gnu-``.

    Raises :class:`UnsupportedError` when it is missing or compiles for something else.
    """
    prefix = os.environ.get("CROSS_COMPILE")
    if prefix is None:
        prefix = "" if platform.machine() == "aarch64" else "aarch64-linux-gnu-"
    compiler = f"{prefix}gcc"
    if not shutil.which(compiler):
        raise _missing([(compiler, _package_of(prefix, "gcc"))])
    target = _said(compiler, "-dumpmachine")
    if not target.startswith("aarch64"):
        raise UnsupportedError(
            f"{compiler} compiles for {target}, not for aarch64: set CROSS_COMPILE to another prefix"
        )
    return Toolchain(prefix, _said(compiler, "--version"))


def check_tools(toolchain: Toolchain) -> None:
    """Raise :class:`UnsupportedError` naming every program and header that a build needs and that is
    missing."""
    missing = [(program, package) for program, package in _HOST_TOOLS if not shutil.which(program)]
    for tool in _TARGET_TOOLS:
        program = toolchain.prefix + tool
        if not shutil.which(program):
            missing.append((program, _package_of(toolchain.prefix, tool)))
    if not Path("/usr/include/stdio.h").exists() and not any(name == "gcc" for name, _ in missing):
        missing.append(("stdio.h", "libc6-dev"))
    if missing:
        raise _missing(missing)


def _missing(missing: list[tuple[str, str]]) -> UnsupportedError:
    programs = ", ".join(program for program, _ in missing)
    packages = " ".join(dict.fromkeys(package for _, package in missing))
    return UnsupportedError(f"lacks: {programs}: apt install {packages}")


def _package_of(prefix: str, tool: str) -> str:
    package = "gcc" if tool == "gcc" else "binutils"
    target = prefix.rpartition("/")[2].rstrip("-")
    return f"{package}-{target}" if target else package


def _said(*command: str) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UnsupportedError(
            f"{' '.join(command)} failed: {error}; mend or replace the compiler"
        ) from error
    return (done.stdout.splitlines() or [""])[0].strip()
