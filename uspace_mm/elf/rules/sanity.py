"""Headers that no loader can follow, whatever the page size: contradicting sizes, LOADs out of order."""

from __future__ import annotations

from uspace_mm.elf.records import Finding, Image, Level, Loader
from uspace_mm.elf.rules import remedy

RULE = "format"
# 47 bits: what every 64-bit Linux leaves to a process whatever its page size (arm64 with 64K pages: 42 to
# 52 bits).
MAX_SPAN = {64: 1 << 47, 32: 1 << 32}


def check(image: Image, loader: Loader) -> list[Finding]:
    """Findings about `image` that hold for every page size."""
    found = []

    def fails(fact: str, consequence: str, segment: int | None = None, level: Level = Level.FAILS) -> None:
        found.append(Finding(RULE, level, loader, fact, consequence, segment=segment, remedy=remedy.BROKEN))

    for segment in image.loads:
        name = f"LOAD {segment.index}"
        if segment.filesz and segment.offset + segment.filesz > image.size:
            fails(
                f"truncated: {name} takes the file's bytes {segment.offset:#x} to "
                f"{segment.offset + segment.filesz:#x}, the file ends at {image.size:#x}",
                "SIGBUS, or zeros where bytes are missing",
                segment.index,
            )
        if segment.filesz > segment.memsz:
            fails(
                f"{name}: p_filesz {segment.filesz:#x} is larger than p_memsz {segment.memsz:#x}",
                "killed at exec" if loader is Loader.KERNEL else "mapped past its end",
                segment.index,
                Level.FAILS if loader is Loader.KERNEL else Level.WRONG,
            )
    span = max(segment.end for segment in image.loads) - min(segment.vaddr for segment in image.loads)
    if span > MAX_SPAN[image.bits]:
        fails(f"the LOADs are {span:#x} bytes apart", "no address space for them")
    # The kernel (since 5.18) and musl seek the lowest and the highest; glibc takes the first and the last.
    if loader not in (Loader.KERNEL, Loader.MUSL) and any(
        after.vaddr < before.vaddr for before, after in zip(image.loads, image.loads[1:], strict=False)
    ):
        fails(
            "the LOADs are not in ascending order of their addresses",
            "maps some outside of the room that it took for the file",
            level=Level.WRONG,
        )
    return found
