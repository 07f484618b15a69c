"""The steps in which each loader maps a file, played on an :class:`AddressSpace` for one page size.

Sources: glibc elf/dl-load.c (_dl_map_object_from_fd) and elf/dl-map-segments.h, musl ldso/dynlink.c
(map_library, reclaim_gaps), Linux fs/binfmt_elf.c (elf_map, elf_load). Addresses are relative to where the
file is loaded. What the loaders check before they map anything are rules of their own (congruence,
alignment).
"""

from __future__ import annotations

from uspace_mm.elf.memory import AddressSpace, Content, round_down, round_up
from uspace_mm.elf.records import PF_R, PF_W, PF_X, Loader, Segment


class RefusedError(Exception):
    """The loader gives up, or dies, while it maps the file."""

    def __init__(self, segment: Segment, fact: str, consequence: str) -> None:
        super().__init__(f"{fact}: {consequence}")
        self.segment = segment
        self.fact = fact
        self.consequence = consequence


def load(loads: tuple[Segment, ...], page: int, loader: Loader) -> AddressSpace:
    """The memory after `loader` has mapped `loads`, before RELRO; raises :class:`RefusedError`."""
    if loader is Loader.MUSL:
        return _musl(loads, page)
    if loader is Loader.KERNEL:
        return _kernel(loads, page)
    return _glibc(loads, page)


def _glibc(loads: tuple[Segment, ...], page: int) -> AddressSpace:
    space = AddressSpace()
    first, last = loads[0], loads[-1]
    base = round_down(first.vaddr, page)
    first_end = round_up(first.file_end, page)
    last_start = round_down(last.vaddr, page)
    holes = any(
        round_up(before.file_end, page) != round_down(segment.vaddr, page)
        for before, segment in zip(loads, loads[1:], strict=False)
    )
    space.map_file(base, round_up(last.end, page), round_down(first.offset, page), first.flags)
    if holes:
        if last_start < first_end:
            # mprotect over "the rest" would have a negative length.
            raise RefusedError(
                last,
                f"LOADs that do not follow each other page by page; the last starts at {last_start:#x}, "
                f"rounded to pages, below the first one's end at {first_end:#x}",
                "refused",
            )
        space.protect(first_end, last_start, 0)
    for segment in loads:
        start, file_end = round_down(segment.vaddr, page), round_up(segment.file_end, page)
        if segment is not first:
            space.map_file(start, file_end, round_down(segment.offset, page), segment.flags)
        if segment.memsz > segment.filesz:
            zero_page = min(round_up(segment.file_end, page), segment.end)
            # A page that may not be written is made writable for it.
            space.fill(segment.file_end, zero_page, Content.ZERO)
            space.map_zeros(zero_page, round_up(segment.end, page), segment.flags)
    return space


def _musl(loads: tuple[Segment, ...], page: int) -> AddressSpace:
    space = AddressSpace()
    lowest = min(loads, key=lambda segment: segment.vaddr)
    base = round_down(lowest.vaddr, page)
    end = round_up(max(segment.end for segment in loads), page)
    offset = round_down(lowest.offset, page)
    # map_len counts the offset as well, so there is more than the segments need.
    space.map_file(base, end + offset, offset, lowest.flags)
    for segment in loads:
        start, segment_end = round_down(segment.vaddr, page), round_up(segment.end, page)
        if start != base:
            space.map_file(start, segment_end, round_down(segment.offset, page), segment.flags)
        if segment.memsz > segment.filesz and segment.flags & PF_W:
            zero_page = round_up(segment.file_end, page)
            if not space.all_have(segment.file_end, zero_page, PF_W):
                raise RefusedError(
                    segment,
                    f"LOAD {segment.index} ({segment.rights}) starts in the file's lowest page, which is "
                    f"mapped once, with the rights of LOAD {lowest.index} ({lowest.rights})",
                    "the loader is killed when it clears the end of the data",
                )
            space.fill(segment.file_end, zero_page, Content.ZERO)
            if zero_page < segment_end:
                space.map_zeros(zero_page, segment_end, segment.flags)
    return space


def _kernel(loads: tuple[Segment, ...], page: int) -> AddressSpace:
    space = AddressSpace()
    for segment in loads:
        start, file_end = round_down(segment.vaddr, page), round_up(segment.file_end, page)
        if segment.filesz:
            space.map_file(start, file_end, segment.offset - segment.vaddr % page, segment.flags)
            if segment.memsz > segment.filesz and segment.flags & PF_W:
                space.fill(segment.file_end, file_end, Content.ZERO)
        else:
            file_end = start
        if segment.memsz > segment.filesz:
            # vm_brk_flags: written to whatever the segment says, executed only when it says so.
            space.map_zeros(file_end, round_up(segment.end, page), PF_R | PF_W | segment.flags & PF_X)
    return space


def give_gaps_to_malloc(
    space: AddressSpace, loads: tuple[Segment, ...], relro: Segment | None, page: int
) -> None:
    """musl's reclaim_gaps for an executable: the rest of the pages of its written segments becomes heap."""
    protected = range(0)
    if relro:
        protected = range(round_down(relro.vaddr, page), round_down(relro.end, page))
    for segment in loads:
        if segment.flags & (PF_R | PF_W) != PF_R | PF_W:
            continue
        for start, end in (
            (round_down(segment.vaddr, page), segment.vaddr),
            (segment.end, round_up(segment.end, page)),
        ):
            if start in protected:
                start = protected.stop
            if end in protected:
                end = protected.start
            if start < end:
                space.fill(start, end, Content.REUSED)
