"""Looking at another process: its mappings, which of its pages are there, and which program it runs."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uspace_mm.errors import KernelError, UnsupportedError
from uspace_mm.kernel.pagemap import Category, Pagemap
from uspace_mm.kernel.proc import page_size
from uspace_mm.notifier.event import Reason
from uspace_mm.notifier.sample import (
    Area,
    Intervals,
    at_most,
    layout_changes,
    parse_maps,
    presence_changes,
    stayed,
)

# Both events of each are queued at once, and the usual queue holds 1024.
_MOST_RANGES = 256
_ENTRIES_AT_ONCE = 1 << 20
# Without PAGEMAP_SCAN each page of a mapping costs 8 bytes of reading, there or not.
_ENTRIES_MOST_BYTES = 16 << 30
_RIGHTS = "the same user and the rights of ptrace(2), or CAP_SYS_PTRACE"


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen at one moment; ``presence`` is None where that cannot be seen."""

    areas: list[Area]
    presence: Intervals | None


class Eyes:
    """Descriptors of the address space that process `pid` has now. They keep to it: when the process executes
    another program, the old maps file has no line any more (fs/proc/task_mmu.c: mmget_not_zero)."""

    def __init__(self, pid: int, *, presence: bool, scan: bool) -> None:
        self._pid = pid
        self._scan = scan
        self.limits: list[str] = []
        self._pagemap: Pagemap | None = None
        try:
            self._maps = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                raise UnsupportedError(
                    f"process {pid}: its mappings may not be read: needs {_RIGHTS}; "
                    "without, its end alone can be seen (interval_s=None)"
                ) from None
            raise KernelError(f"open(/proc/{pid}/maps)", error.errno or errno.EIO) from None
        self._identity = self._program()
        if presence:
            try:
                self._pagemap = Pagemap(pid)
            except KernelError as error:
                self.limits.append(f"pages that come and go are not seen: {error}")

    @property
    def sees_presence(self) -> bool:
        """Whether pages that come and go are seen, not mappings alone."""
        return self._pagemap is not None

    def close(self) -> None:
        """Close the descriptors."""
        if self._maps >= 0:
            os.close(self._maps)
            self._maps = -1
        if self._pagemap is not None:
            self._pagemap.close()

    def _program(self) -> tuple[int, int, bytes] | None:
        """What an exec changes, also where the old address space lives on in a parent (vfork)."""
        try:
            with open(f"/proc/{self._pid}/auxv", "rb") as file:
                program = Path(f"/proc/{self._pid}/exe").stat()  # the file itself, whatever its name is now
                return program.st_dev, program.st_ino, file.read()
        except OSError:
            return None

    def executes_another(self, *, gone: bool) -> bool:
        """Whether the process runs another program than when this was made; `gone`: the old one's memory is
        no longer there. False when it is about to end."""
        if self._identity is not None and (now := self._program()) is not None and now != self._identity:
            return True
        if not gone:
            return False
        try:
            with open(f"/proc/{self._pid}/maps", "rb") as file:
                return bool(file.read(1))
        except PermissionError:
            return True  # a program with rights of its own
        except OSError:
            return False

    def _text(self) -> bytes:
        parts = []
        try:
            os.lseek(self._maps, 0, os.SEEK_SET)
            while part := os.read(self._maps, 1 << 16):
                parts.append(part)
        except ProcessLookupError:
            return b""
        return b"".join(parts)

    def look(self) -> Look | None:
        """What is there now; None when that address space is gone."""
        areas = parse_maps(self._text())
        if not areas:
            return None
        return Look(areas, self._presence(areas))

    def _presence(self, areas: list[Area]) -> Intervals | None:
        if self._pagemap is None:
            return None
        try:
            if self._scan:
                low, high = areas[0].start, areas[-1].end
                found = self._pagemap.scan(low, high - low, any_of=Category.PRESENT).regions
                return np.stack([found["start"], found["end"]], axis=1)
        except KernelError as error:
            if error.errno != errno.ENOTTY:
                return None  # it is just ending
            self._scan = False  # before Linux 6.7
        try:
            parts = [self._entries(self._pagemap, area) for area in areas]
        except KernelError:
            return None
        return np.concatenate(parts)

    def _entries(self, pagemap: Pagemap, area: Area) -> Intervals:
        length = min(area.end - area.start, _ENTRIES_MOST_BYTES)
        if length < area.end - area.start and len(self.limits) < 1:
            self.limits.append(
                f"of mappings above {_ENTRIES_MOST_BYTES >> 30} GiB only the start is looked at"
            )
        size = page_size()
        parts = []
        for begin in range(area.start, area.start + length, _ENTRIES_AT_ONCE * size):
            count = min(_ENTRIES_AT_ONCE, (area.start + length - begin) // size)
            there = np.concatenate([[False], pagemap.present(begin, count * size), [False]])
            parts.append(np.flatnonzero(np.diff(there)).astype(np.uint64).reshape(-1, 2) * size + begin)
        return np.concatenate(parts).astype(np.uint64)


def differences(before: Look, after: Look) -> list[tuple[Reason, int, int]]:
    """What happened between two looks: mappings first, then pages that came or went in those that stayed."""
    found = layout_changes(before.areas, after.areas)
    if before.presence is not None and after.presence is not None:
        within = stayed(before.areas, after.areas)
        pages = at_most(presence_changes(before.presence, after.presence, within), _MOST_RANGES)
        found += [(Reason.PRESENCE, start, end) for start, end in pages.tolist()]
    return found
