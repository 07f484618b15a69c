"""A kernel image that the user names."""

from __future__ import annotations

import shutil
from pathlib import Path

from uspace_mm.errors import InputError
from uspace_mm.guest import cache
from uspace_mm.guest.kernel.contents import contents
from uspace_mm.guest.kernel.header import read_header, read_version
from uspace_mm.guest.kernel.model import Kernel


def from_file(image: Path) -> Kernel:
    """The kernel in the file `image`: an arm64 Image, also packed (gzip, zstd, xz, lz4) or as an EFI image.

    A packed one is unpacked into the cache, since QEMU before 8.0 boots no packed EFI image. Raises
    :class:`InputError` for what is no arm64 kernel, damaged or big-endian.
    """
    with contents(image) as held:
        header = read_header(held.data, image)
        if header.big_endian:
            raise InputError(f"{image}: a big-endian kernel, which our guests' programs do not run on")
        version, _ = read_version(held.data, image)
        path = image.absolute()
        if held.packing is not None:
            data = held.data

            def make(entry: Path) -> None:
                with (entry / "Image").open("wb") as out:
                    data.seek(0)
                    shutil.copyfileobj(data, out, 1 << 20)

            path = cache.obtain("kernel-image", {"sha256": cache.digest_file(image)}, make) / "Image"
    return Kernel(path, header.page_size, version, "file")
