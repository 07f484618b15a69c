"""Debian's own kernels, with the modules that a guest needs before it can see its root file system."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from uspace_mm.errors import InputError, UspaceError
from uspace_mm.guest import cache
from uspace_mm.guest.debian import Archive, Package, PackageGone, extract
from uspace_mm.guest.kernel.contents import contents
from uspace_mm.guest.kernel.header import read_header, read_version
from uspace_mm.guest.kernel.model import Kernel
from uspace_mm.guest.kernel.modules import Modules, unpack
from uspace_mm.guest.pagesize import PageSize, parse_page_size
from uspace_mm.guest.progress import Progress, silent

KIND = "kernel-debian"
# Disk and file systems. PCI, virtio_pci and virtio's console are built in.
MODULES = ("virtio_mmio", "virtio_blk", "squashfs", "overlay")
_META_PACKAGES = {"4k": "linux-image-arm64", "16k": "linux-image-arm64-16k"}
# What was looked up stays so long; the archive's own lists are kept as long.
_LOOKED_UP_S = 24 * 3600
_RECIPE = 1
_NEEDED = re.compile(r"boot/(?:vmlinuz|config)-|(?:usr/)?lib/modules/")


def fetch(
    page_size: PageSize,
    *,
    modules: Sequence[str] = MODULES,
    update: bool = False,
    progress: Progress = silent,
) -> Kernel:
    """Debian's newest kernel with `page_size`, with `modules` and what they need, unpacked into the cache.

    Which one is newest is looked up once a day, or with `update`. Raises :class:`InputError` for 64K, which
    nobody ships, and for a module that the package lacks; :class:`ArchiveError` when the mirror cannot be
    reached.
    """
    meta = _META_PACKAGES.get(page_size.name)
    if meta is None:
        raise InputError(
            f"Debian ships no arm64 kernel with {page_size} pages: "
            f"uspace-mm guest kernel build --page-size {page_size} makes one"
        )
    package = None if update else _looked_up(meta)
    if package is None or cache.find(KIND, _inputs(package, modules)) is None:
        package = package or _look_up(meta, progress)
        try:
            (deb,) = Archive(progress=progress).fetch([package])
        except PackageGone:
            package = _look_up(meta, progress)
            (deb,) = Archive(progress=progress).fetch([package])

        def make(entry: Path, package: Package = package) -> None:
            _unpack(deb, package, page_size, modules, entry, progress)

        cache.obtain(KIND, _inputs(package, modules), make, progress=progress)
    entry = cache.find(KIND, _inputs(package, modules))
    if entry is None:
        raise UspaceError(f"{package}: its kernel vanished from the cache while it was used; try again")
    return _read(entry)


def cached() -> list[Kernel]:
    """Debian's kernels in the cache, the oldest first."""
    found = []
    for manifest in (cache.cache_root() / KIND).glob(f"*/{cache.MANIFEST}"):
        try:
            inputs = json.loads(manifest.read_text())["inputs"]
            if cache.find(KIND, inputs) == manifest.parent:
                found.append((manifest.stat().st_mtime_ns, _read(manifest.parent)))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged, or removed meanwhile
    return [kernel for _, kernel in sorted(found, key=lambda pair: pair[0])]


def _inputs(package: Package, modules: Sequence[str]) -> dict[str, object]:
    return {"recipe": _RECIPE, "sha256": package.sha256, "modules": list(modules)}


def _record(meta: str) -> Path:
    return cache.cache_root() / KIND / f"{meta}.json"


def _looked_up(meta: str) -> Package | None:
    path = _record(meta)
    try:
        if abs(time.time() - path.stat().st_mtime) > _LOOKED_UP_S:
            return None
        return Package(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _look_up(meta: str, progress: Progress) -> Package:
    """The package that the meta package names, of which only the newest is in the archive."""
    image = re.compile(r"linux-image-\d[\w.+~-]*")
    found = [
        package
        for package in Archive(progress=progress).packages([meta], dependencies=True)
        if image.fullmatch(package.name)
    ]
    if len(found) != 1:
        names = ", ".join(package.name for package in found) or "none"
        raise UspaceError(f"{meta} should need one kernel and needs {names}; give an image with --kernel")
    path = _record(meta)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            new.write_text(json.dumps(asdict(found[0])))
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise cache.CacheError(
            f"cannot write to {path.parent}: {error.strerror}; set UMM_GUEST_CACHE to a folder of your own"
        ) from error
    return found[0]


def _unpack(
    deb: Path, package: Package, size: PageSize, wanted: Sequence[str], entry: Path, progress: Progress
) -> None:
    progress(f"unpacking {package}")
    folder = entry / "package"
    extract(deb, folder, only=lambda name: _NEEDED.match(name) is not None)
    images = sorted(folder.glob("boot/vmlinuz-*"))
    trees = sorted([*folder.glob("usr/lib/modules/*"), *folder.glob("lib/modules/*")])
    if len(images) != 1 or len(trees) != 1:
        raise InputError(
            f"{deb}: no kernel package: it has {len(images)} boot/vmlinuz and {len(trees)} lib/modules"
        )
    with contents(images[0]) as held:
        header = read_header(held.data, images[0])
        version, _ = read_version(held.data, images[0])
        if header.page_size is not size:
            raise InputError(f"{package}: its kernel has {header.page_size} pages, not {size}")
        with (entry / "Image").open("wb") as out:
            held.data.seek(0)
            shutil.copyfileobj(held.data, out, 1 << 20)
    for config in folder.glob("boot/config-*"):
        config.rename(entry / "config")
    names = []
    (entry / "modules").mkdir()
    for name, path in Modules(trees[0]).order(wanted):
        (entry / "modules" / f"{name}.ko").write_bytes(unpack(path))
        names.append(name)
    record = {"page_size": size.name, "version": version, "package": str(package), "modules": names}
    (entry / "kernel.json").write_text(json.dumps(record, indent=1))
    shutil.rmtree(folder)


def _read(entry: Path) -> Kernel:
    record = json.loads((entry / "kernel.json").read_text())
    return Kernel(
        entry / "Image",
        parse_page_size(record["page_size"]),
        record["version"],
        "debian",
        tuple(entry / "modules" / f"{name}.ko" for name in record["modules"]),
        config=entry / "config" if (entry / "config").exists() else None,
    )
