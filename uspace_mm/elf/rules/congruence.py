"""p_vaddr and p_offset of a LOAD differ by no multiple of the page, which mmap cannot express."""

from __future__ import annotations

from uspace_mm.elf.records import Finding, Image, Level, Loader
from uspace_mm.elf.rules import remedy
from uspace_mm.guest.pagesize import PageSize

RULE = "congruence"

_CONSEQUENCE = {
    # elf/dl-load.c since 2.35: "ELF load command address/offset not page-aligned".
    Loader.GLIBC: (Level.FAILS, "refused"),
    Loader.GLIBC_OLD: (Level.FAILS, "refused"),
    # linker_phdr.cpp maps at rounded addresses as musl does, but such a file fails the check of p_align.
    Loader.BIONIC: (Level.FAILS, "refused"),
    # ldso/dynlink.c, map_library: rounds both down and does not compare.
    Loader.MUSL: (Level.WRONG, "maps the wrong bytes, without a message"),
    # fs/binfmt_elf.c, elf_map: mmap gets an offset inside a page, EINVAL after the old program is gone.
    Loader.KERNEL: (Level.FAILS, "killed at exec (SIGSEGV, without a message)"),
}


def check(image: Image, page_size: PageSize, loader: Loader) -> list[Finding]:
    """A finding per LOAD whose p_vaddr - p_offset is no multiple of the page."""
    found = []
    level, consequence = _CONSEQUENCE[loader]
    for segment in image.loads:
        difference = segment.vaddr - segment.offset
        if difference % page_size.bytes == 0 or (loader is Loader.KERNEL and not segment.filesz):
            continue
        found.append(
            Finding(
                RULE,
                level,
                loader,
                f"LOAD {segment.index} ({segment.rights}): p_vaddr {segment.vaddr:#x} - "
                f"p_offset {segment.offset:#x} leaves {difference % page_size.bytes:#x} "
                f"over a multiple of {page_size.bytes:#x}",
                consequence,
                segment=segment.index,
                remedy=remedy.PATCHELF
                if segment.align < page_size.bytes <= image.loads[0].align
                else remedy.MAX_PAGE_SIZE,
                numbers=(
                    ("p_vaddr", segment.vaddr),
                    ("p_offset", segment.offset),
                    ("remainder", difference % page_size.bytes),
                    ("page", page_size.bytes),
                ),
            )
        )
    return found
