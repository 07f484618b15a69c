"""Proves a report: one guest per page size, all files in it, and the 4K guest as control."""

from __future__ import annotations

import lzma
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from uspace_mm.elf.prove import jobs, judging, tools
from uspace_mm.elf.prove.observation import Observation, parse
from uspace_mm.elf.prove.staging import Staged, StagingError, stage
from uspace_mm.elf.records import FileReport, Problem, Report, Status
from uspace_mm.guest.boot import Guest, Machine, ready
from uspace_mm.guest.pagesize import PAGE_SIZES, PageSize
from uspace_mm.guest.progress import Progress, silent

CONTROL = PAGE_SIZES[0]
_FILES = f"{tools.FOLDER}/files"

# What a damaged archive may raise, which the audit has told of already.
_UNSTAGED = (
    StagingError,
    OSError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
# How many files may take their guest down before the rest is left alone.
_ATTEMPTS = 4

Booter = Callable[[PageSize, Machine, Progress], Guest]


def prove(
    report: Report,
    *,
    kernel: str | None = None,
    everything: bool = False,
    progress: Progress = silent,
    booter: Booter | None = None,
) -> None:
    """Load what is not plainly fine (or `everything`) in guests, and put the evidence beside the verdicts.

    `kernel` is what :func:`uspace_mm.guest.boot.ready` takes. Files of other machines than aarch64 and
    those whose headers cannot be read are left as they are. Raises what booting a guest raises.
    """
    wanted = [file for file in report.files if _provable(file) and (everything or _doubtful(file))]
    if not wanted:
        return
    booter = booter or _booter(kernel)
    programs = tools.obtain(progress)
    with tempfile.TemporaryDirectory(prefix="uspace-mm-elf-") as folder:
        staged = _stage(report, wanted, Path(folder), progress)
        made: dict[str, list[jobs.Job]] = {}
        for number, file in enumerate(wanted):
            if file.name in staged:
                place, root = staged[file.name]
                made[file.name] = jobs.make(number, file, place, root)
        sizes = {size for file in wanted for size in _sizes(file, everything)}
        if sizes - {CONTROL}:
            sizes.add(CONTROL)
        seen: dict[PageSize, dict[str, Observation]] = {}
        for size in sorted(sizes, key=lambda size: size.bytes):
            work = [
                job
                for file in wanted
                for job in made.get(file.name, [])
                if size == CONTROL or size in _sizes(file, everything)
            ]
            places = {root: place for place, root in staged.values()}
            seen[size] = _run(booter, size, programs, places, work, progress)
    for index, file in enumerate(report.files):
        if file.name in made and file in wanted:
            report.files[index] = _judge(file, made[file.name], seen, everything)


def _provable(file: FileReport) -> bool:
    image = file.image
    return image is not None and image.machine == "aarch64" and image.bits == 64 and image.little_endian


def _doubtful(file: FileReport) -> bool:
    return file.worst is not Status.LOADS


def _sizes(file: FileReport, everything: bool) -> list[PageSize]:
    return [v.page_size for v in file.verdicts if everything or v.status is not Status.LOADS]


def _booter(kernel: str | None) -> Booter:
    def start(size: PageSize, machine: Machine, progress: Progress) -> Guest:
        return ready(size, machine=machine, kernel=kernel, own=False, progress=progress)

    return start


def _stage(
    report: Report, wanted: list[FileReport], folder: Path, progress: Progress
) -> dict[str, tuple[Staged, str]]:
    """Where each file of `wanted` lies: its group, and the group's folder in the guest."""
    groups: dict[str, list[FileReport]] = {}
    for file in wanted:
        groups.setdefault(file.name.partition("!")[0], []).append(file)
    found: dict[str, tuple[Staged, str]] = {}
    for number, (container, files) in enumerate(groups.items()):
        progress(f"unpacking {container}")
        try:
            place = stage(container, files, report.files, folder / str(number))
        except _UNSTAGED as error:
            report.problems.append(Problem(container, f"not proved: {error}"))
            continue
        for file in files:
            found[file.name] = (place, f"{_FILES}/{number}")
    return found


def _run(
    booter: Booter,
    size: PageSize,
    programs: dict[str, Path],
    places: dict[str, Staged],
    work: Iterable[jobs.Job],
    progress: Progress,
) -> dict[str, Observation]:
    names = [(root, place.root, path) for root, place in places.items() for path in place.files()]
    total = sum((root / path).stat().st_size for _, root, path in names)
    machine = Machine(memory_bytes=(1 << 30) + 2 * (total >> 20 << 20))
    found: dict[str, Observation] = {}
    left = list(work)
    for _ in range(_ATTEMPTS):
        if not left:
            break
        text: list[bytes] = []
        with booter(size, machine, progress) as guest:
            progress(f"{size}: copying {len(names)} files into the guest")
            for name, path in programs.items():
                guest.put(f"{tools.FOLDER}/{name}", path, 0o755)
            guest.put(f"{tools.FOLDER}/{jobs.OPEN_SCRIPT}", jobs.OPEN_SOURCE.encode())
            for root, folder, inside in names:
                guest.put(f"{root}/{inside}", folder / inside, 0o755)
            guest.put(f"{tools.FOLDER}/jobs", "".join(f"{job.line}\n" for job in left).encode())
            progress(f"{size}: loading {len(left)} files")
            guest.run(
                [f"{tools.FOLDER}/{tools.PROBE}", f"{tools.FOLDER}/jobs"],
                on_stdout=lambda data, text=text: text.append(bytes(data)),  # type: ignore[misc]
                timeout_s=60 + len(left) * jobs.TIMEOUT_MS / 1000,
            )
        found |= parse(b"".join(text).decode("utf-8", "replace").splitlines())
        # A file that took the guest down with it is named `lost`; those behind it get another guest.
        left = [job for job in left if job.name not in found]
    return found


def _judge(
    file: FileReport, made: list[jobs.Job], seen: dict[PageSize, dict[str, Observation]], everything: bool
) -> FileReport:
    verdicts = []
    for verdict in file.verdicts:
        if verdict.page_size in _sizes(file, everything):
            for job in made:
                own = seen.get(verdict.page_size, {}).get(job.name)
                control = None
                if verdict.page_size != CONTROL:
                    control = seen[CONTROL].get(job.name, Observation(0, False, frozenset(), "lost", 0, ""))
                verdict = judging.judge(verdict, job.loader, own, control)
        verdicts.append(verdict)
    return FileReport(file.name, file.machine, file.image, tuple(verdicts))
