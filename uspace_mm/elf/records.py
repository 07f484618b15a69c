"""What the audit talks about: segments, images, findings, and the verdict on a file for one page size."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum

from uspace_mm.guest.pagesize import PageSize

PF_X, PF_W, PF_R = 1, 2, 4

MACHINES = {3: "i386", 22: "s390x", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv", 258: "loongarch"}


class Level(IntEnum):
    """How bad one finding is."""

    NOTE = 0  # it runs; a protection is lost
    UNKNOWN = 1  # nothing in the file can tell
    WRONG = 2  # accepted, with other bytes or rights in memory than the file asks for
    FAILS = 3  # refused, or killed while it is being loaded


class Status(Enum):
    """The verdict on a file for one page size, and its place in the order from fine to bad."""

    LOADS = "loads"
    NEWER_GLIBC = "loads with newer glibc"
    UNKNOWN = "unknown"
    WRONG = "wrong"
    FAILS = "fails"

    @property
    def rank(self) -> int:
        return list(Status).index(self)

    @property
    def failing(self) -> bool:
        """Whether the audit's exit status is 1 because of it."""
        return self in (Status.WRONG, Status.FAILS)


class Loader(Enum):
    """Who maps a file: a libc's loader, or the kernel (executables, and the loader itself)."""

    GLIBC = "glibc 2.35+"
    GLIBC_OLD = "glibc < 2.35"
    MUSL = "musl"
    BIONIC = "bionic"
    KERNEL = "kernel"


class Libc(Enum):
    """Whose file it is, by its interpreter, the libraries it needs, or the name of the wheel it is in."""

    GLIBC = "glibc"
    MUSL = "musl"
    BIONIC = "bionic"
    UNKNOWN = "unknown"


class Kind(Enum):
    """How a file gets into memory."""

    EXECUTABLE = "executable"
    LIBRARY = "library"
    BOTH = "library that can be executed"


@dataclass(frozen=True, slots=True)
class Segment:
    """One program header; ``index`` is its place in the table, as ``readelf -lW`` counts from 0."""

    index: int
    offset: int
    vaddr: int
    filesz: int
    memsz: int
    flags: int
    align: int

    @property
    def file_end(self) -> int:
        """Address at which the bytes of the file end and zeros begin."""
        return self.vaddr + self.filesz

    @property
    def end(self) -> int:
        """Address at which the segment ends."""
        return self.vaddr + self.memsz

    @property
    def rights(self) -> str:
        """``R``, ``RW``, ``RX``: what the file asks for."""
        return format_rights(self.flags)


@dataclass(frozen=True, slots=True)
class Image:
    """What the audit reads of one ELF file."""

    size: int
    bits: int
    little_endian: bool
    machine: str
    elf_type: int
    entry: int
    loads: tuple[Segment, ...]
    relro: Segment | None
    interp: str | None
    needed: tuple[str, ...]
    soname: str | None
    kind: Kind
    libc: Libc
    damage: tuple[str, ...] = ()  # what could not be read, beside the program headers


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a rule found, for one page size and one loader.

    ``fact`` is in the file (with its numbers), ``consequence`` what that loader does about it, ``remedy``
    what mends it. ``segment`` is the index of the program header, None when the finding is about the whole
    file.
    """

    rule: str
    level: Level
    loader: Loader
    fact: str
    consequence: str
    segment: int | None = None
    remedy: str = ""
    numbers: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """What happened when the file was loaded in a guest of that page size (``--prove``).

    ``ok`` is None when it says nothing about pages: not loaded with 4k pages either, or nothing was seen.
    """

    ok: bool | None
    compared: bool  # rights and bytes of every LOAD and of the RELRO range were compared with the file
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one file for one page size, for the loaders that it is made for."""

    page_size: PageSize
    status: Status
    by_loader: tuple[tuple[Loader, Status], ...]
    findings: tuple[Finding, ...]
    predicted: Status | None = None  # what the rules said, where evidence changed it
    evidence: Evidence | None = None


@dataclass(frozen=True, slots=True)
class FileReport:
    """One ELF file and its verdicts. ``name`` is the path; members of archives follow after ``!``."""

    name: str
    machine: str
    image: Image | None  # None when the headers cannot be read
    verdicts: tuple[Verdict, ...]

    @property
    def worst(self) -> Status:
        return max((verdict.status for verdict in self.verdicts), key=lambda status: status.rank)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that could not be looked into, and why; an audit that has one is not complete."""

    name: str
    reason: str


@dataclass(slots=True)
class Report:
    """The result of one audit."""

    page_sizes: tuple[PageSize, ...]
    machine: str
    files: list[FileReport] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    other_machines: dict[str, int] = field(default_factory=dict)  # ELF files left out, by machine
    not_loadable: int = 0  # object files, kernel modules, core dumps, separate debug information

    @property
    def failing(self) -> bool:
        return any(report.worst.failing for report in self.files)

    @property
    def exit_status(self) -> int:
        """0 all fine; 1 something fails or is wrong, or could not be looked into; 2 nothing to judge."""
        if self.failing or self.problems:
            return 1
        return 0 if self.files else 2


def format_rights(flags: int) -> str:
    """``RW`` for PF_R | PF_W; ``-`` for none."""
    text = "".join(letter for bit, letter in ((PF_R, "R"), (PF_W, "W"), (PF_X, "X")) if flags & bit)
    return text or "-"
