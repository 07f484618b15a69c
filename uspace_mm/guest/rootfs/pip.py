"""Runs the host's pip for the guest's Python and machine: chooses and fetches wheels, and unpacks them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache as once
from pathlib import Path

from uspace_mm.errors import InputError, UnsupportedError, UspaceError
from uspace_mm.guest import cache
from uspace_mm.guest.rootfs.target import GLIBC_MINOR, MACHINE, PYTHON

# pip takes the platform's wheels as asked, but evaluates markers ("python_version >= '3.12'",
# "platform_machine == 'aarch64'") for the interpreter it runs on. So it is told it runs in the guest.
_PROGRAM = """
import os, platform, runpy, sys
version, machine = sys.argv[1:3]
del sys.argv[1:3]
sys.argv[0] = "pip"
os.umask(0o022)
platform.machine = lambda: machine
platform.python_version = lambda: version + ".0"
platform.python_version_tuple = lambda: (*version.split("."), "0")
platform.python_implementation = lambda: "CPython"
sys.executable = "/usr/bin/python3"  # what the scripts of wheels are started with
runpy.run_module("pip", run_name="__main__")
"""
_NETWORK = re.compile(r"Retrying \(|ConnectionError|NewConnectionError|ProxyError|Temporary failure|SSLError")


class PipError(UspaceError):
    """pip failed for a reason that is not in what it was asked for, most often the network."""

    exit_status = 3


def download(wanted: Sequence[str], to: Path, *, constraints: Sequence[str] = ()) -> None:
    """Fetch the wheels of `wanted` (requirements, or paths of wheels) and of what they need into `to`.

    Versions in `constraints` are taken where they can be. Raises :class:`InputError` when there is no such
    name, or no wheel for the guest, :class:`PipError` when the index cannot be reached.
    """
    options = ["download", "--only-binary=:all:", "--dest", str(to), *_target()]
    with tempfile.TemporaryDirectory(prefix="umm-pip-") as folder:
        pins = Path(folder) / "constraints.txt"
        pins.write_text("\n".join(constraints))
        status, said = _run([*options, "--constraint", str(pins), *wanted])
        if status and constraints and not _NETWORK.search(said):
            # It may need another version than the guest has: then it gets its own.
            status, said = _run([*options, *wanted])
    if status:
        raise _failure(said, wanted)


def unpack(files: Sequence[Path], to: Path) -> None:
    """Install the wheels `files` in the folder `to`, programs in its ``bin``."""
    options = ["install", "--no-index", "--no-deps", "--no-compile", "--ignore-requires-python"]
    # Wheels that were given may say linux_aarch64; what fits was decided when they were chosen.
    options += ["--only-binary=:all:", "--target", str(to), *_target()]
    status, said = _run([*options, *(str(path) for path in files)])
    if status:
        raise _failure(said, [path.name for path in files])


def _target() -> list[str]:
    platforms = [f"manylinux_2_{minor}_{MACHINE}" for minor in range(GLIBC_MINOR, 16, -1)]
    platforms += [f"manylinux2014_{MACHINE}", f"linux_{MACHINE}"]
    options = [option for name in platforms for option in ("--platform", name)]
    return [
        *options,
        "--python-version",
        PYTHON,
        "--implementation",
        "cp",
        "--abi",
        "cp" + PYTHON.replace(".", ""),
    ]


@once
def _interpreter() -> str:
    """A Python that has pip: this one, or the system's (an environment made by uv has none)."""
    for python in (sys.executable, shutil.which("python3"), "/usr/bin/python3"):
        if python and Path(python).exists():
            done = subprocess.run([python, "-c", "import pip"], capture_output=True, check=False)
            if done.returncode == 0:
                return python
    raise UnsupportedError("lacks: pip (Debian: python3-pip); the guest's wheels are chosen with it")


def _run(arguments: Sequence[str]) -> tuple[int, str]:
    command = [_interpreter(), "-c", _PROGRAM, PYTHON, MACHINE, "--no-input", "--disable-pip-version-check"]
    command += ["--retries", "2", "--no-color", *arguments]
    unset = ("PIP_TARGET", "PIP_USER", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV", "PYTHONHOME", "PIP_NO_BINARY")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    # A folder for what pip unpacks: one that is killed leaves it there.
    with (
        tempfile.TemporaryDirectory(prefix="umm-pip-") as folder,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**environment, "LC_ALL": "C.UTF-8", "TMPDIR": folder},
        ) as child,
    ):
        try:
            said = child.communicate()[1].decode(errors="replace")
        except BaseException:
            child.kill()
            raise
    return child.returncode, said


def _failure(said: str, wanted: Sequence[str]) -> UspaceError:
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else (said.strip().splitlines() or ["no reason given"])[-1]
    if _NETWORK.search(said):
        return PipError(
            f"pip cannot reach its index for {_listed(wanted)}: is the network up, and pip's index right?"
        )
    if "No space left" in said:
        return PipError(
            f"no space left in {tempfile.gettempdir()} or {cache.cache_root()} for {_listed(wanted)}: "
            "free some, or set TMPDIR or UMM_GUEST_CACHE"
        )
    if match := re.search(r"No matching distribution found for (\S+)", said):
        return InputError(
            f"pip: {match[1]}: no such name or version, or no wheel of it for Python {PYTHON} on {MACHINE}"
        )
    return InputError(f"pip cannot install {_listed(wanted)} for Python {PYTHON} on {MACHINE}: {reason}")


def _listed(wanted: Sequence[str]) -> str:
    more = f" and {len(wanted) - 3} more" if len(wanted) > 3 else ""
    return ", ".join(wanted[:3]) + more
