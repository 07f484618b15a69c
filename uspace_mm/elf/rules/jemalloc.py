"""jemalloc compiled for smaller pages aborts at start; no field of the file shows it, its message does.

jemalloc src/pages.c, pages_boot(): "<jemalloc>: Unsupported system page size", then abort. The page size
that it was compiled for is in no symbol, so the verdict is: unknown, run it.
"""

from __future__ import annotations

from uspace_mm.elf.records import PF_W, Finding, Image, Level, Loader
from uspace_mm.elf.rules import remedy
from uspace_mm.elf.source import Source
from uspace_mm.guest.pagesize import PAGE_SIZES, PageSize

RULE = "jemalloc"
MESSAGE = b"<jemalloc>: Unsupported system page size"
_CHUNK = 1 << 20
# Read-only data is searched up to here: the largest libraries that exist have some hundred MiB of it.
SEARCH_LIMIT = 4 << 30


def find(source: Source, image: Image) -> int | None:
    """Offset in the file of jemalloc's message, None when it is not in what is mapped read-only."""
    left = SEARCH_LIMIT
    for segment in image.loads:
        if segment.flags & PF_W:
            continue
        position, end = segment.offset, min(segment.offset + segment.filesz, source.size)
        rest = b""
        while position < end and left > 0:
            data = source.read_at(position, min(_CHUNK, end - position))
            if not data:
                break
            at = (rest + data).find(MESSAGE)
            if at >= 0:
                return position - len(rest) + at
            rest = data[-len(MESSAGE) + 1 :]
            position += len(data)
            left -= len(data)
    return None


def check(offset: int | None, page_size: PageSize, loader: Loader) -> list[Finding]:
    """A finding when the message was found at `offset`, for all but the smallest page."""
    if offset is None or page_size == PAGE_SIZES[0]:
        return []
    return [
        Finding(
            RULE,
            Level.UNKNOWN,
            loader,
            f"contains jemalloc (its message is at {offset:#x} in the file)",
            "aborts at start if compiled for smaller pages: run it there (--prove)",
            remedy=remedy.JEMALLOC,
            numbers=(("offset", offset), ("page", page_size.bytes)),
        )
    ]
