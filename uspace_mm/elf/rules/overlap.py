"""LOADs that share a page: whether every byte still has its content and its rights once all are mapped.

Harmless is read-only data that becomes writable. Code that may not run, data that may not be written, and
bytes that another segment's mapping replaced, are not.
"""

from __future__ import annotations

from uspace_mm.elf.memory import AddressSpace, Area, Content
from uspace_mm.elf.records import PF_R, PF_W, PF_X, Finding, Image, Level, Loader, Segment, format_rights
from uspace_mm.elf.rules import remedy
from uspace_mm.guest.pagesize import PageSize

RULE = "overlap"


def check(image: Image, page_size: PageSize, loader: Loader, space: AddressSpace) -> list[Finding]:
    """Compare `space`, as the loader left it before RELRO, with what each LOAD asks for."""
    found: list[Finding] = []
    for segment in image.loads:
        if not segment.memsz:
            continue
        # Reported by the rule of congruence, with its reason.
        incongruent = (segment.vaddr - segment.offset) % page_size.bytes != 0
        seen: set[str] = set()
        for fact, consequence, level, area in _differences(segment, space):
            if (incongruent and fact == "bytes") or fact in seen:
                continue
            seen.add(fact)
            found.append(_finding(image, segment, page_size, loader, area, (fact, consequence, level)))
    return found


def _differences(segment: Segment, space: AddressSpace) -> list[tuple[str, str, Level, Area]]:
    found = []
    position = segment.vaddr
    for area in space.within(segment.vaddr, segment.end):
        if area.start > position:
            found.append(("unmapped", "SIGSEGV", Level.WRONG, area))
        position = area.end
        if not _bytes_are_right(segment, area):
            found.append(("bytes", "other bytes there", Level.WRONG, area))
        lacks = segment.flags & ~area.rights
        if lacks & PF_X:
            found.append(("code", "SIGSEGV when it runs", Level.WRONG, area))
        if lacks & PF_W:
            found.append(("written data", "SIGSEGV at the first write", Level.WRONG, area))
        if lacks & PF_R and not lacks & (PF_X | PF_W):
            found.append(("data", "SIGSEGV when it is read", Level.WRONG, area))
        # Zeroed pages of the kernel's are writable whatever the segment says; nobody is harmed.
        if area.rights & ~segment.flags & PF_W and area.content is Content.FILE:
            found.append(("writable", "can be written: a protection lost", Level.NOTE, area))
    if position < segment.end:
        found.append(("unmapped", "SIGSEGV", Level.WRONG, Area(position, segment.end, Content.ZERO, 0, 0)))
    return found


def _bytes_are_right(segment: Segment, area: Area) -> bool:
    if area.content is Content.REUSED:
        return False
    wanted_from_file = area.cut(segment.vaddr, segment.file_end) if area.start < segment.file_end else None
    if wanted_from_file:
        if area.content is not Content.FILE:
            return False
        if area.offset - area.start != segment.offset - segment.vaddr:
            return False
    # Zeros at the end of data that is only read are nobody's business (glibc clears them, the others do not).
    wants_zeros = area.end > segment.file_end and bool(segment.flags & PF_W)
    return not (wants_zeros and area.content is not Content.ZERO)


def _finding(
    image: Image,
    segment: Segment,
    page_size: PageSize,
    loader: Loader,
    area: Area,
    what: tuple[str, str, Level],
) -> Finding:
    kind, consequence, level = what
    # An area of a shared page is at most as long as the page; a longer one is told by its first page.
    page = area.start - area.start % page_size.bytes
    others = [
        other
        for other in image.loads
        if other is not segment and other.vaddr < page + page_size.bytes and page < other.end
    ]
    shared = " and ".join(f"LOAD {other.index} ({other.rights})" for other in others[:3])
    fact = f"LOAD {segment.index} ({segment.rights}) {segment.vaddr:#x}-{segment.end:#x}"
    if shared:
        fact += f" shares the page at {page:#x} with {shared}"
    else:
        fact += f" is not mapped as it asks at {area.start:#x}"
    text = f"{kind} at {area.start:#x} is {format_rights(area.rights)}: {consequence}"
    if kind in ("bytes", "unmapped"):
        reused = area.content is Content.REUSED
        text = "given to malloc, which overwrites it" if reused else consequence
    elif kind == "writable":
        text = consequence
    return Finding(
        RULE,
        level,
        loader,
        fact,
        text,
        segment=segment.index,
        remedy=remedy.MAX_PAGE_SIZE,
        numbers=(("page_address", page), ("address", area.start), ("page", page_size.bytes)),
    )
