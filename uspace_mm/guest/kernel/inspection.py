"""What is in a kernel file: an image of any packing, or the vmlinux it was made of."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from uspace_mm.errors import InputError
from uspace_mm.guest.kernel.contents import Contents, contents
from uspace_mm.guest.kernel.header import page_size_of_config, read_config, read_header, read_version
from uspace_mm.guest.kernel.sections import DEFINITION, Sections, read_sections
from uspace_mm.guest.pagesize import PageSize


@dataclass(frozen=True)
class Inspection:
    """What a kernel file says of itself; sizes in bytes.

    ``header`` and ``config`` are the page sizes that its header and its IKCONFIG say, None where they say
    none; ``has_config`` is whether it carries IKCONFIG. ``kernel_bytes`` is the image unpacked. Only images
    have ``text_offset`` and ``memory_bytes`` (what it takes in memory, with bss), only vmlinux has
    ``sections``.
    """

    path: Path
    kind: Literal["image", "vmlinux"]
    version: str
    banner: str
    header: PageSize | None
    config: PageSize | None
    has_config: bool
    packing: str | None
    file_bytes: int
    kernel_bytes: int
    text_offset: int | None = None
    memory_bytes: int | None = None
    big_endian: bool = False
    sections: Sections | None = None

    @property
    def page_size(self) -> PageSize | None:
        """That of the header, else of IKCONFIG; None when it is chosen at boot."""
        return self.header or self.config

    @property
    def page_size_from(self) -> Literal["header", "IKCONFIG", "chosen at boot", "not said"]:
        """What the page size was read from."""
        if self.header:
            return "header"
        if self.config:
            return "IKCONFIG"
        return "chosen at boot" if self.kind == "image" else "not said"

    @property
    def contradiction(self) -> str | None:
        """Set when header and IKCONFIG differ: one of the two was tampered with."""
        if self.header and self.config and self.header is not self.config:
            return f"the header says {self.header} pages, the configuration inside {self.config}"
        return None

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        sections = None if self.sections is None else {**asdict(self.sections), "definition": DEFINITION}
        return {
            "path": str(self.path),
            "kind": self.kind,
            "version": self.version,
            "banner": self.banner,
            "page_size": str(self.page_size) if self.page_size else None,
            "page_size_from": self.page_size_from,
            "header": str(self.header) if self.header else None,
            "config": str(self.config) if self.config else None,
            "contradiction": self.contradiction,
            "packing": self.packing,
            "file_bytes": self.file_bytes,
            "kernel_bytes": self.kernel_bytes,
            "text_offset": self.text_offset,
            "memory_bytes": self.memory_bytes,
            "big_endian": self.big_endian,
            "sections": sections,
        }


def inspect(path: Path) -> Inspection:
    """Look into the kernel at `path`: an arm64 image, packed or not, or a vmlinux.

    Raises :class:`InputError` for anything else and for what is damaged.
    """
    with contents(path) as held:
        version, banner = read_version(held.data, path)
        text = read_config(held.data)
        config = None if text is None else page_size_of_config(text)
        if held.data[:4] == b"\x7fELF":
            return Inspection(
                path,
                "vmlinux",
                version,
                banner,
                None,
                config,
                text is not None,
                held.packing,
                held.file_bytes,
                len(held.data),
                sections=_sections(path, held),
            )
        header = read_header(held.data, path)
        return Inspection(
            path,
            "image",
            version,
            banner,
            header.page_size,
            config,
            text is not None,
            held.packing,
            held.file_bytes,
            len(held.data),
            header.text_offset,
            header.image_bytes,
            header.big_endian,
        )


def _sections(path: Path, held: Contents) -> Sections:
    if held.packing is not None:
        raise InputError(f"{path}: a vmlinux packed with {held.packing}: unpack it first")
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        return read_sections(file, path)
