"""Jobs for the probe: how each file is loaded in the guest, and as whom."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from uspace_mm.elf.prove import tools
from uspace_mm.elf.prove.staging import Staged
from uspace_mm.elf.records import FileReport, Kind, Libc, Loader
from uspace_mm.elf.rules import jemalloc

# Under emulation an import of a large package takes a while.
TIMEOUT_MS = 60_000
OPEN_SCRIPT = "open.py"

# ctypes' handle is glibc's link_map, whose first field is the load address.
OPEN_SOURCE = """\
import ctypes, importlib, os, signal, sys
path, module = sys.argv[1:]
library = ctypes.CDLL(path, mode=os.RTLD_NOW)
os.write(3, ctypes.string_at(library._handle, 8))
os.kill(os.getpid(), signal.SIGSTOP)
if module:
    importlib.import_module(module)
"""


@dataclass(frozen=True, slots=True)
class Job:
    """One file to load; ``loader`` is whose verdict it is evidence for."""

    name: str
    loader: Loader
    line: str


def make(number: int, report: FileReport, staged: Staged, root: str) -> list[Job]:
    """The jobs for `report`, whose file lies in `staged`, at `root` in the guest; none if there is no way.

    A library that does not say whose it is gets one for each libc.
    """
    image = report.image
    inside = staged.members.get(report.name)
    if image is None or inside is None:
        return []
    file = f"{root}/{inside}"
    folders = ":".join(f"{root}/{folder}" for folder in staged.library_folders())
    environment = [f"LD_LIBRARY_PATH={folders}"] if folders else []
    if image.kind is not Kind.LIBRARY:
        return [_job(number, Loader.KERNEL, "executable", file, [*environment, file, "--version"])]
    made = []
    if image.libc in (Libc.GLIBC, Libc.UNKNOWN):
        if staged.is_wheel or _is_extension(inside):
            script = f"{tools.FOLDER}/{OPEN_SCRIPT}"
            module = _module(staged, inside) if staged.is_wheel else ""
            command = [f"PYTHONPATH={root}", "/usr/bin/python3", script, file, module]
        else:
            command = [f"{tools.FOLDER}/{tools.OPENERS['glibc']}", file]
            if any(finding.rule == jemalloc.RULE for v in report.verdicts for finding in v.findings):
                # Allocators want static TLS, which dlopen cannot give.
                command.insert(0, f"LD_PRELOAD={file}")
        made.append(_job(number, Loader.GLIBC, "library", file, environment + command))
    if image.libc in (Libc.MUSL, Libc.UNKNOWN):
        command = [f"{tools.FOLDER}/{tools.OPENERS['musl']}", file]
        made.append(_job(number, Loader.MUSL, "library", file, environment + command))
    return made


def _job(number: int, loader: Loader, kind: str, file: str, command: list[str]) -> Job:
    name = f"{number} {loader.name.lower()}"
    return Job(name, loader, "\t".join([name, kind, str(TIMEOUT_MS), file, *command]))


def _is_extension(inside: PurePosixPath) -> bool:
    return ".cpython-" in inside.name or ".abi3." in inside.name


def _module(staged: Staged, inside: PurePosixPath) -> str:
    """What to import so that the file is used: its package, or the first one of the wheel."""
    packages = [path.parts[0] for path in staged.files() if path.parts[1:] == ("__init__.py",)]
    top = inside.parts[0]
    if len(inside.parts) == 1:
        return top.partition(".")[0] if _is_extension(inside) else ""
    return top if top in packages else next(iter(packages), "")
