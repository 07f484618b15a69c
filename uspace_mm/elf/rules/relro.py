"""PT_GNU_RELRO, which the loader makes read-only after relocation, both ends rounded down to pages.

glibc elf/dl-reloc.c (_dl_protect_relro) and musl ldso/dynlink.c (reloc_all) do the same. bionic rounds the
end up (linker/linker_phdr.cpp, _phdr_table_set_gnu_relro_prot): every page that RELRO touches is protected.
"""

from __future__ import annotations

from uspace_mm.elf.memory import AddressSpace, round_down, round_up
from uspace_mm.elf.records import PF_R, PF_W, PF_X, Finding, Image, Level, Libc, Loader, Segment
from uspace_mm.elf.rules import remedy
from uspace_mm.guest.pagesize import PageSize

RULE = "relro"


def check(image: Image, page_size: PageSize, loader: Loader, space: AddressSpace) -> list[Finding]:
    """Play the loader's mprotect on `space` and say who lost which right, and what stayed writable."""
    relro = image.relro
    if relro is None or not relro.memsz:
        return []
    start, end = round_down(relro.vaddr, page_size.bytes), round_down(relro.end, page_size.bytes)
    if image.libc is Libc.BIONIC:
        end = round_up(relro.end, page_size.bytes)
    found: list[Finding] = []

    def report(level: Level, fact: str, consequence: str, segment: int | None = None) -> None:
        found.append(
            Finding(
                RULE,
                level,
                loader,
                f"RELRO {relro.vaddr:#x}-{relro.end:#x} {fact}",
                consequence,
                segment=relro.index if segment is None else segment,
                remedy=remedy.RELRO,
                numbers=(
                    ("relro_start", relro.vaddr),
                    ("relro_end", relro.end),
                    ("protected_start", start),
                    ("protected_end", end),
                    ("page", page_size.bytes),
                ),
            )
        )

    if start == end:
        report(Level.NOTE, f"lies in one page, {start:#x}", "nothing is protected: a protection lost")
        return found
    before = space.copy()
    if not space.protect(start, end, PF_R):
        report(
            Level.WRONG,
            f"ends past the mapped LOADs (protected to {end:#x})",
            "mprotect fails with ENOMEM, or takes what lies behind the right to be written",
        )
    for segment in image.loads:
        lost = _lost(segment, relro, before, space)
        if lost is not None:
            address, right = lost
            whose = "code" if right == PF_X else "data"
            edge = "starts" if address < relro.vaddr else "ends"
            report(
                Level.WRONG,
                f"{edge} inside a page: protects {start:#x}-{end:#x}, with {whose} of LOAD {segment.index} "
                f"({segment.rights}) at {address:#x}",
                "SIGSEGV when it runs" if right == PF_X else "SIGSEGV at the first write",
                segment.index,
            )
    if relro.end > end:
        tail = max(end, relro.vaddr)
        report(
            Level.NOTE,
            f"ends inside a page: {relro.end - tail:#x} bytes from {tail:#x} stay writable",
            "a protection lost",
        )
    return found


def _lost(
    segment: Segment, relro: Segment, before: AddressSpace, after: AddressSpace
) -> tuple[int, int] | None:
    """The first address of `segment` outside of RELRO that had a right that it asks for, and lost it."""
    for low, high in (
        (segment.vaddr, min(segment.end, relro.vaddr)),
        (max(segment.vaddr, relro.end), segment.end),
    ):
        for area in after.within(low, high):
            for had in before.within(area.start, area.end):
                lost = had.rights & segment.flags & ~area.rights & (PF_W | PF_X)
                if lost:
                    return had.start, PF_X if lost & PF_X else PF_W
    return None
