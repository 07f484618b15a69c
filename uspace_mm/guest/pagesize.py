"""The base page sizes of arm64: one frozen record each, and how people write them."""

from __future__ import annotations

from dataclasses import dataclass

from uspace_mm.errors import InputError


@dataclass(frozen=True)
class PageSize:
    """One base page size.

    ``bytes`` is the page, ``pmd_bytes`` what one PMD entry maps (a huge page). ``header_code`` is bits 1-2 of
    the flags in the kernel image's header (Documentation/arch/arm64/booting.rst), ``config`` the kernel's
    option.
    """

    name: str
    bytes: int
    pmd_bytes: int
    header_code: int
    config: str

    def __str__(self) -> str:
        return self.name


def _page_size(name: str, kib: int, header_code: int) -> PageSize:
    # A table of 8-byte entries fills one page; an entry of the second level maps a whole table of pages.
    size = kib << 10
    return PageSize(name, size, size * (size // 8), header_code, f"ARM64_{kib}K_PAGES")


PAGE_SIZES: tuple[PageSize, ...] = (
    _page_size("4k", 4, 1),
    _page_size("16k", 16, 2),
    _page_size("64k", 64, 3),
)


def parse_page_size(text: str) -> PageSize:
    """The page size meant by ``4k``, ``16K``, ``64kb``, ``65536``; raises :class:`InputError` else."""
    wanted = text.strip().lower().removesuffix("b").removesuffix("i")
    for size in PAGE_SIZES:
        if wanted in (size.name, str(size.bytes)):
            return size
    raise InputError(f"page size {text!r}: arm64 has 4k, 16k and 64k")


def parse_page_sizes(text: str) -> tuple[PageSize, ...]:
    """Several, separated by commas, each once, in the order given; ``all`` is every one."""
    if text.strip().lower() == "all":
        return PAGE_SIZES
    sizes = tuple(dict.fromkeys(parse_page_size(part) for part in text.split(",") if part.strip()))
    if not sizes:
        raise InputError("no page size given: write 4k, 16k or 64k, or several with commas between")
    return sizes


def page_size_of(size_bytes: int) -> PageSize | None:
    """The record of a page of `size_bytes`, None when arm64 has no such page."""
    return next((size for size in PAGE_SIZES if size.bytes == size_bytes), None)
