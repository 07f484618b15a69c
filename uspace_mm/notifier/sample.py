"""Two looks at an address space, and what differs between them.

Layouts are lists of :class:`Area` in address order; presence is an array of intervals, shape (n, 2), in
address order and not overlapping. All addresses in bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uspace_mm.notifier.event import Reason

Intervals = NDArray[np.uint64]

_LINE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) (\S+) (\d+)\s*(.*)")
# The kernel's own page at the top, which is in every process and of no mapping's making.
_NOT_USER = b"[vsyscall]"


@dataclass(frozen=True, slots=True)
class Area:
    """One line of /proc/PID/maps. ``what`` is the same for pieces of one mapping, whatever their permissions:
    the file with the place of address 0 in it, or the kernel's name for memory without a file."""

    start: int
    end: int
    permissions: bytes
    what: tuple[object, ...]


def parse_maps(text: bytes) -> list[Area]:
    """The areas in the text of a maps file (proc_pid_maps(5)), in address order."""
    areas = []
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None or match[7] == _NOT_USER:
            continue
        start, end, inode = int(match[1], 16), int(match[2], 16), int(match[6])
        what = (match[5], inode, int(match[4], 16) - start) if inode else (match[7],)
        areas.append(Area(start, end, match[3], what))
    return areas


def layout_changes(before: list[Area], after: list[Area]) -> list[tuple[Reason, int, int]]:
    """What happened to mappings, as (reason, start, end): UNMAP, MAP, or PROTECT for other permissions.

    Neighbouring pieces with one reason are told as one. Another mapping at the same address is UNMAP and MAP.
    """
    edges = sorted({edge for area in (*before, *after) for edge in (area.start, area.end)})
    old, new = _Cursor(before), _Cursor(after)
    found: dict[Reason, list[tuple[int, int]]] = {Reason.UNMAP: [], Reason.MAP: [], Reason.PROTECT: []}

    def add(reason: Reason, start: int, end: int) -> None:
        pieces = found[reason]
        if pieces and pieces[-1][1] == start:
            pieces[-1] = (pieces[-1][0], end)
        else:
            pieces.append((start, end))

    for start, end in zip(edges, edges[1:], strict=False):
        was, now = old.at(start), new.at(start)
        if was is not None and now is not None and was.what == now.what:
            if was.permissions != now.permissions:
                add(Reason.PROTECT, start, end)
            continue
        if was is not None:
            add(Reason.UNMAP, start, end)
        if now is not None:
            add(Reason.MAP, start, end)
    return [(reason, *piece) for reason, pieces in found.items() for piece in pieces]


class _Cursor:
    """The area at each of a rising series of addresses."""

    def __init__(self, areas: list[Area]) -> None:
        self._areas: Iterator[Area] = iter(areas)
        self._area = next(self._areas, None)

    def at(self, address: int) -> Area | None:
        while self._area is not None and self._area.end <= address:
            self._area = next(self._areas, None)
        return self._area if self._area is not None and self._area.start <= address else None


def intervals(pairs: list[tuple[int, int]]) -> Intervals:
    """An array of `pairs`, shape (n, 2)."""
    return np.array(pairs, np.uint64).reshape(-1, 2)


def _combine(first: Intervals, second: Intervals, rule: Callable[..., NDArray[np.bool_]]) -> Intervals:
    points = np.unique(np.concatenate([first.ravel(), second.ravel()]))
    if not len(points):
        return intervals([])
    # Inside when an odd number of edges is at the point or before it; where two intervals meet there are two.
    inside = [np.searchsorted(side.ravel(), points, "right") % 2 == 1 for side in (first, second)]
    chosen = np.concatenate([[False], rule(*inside)])
    # After the last point nothing is inside.
    return points[np.flatnonzero(np.diff(chosen.astype(np.int8)))].reshape(-1, 2)


def presence_changes(before: Intervals, after: Intervals, within: Intervals) -> Intervals:
    """Where pages came or went, of the addresses in `within`."""
    return _combine(_combine(before, after, np.logical_xor), within, np.logical_and)


def stayed(before: list[Area], after: list[Area]) -> Intervals:
    """The addresses that belong to the same mapping in both layouts."""
    both = _combine(_extent(before), _extent(after), np.logical_and)
    changed = [(start, end) for reason, start, end in layout_changes(before, after) if reason is Reason.MAP]
    return _combine(both, intervals(sorted(changed)), lambda a, b: a & ~b)


def _extent(areas: list[Area]) -> Intervals:
    return intervals([(area.start, area.end) for area in areas])


def clip(found: Intervals, start: int, end: int) -> Intervals:
    """What of `found` is in [start, end)."""
    return _combine(found, intervals([(start, end)]), np.logical_and)


def at_most(found: Intervals, count: int) -> Intervals:
    """`found` in no more than `count` intervals: the narrowest gaps are closed."""
    if len(found) <= count:
        return found
    gaps = found[1:, 0] - found[:-1, 1]
    kept = np.sort(np.argsort(gaps, kind="stable")[len(gaps) - (count - 1) :])
    starts = np.concatenate([found[:1, 0], found[kept + 1, 0]])
    ends = np.concatenate([found[kept, 1], found[-1:, 1]])
    return np.stack([starts, ends], axis=1)
