"""The size table of the boot-time page size series, for kernels at hand: image, text and data, and
differences.

The series ("Boot-time page size selection for arm64", RFC of October 2024, 57 patches, not merged) prints,
for one configuration, the image's size on disk and the text and data of vmlinux: for kernels of each page
size without the series, with it and the size compiled in, and with the size chosen at boot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uspace_mm.errors import InputError
from uspace_mm.guest.kernel import own
from uspace_mm.guest.kernel.inspection import inspect
from uspace_mm.guest.pagesize import PageSize, parse_page_size

MEASURES = ("image", "text", "data")


@dataclass(frozen=True)
class Measured:
    """One column: sizes in KB of 1024 bytes, by the names of :data:`MEASURES`; one that is not known is
    missing."""

    label: str
    page_size: PageSize | None
    version: str
    kb: dict[str, float]

    def difference(self, measure: str, base: Measured) -> tuple[float, float] | None:
        """How much larger than in `base`, in KB and in percent of it; None when either is not known."""
        if measure not in self.kb or not base.kb.get(measure):
            return None
        more = self.kb[measure] - base.kb[measure]
        return more, 100 * more / base.kb[measure]


def _published(label: str, size: str | None, image: int, text: int, data: int) -> Measured:
    page_size = parse_page_size(size) if size else None
    return Measured(
        label, page_size, "RFC 2024", dict(zip(MEASURES, map(float, (image, text, data)), strict=True))
    )


# As its cover letter has them.
PUBLISHED = (
    _published("base-4k", "4k", 54895, 20561, 14314),
    _published("base-16k", "16k", 55161, 20439, 14625),
    _published("base-64k", "64k", 56775, 20435, 15673),
    _published("compile-4k", "4k", 54895, 20565, 14315),
    _published("compile-16k", "16k", 55097, 20443, 14517),
    _published("compile-64k", "64k", 56391, 20439, 15134),
    _published("boot-time", None, 57045, 20811, 15287),
)


def measure(name: str) -> Measured:
    """The column for `name`: a page size (our cached kernel), an image, or a vmlinux.

    An image's vmlinux is looked for beside it and where the kernel's build leaves it. Raises
    :class:`InputError` for a file that is no kernel and for a page size of which none is cached.
    """
    image, vmlinux = _files(name)
    kb: dict[str, float] = {}
    found = None
    if vmlinux is not None:
        found = inspect(vmlinux)
        if found.sections is None:
            raise InputError(f"{vmlinux}: no vmlinux (an ELF file) but an image")
        kb |= {"text": found.sections.text_bytes / 1024, "data": found.sections.data_bytes / 1024}
    if image is not None:
        other = found
        found = inspect(image)
        kb["image"] = found.kernel_bytes / 1024
        if other is not None and other.banner != found.banner:
            raise InputError(f"{vmlinux} is not what {image} was made of: their banners differ")
    assert found is not None
    return Measured(name, found.page_size, found.version, kb)


def _files(name: str) -> tuple[Path | None, Path | None]:
    try:
        size = parse_page_size(name)
    except InputError:
        path = Path(name)
        if _is_elf(path):
            return None, path
        beside = [path.parent / "vmlinux", *path.absolute().parents[3:4]]
        candidates = [beside[0], *(folder / "vmlinux" for folder in beside[1:])]
        return path, next((file for file in candidates if _is_elf(file)), None)
    kernel = own.find(size, build=False)
    return kernel.image, kernel.vmlinux


def _is_elf(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4) == b"\x7fELF"
    except (OSError, ValueError):
        return False


def published_for(ours: Sequence[Measured]) -> list[Measured]:
    """The published columns to stand beside `ours`: the base kernels of the same page sizes, in the same
    order."""
    columns = []
    for column in ours:
        prefix = "boot-time" if column.page_size is None else f"base-{column.page_size}"
        columns.append(next(item for item in PUBLISHED if item.label == prefix))
    return columns
