"""One audit: every ELF file under some paths, judged for some page sizes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from uspace_mm.elf import containers, verdict
from uspace_mm.elf.image import ElfError, NotLoadableError, machine_of
from uspace_mm.elf.limits import Limits
from uspace_mm.elf.records import FileReport, Libc, Problem, Report
from uspace_mm.elf.source import Source
from uspace_mm.guest.pagesize import PageSize
from uspace_mm.guest.progress import Progress, silent

ANY = "any"


def audit(
    paths: Iterable[Path],
    page_sizes: tuple[PageSize, ...],
    *,
    machine: str = "aarch64",
    limits: Limits | None = None,
    progress: Progress = silent,
    on_file: Callable[[FileReport, Source], FileReport] | None = None,
) -> Report:
    """Judge the ELF files for `machine` (or :data:`ANY`) under `paths`.

    `on_file` sees each report while its bytes can be read, and returns the one to keep. Raises
    :class:`~uspace_mm.errors.InputError` when a path does not exist.
    """
    report = Report(page_sizes, machine)
    for path in paths:
        for found in containers.find(path, limits):
            if isinstance(found, Problem):
                report.problems.append(found)
                continue
            progress(f"{len(report.files)} ELF files judged, at {found.name}")
            try:
                judged = _judge(found, report)
            except OSError as error:
                reason = f"cannot be read: {os.strerror(error.errno) if error.errno else error}"
                report.problems.append(Problem(found.name, reason))
                continue
            if judged is not None:
                report.files.append(on_file(judged, found.source) if on_file else judged)
    return report


def _judge(found: containers.Found, report: Report) -> FileReport | None:
    machine = machine_of(found.source)
    if machine is None:
        return verdict.unreadable(
            found.name, "unknown", "truncated: less than an ELF header", report.page_sizes
        )
    if report.machine not in (ANY, machine):
        report.other_machines[machine] = report.other_machines.get(machine, 0) + 1
        return None
    try:
        return verdict.judge_source(found.name, machine, found.source, report.page_sizes, _hint(found.name))
    except NotLoadableError:
        report.not_loadable += 1
        return None
    except ElfError as error:
        return verdict.unreadable(found.name, machine, str(error), report.page_sizes)


def _hint(name: str) -> Libc:
    """The libc that a wheel's name promises (PEP 600, PEP 656)."""
    if "musllinux_" in name:
        return Libc.MUSL
    return Libc.GLIBC if "manylinux" in name else Libc.UNKNOWN
