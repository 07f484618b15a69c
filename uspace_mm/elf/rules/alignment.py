"""p_align of a LOAD is smaller than the page: old glibc and bionic refuse it, the others do not look."""

from __future__ import annotations

from uspace_mm.elf.records import Finding, Image, Level, Loader
from uspace_mm.elf.rules import remedy
from uspace_mm.guest.pagesize import PageSize

RULE = "p-align"


def check(image: Image, page_size: PageSize, loader: Loader) -> list[Finding]:
    """A finding per LOAD that the loader refuses for its p_align."""
    found = []
    for segment in image.loads:
        consequence = ""
        fact = f"LOAD {segment.index} ({segment.rights}): p_align {segment.align:#x}"
        if loader is Loader.GLIBC_OLD:
            # elf/dl-load.c of 2.34: both conditions, in this order; p_align 0 makes the second one compare
            # all bits.
            mask = (segment.align - 1) & 0xFFFFFFFFFFFFFFFF
            if segment.align & (page_size.bytes - 1):
                fact += f" is no multiple of {page_size.bytes:#x}"
                consequence = "refused"
            elif (segment.vaddr - segment.offset) & mask:
                fact += f" does not divide p_vaddr {segment.vaddr:#x} - p_offset {segment.offset:#x}"
                consequence = "refused"
        elif loader is Loader.BIONIC and segment.align < page_size.bytes:
            fact += f" is smaller than {page_size.bytes:#x}"
            consequence = "refused unless in compatibility mode"
        if consequence:
            found.append(
                Finding(
                    RULE,
                    Level.FAILS,
                    loader,
                    fact,
                    consequence,
                    segment=segment.index,
                    remedy=remedy.MAX_PAGE_SIZE,
                    numbers=(("p_align", segment.align), ("page", page_size.bytes)),
                )
            )
    return found
