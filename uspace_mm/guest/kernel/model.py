"""What a guest boots: one record per kernel, and the argument that chooses a page size at boot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uspace_mm.guest.pagesize import PageSize


@dataclass(frozen=True)
class Kernel:
    """One arm64 kernel.

    ``image`` is what QEMU's ``-kernel`` takes, ``page_size`` is None when the image's header says
    "unspecified": then it is chosen at boot (see :func:`boot_argument`). ``modules`` are uncompressed and
    are to be loaded from the initramfs in this order, before anything else. ``vmlinux`` and ``config`` are
    there when we built it.
    """

    image: Path
    page_size: PageSize | None
    version: str
    origin: Literal["built", "debian", "file"]
    modules: tuple[Path, ...] = ()
    vmlinux: Path | None = None
    config: Path | None = None


def boot_argument(page_size: PageSize) -> str:
    """The kernel argument that chooses `page_size` in an image for all sizes: ``arm64.pagesize=16k``.

    Lower case only, and a size that is unknown or that the CPU lacks silently becomes the largest: whoever
    boots with it compares AT_PAGESZ in the guest. Kernels with a compiled-in size ignore it. Source: the
    boot-time page size series of October 2024 (RFC, not merged).
    """
    return f"arm64.pagesize={page_size.name.lower()}"
