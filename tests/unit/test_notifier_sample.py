"""Two looks at an address space and their differences, against a model that goes address by address."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from uspace_mm.notifier.event import Reason
from uspace_mm.notifier.sample import (
    Area,
    at_most,
    clip,
    intervals,
    layout_changes,
    parse_maps,
    presence_changes,
    stayed,
)

END = 24  # of the small address space of these tests


@st.composite
def layouts(draw: st.DrawFn) -> list[Area]:
    edges = sorted(draw(st.sets(st.integers(0, END), max_size=8)))
    areas = []
    for start, end in zip(edges, edges[1:], strict=False):
        if draw(st.booleans()):
            permissions = draw(st.sampled_from([b"r--p", b"rw-p"]))
            areas.append(Area(start, end, permissions, (draw(st.sampled_from([b"", b"[heap]"])),)))
    return areas


def at(areas: list[Area], address: int) -> Area | None:
    return next((area for area in areas if area.start <= address < area.end), None)


@given(layouts(), layouts())
def test_layout_changes_are_those_of_each_address(before: list[Area], after: list[Area]) -> None:
    told = {reason: set[int]() for reason in (Reason.UNMAP, Reason.MAP, Reason.PROTECT)}
    pieces = layout_changes(before, after)
    for reason, start, end in pieces:
        assert start < end
        assert not told[reason] & set(range(start, end)), "told twice"
        told[reason] |= set(range(start, end))
    for address in range(END):
        was, now = at(before, address), at(after, address)
        same = was is not None and now is not None and was.what == now.what
        assert (address in told[Reason.UNMAP]) == (was is not None and not same)
        assert (address in told[Reason.MAP]) == (now is not None and not same)
        other = same and was is not None and now is not None and was.permissions != now.permissions
        assert (address in told[Reason.PROTECT]) == other
    # Neighbours of one reason are one piece.
    assert not {(reason, end) for reason, _, end in pieces} & {(reason, start) for reason, start, _ in pieces}


@given(layouts(), layouts())
def test_what_stayed_is_mapped_in_both_as_the_same(before: list[Area], after: list[Area]) -> None:
    found = {address for start, end in stayed(before, after).tolist() for address in range(start, end)}
    for address in range(END):
        was, now = at(before, address), at(after, address)
        assert (address in found) == (was is not None and now is not None and was.what == now.what)


pairs = st.sets(st.integers(0, END)).map(
    lambda edges: [(a, b) for a, b in zip(sorted(edges)[::2], sorted(edges)[1::2], strict=False)]
)


@given(pairs, pairs, pairs)
def test_presence_changes(
    before: list[tuple[int, int]], after: list[tuple[int, int]], within: list[tuple[int, int]]
) -> None:
    def addresses(found: list[tuple[int, int]]) -> set[int]:
        return {address for start, end in found for address in range(start, end)}

    found = presence_changes(intervals(before), intervals(after), intervals(within))
    assert addresses(found.tolist()) == (addresses(before) ^ addresses(after)) & addresses(within)
    assert (found[1:, 0] > found[:-1, 1]).all(), "in order, and not touching"


def test_intervals_that_touch_are_one() -> None:
    scanned = intervals([(0, 4), (4, 8), (10, 12)])
    assert presence_changes(scanned, intervals([(0, 8)]), intervals([(0, 20)])).tolist() == [[10, 12]]


@given(pairs, st.integers(1, 6))
def test_at_most_covers_all_and_closes_the_narrowest_gaps(found: list[tuple[int, int]], count: int) -> None:
    joined = at_most(intervals(found), count)
    assert len(joined) == min(len(found), count)
    for start, end in found:
        assert any(low <= start and end <= high for low, high in joined.tolist())
    gaps = sorted(b[0] - a[1] for a, b in zip(found, found[1:], strict=False))
    kept = sorted(int(b[0] - a[1]) for a, b in zip(joined, joined[1:], strict=False))
    assert kept == gaps[len(gaps) - len(kept) :]


def test_clip() -> None:
    assert clip(intervals([(0, 4), (6, 9)]), 2, 7).tolist() == [[2, 4], [6, 7]]
    assert clip(intervals([]), 2, 7).tolist() == []


MAPS = b"""\
5581e000-5581f000 r--p 00002000 fe:00 1234                     /usr/bin/a program
5581f000-55820000 rw-p 00003000 fe:00 1234                     /usr/bin/a program
55820000-55841000 rw-p 00000000 00:00 0                        [heap]
7f000000-7f001000 rw-p 00000000 00:00 0
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0        [vsyscall]
"""


def test_maps_are_parsed_and_pieces_of_one_file_known_as_such() -> None:
    first, second, heap, anonymous = parse_maps(MAPS)
    assert (first.start, first.end, first.permissions) == (0x5581E000, 0x5581F000, b"r--p")
    assert first.what == second.what
    assert heap.what == (b"[heap]",)
    assert anonymous.what == (b"",)
    # The same file at another place in it is another mapping.
    moved = parse_maps(MAPS.replace(b"00002000", b"00009000"))
    assert layout_changes([first], moved[:1]) == [
        (Reason.UNMAP, first.start, first.end),
        (Reason.MAP, first.start, first.end),
    ]


def test_lines_that_are_none_are_left_out() -> None:
    assert parse_maps(b"nonsense\n\n" + MAPS)[0].start == 0x5581E000
    assert parse_maps(b"") == []
    assert stayed([], []).shape == (0, 2)
    assert presence_changes(intervals([]), intervals([]), intervals([])).dtype == np.uint64
