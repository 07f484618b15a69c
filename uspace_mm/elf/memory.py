"""A process's memory as mmap, mprotect and memset leave it, in areas instead of pages.

The loaders' steps are played on it (:mod:`uspace_mm.elf.loaders`), and what is left is compared with what
the file asks for. Sizes may be as large as the file claims: the cost depends on the number of segments only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum


class Content(Enum):
    """Where the bytes of an area come from."""

    FILE = "file"
    ZERO = "zero"
    REUSED = "reused"  # given to malloc


@dataclass(frozen=True, slots=True)
class Area:
    """Memory from ``start`` to ``end`` (not included); ``offset`` is where in the file it begins."""

    start: int
    end: int
    content: Content
    offset: int
    rights: int

    def cut(self, start: int, end: int) -> Area:
        """The part between `start` and `end`, which overlaps it."""
        start, end = max(start, self.start), min(end, self.end)
        return replace(self, start=start, end=end, offset=self.offset + start - self.start)


def round_down(value: int, page: int) -> int:
    return value - value % page


def round_up(value: int, page: int) -> int:
    return value + -value % page


class AddressSpace:
    """Areas in order of their addresses, none of which overlap."""

    def __init__(self) -> None:
        self.areas: list[Area] = []

    def map_file(self, start: int, end: int, offset: int, rights: int) -> None:
        """mmap(MAP_FIXED | MAP_PRIVATE) of the file: what was there before is gone."""
        self._place(Area(start, end, Content.FILE, offset, rights))

    def map_zeros(self, start: int, end: int, rights: int) -> None:
        """mmap(MAP_FIXED | MAP_ANONYMOUS)."""
        self._place(Area(start, end, Content.ZERO, 0, rights))

    def fill(self, start: int, end: int, content: Content) -> None:
        """memset, or another use of the memory: the bytes change, the rights do not."""
        for area in list(self.within(start, end)):
            self._place(replace(area, content=content, offset=0))

    def protect(self, start: int, end: int, rights: int) -> bool:
        """mprotect; False (ENOMEM) when something between is not mapped: what comes before it is changed."""
        position = start
        for area in list(self.within(start, end)):
            if area.start > position:
                break
            self._place(replace(area, rights=rights))
            position = area.end
        return position >= end

    def within(self, start: int, end: int) -> Iterator[Area]:
        """The areas, or their parts, between `start` and `end`, in order."""
        for area in self.areas:
            if max(area.start, start) < min(area.end, end):
                yield area.cut(start, end)

    def all_have(self, start: int, end: int, right: int) -> bool:
        """Whether every byte between `start` and `end` is mapped with that right."""
        position = start
        for area in self.within(start, end):
            if area.start > position or not area.rights & right:
                return False
            position = area.end
        return position >= end

    def copy(self) -> AddressSpace:
        other = AddressSpace()
        other.areas = list(self.areas)
        return other

    def _place(self, new: Area) -> None:
        if new.start >= new.end:
            return
        kept = []
        for area in self.areas:
            if area.end <= new.start or new.end <= area.start:
                kept.append(area)
                continue
            if area.start < new.start:
                kept.append(area.cut(area.start, new.start))
            if new.end < area.end:
                kept.append(area.cut(new.end, area.end))
        kept.append(new)
        kept.sort(key=lambda area: area.start)
        self.areas = kept
