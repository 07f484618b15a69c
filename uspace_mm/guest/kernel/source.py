"""Where the kernel's source comes from: a Debian package, a tarball or a folder, each known by a digest."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.guest import cache
from uspace_mm.guest.debian import Archive, Package, PackageGone, extract
from uspace_mm.guest.kernel import tarball
from uspace_mm.guest.progress import Progress, silent

DEFAULT_SOURCE = "linux-source-6.12"
_PACKAGE = re.compile(r"linux-source-\d+\.\d+")


@dataclass(frozen=True)
class Source:
    """``digest`` names the content: of a package and a tarball its SHA-256, of a folder that of its files'
    status."""

    name: str
    kind: Literal["package", "tarball", "folder"]
    digest: str
    path: Path | None = None
    package: Package | None = None


def resolve(
    given: str | Path | None = None,
    *,
    sha256: str | None = None,
    update: bool = False,
    progress: Progress = silent,
) -> Source:
    """The source that `given` means: the name of a Debian package, a tarball, a folder; None: the default
    package.

    A package is looked up once and then stays the version that was found, until `update`. `sha256` is the
    expected digest of the package or tarball. Raises :class:`InputError` when there is no such source or
    its digest is another one. The content itself is read later, by :func:`unpack`.
    """
    text = str(given or DEFAULT_SOURCE)
    if _PACKAGE.fullmatch(text) and not Path(text).exists():
        package = _pinned(text, update, progress)
        source = Source(str(package), "package", package.sha256, package=package)
    else:
        try:
            source = _local(Path(text).absolute(), progress)
        except OSError as error:
            raise InputError(f"{text[:200]}: cannot be read: {error.strerror}") from error
    if sha256 is not None:
        if source.kind == "folder":
            raise InputError(f"{text}: a folder has no SHA-256; give a tarball, or leave the digest out")
        if source.digest != sha256.strip().lower():
            raise InputError(f"{source.name}: its SHA-256 is {source.digest}, not the {sha256} asked for")
    return source


def _local(path: Path, progress: Progress) -> Source:
    if path.is_dir():
        check_tree(path)
        return Source(str(path), "folder", _digest_of_tree(path), path)
    if path.is_file():
        return Source(str(path), "tarball", _remembered_digest(path, progress), path)
    raise InputError(
        f"{path}: neither a file or folder nor a package with a kernel's source (linux-source-6.12)"
    )


def available(source: Source, progress: Progress) -> Source:
    """`source` with its package in the cache, or its successor when the mirror has replaced it."""
    if source.package is None:
        return source
    try:
        Archive(progress=progress).fetch([source.package])
    except PackageGone:
        progress(f"{source.package} is gone from the mirror, taking its successor")
        source = resolve(source.package.name, update=True, progress=progress)
        assert source.package is not None
        Archive(progress=progress).fetch([source.package])
    return source


def unpack(source: Source, folder: Path, progress: Progress) -> Path:
    """Unpack the package or tarball `source` in `folder`; returns the tree.

    Raises :class:`InputError` when it is damaged, a bomb, or no Linux source.
    """
    path = source.path
    if source.package is not None:
        (deb,) = Archive(progress=progress).fetch([source.package])
        progress(f"unpacking {source.name}")
        extract(deb, folder / "package", only=lambda name: name.startswith("usr/src/linux-source-"))
        found = sorted((folder / "package" / "usr" / "src").glob("linux-source-*.tar.*"))
        if not found:
            raise InputError(f"{source.name}: its package holds no usr/src/linux-source-*.tar.*")
        path = found[0]
    assert path is not None
    tree = tarball.unpack(path, folder / "tree", progress)
    if source.package is not None:
        path.unlink()
    check_tree(tree, str(path if source.package is None else source.name))
    return tree


def check_tree(tree: Path, name: str | None = None) -> None:
    """Raise :class:`InputError` when `tree` is no Linux source for arm64 or has been built in."""
    name = name or str(tree)
    try:
        makefile = (tree / "Makefile").read_text(errors="replace")[:4000]
    except OSError:
        makefile = ""
    whole = all(
        (tree / part).exists() for part in ("Kconfig", "arch/arm64/Kconfig", "scripts/Makefile.build", "mm")
    )
    if not whole or not re.search(r"^PATCHLEVEL\s*=", makefile, re.MULTILINE):
        raise InputError(f"{name}: not the source of a Linux kernel (Makefile, arch/arm64, scripts, mm)")
    if (tree / ".config").exists() or (tree / "include" / "config").exists():
        raise InputError(f"{name}: has been built in, so it cannot be built from; run make mrproper there")


def _pinned(name: str, update: bool, progress: Progress) -> Package:
    """The package as it was found first: a build does not change because the mirror did."""
    pin = cache.cache_root() / "kernel-source" / f"{name}.json"
    if not update:
        try:
            return Package(**json.loads(pin.read_text()))
        except (OSError, ValueError, TypeError):
            pass
    try:
        (package,) = Archive(progress=progress).packages([name])
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}; or give a tarball or folder with --source") from error
    _write(pin, asdict(package))
    return package


def _remembered_digest(path: Path, progress: Progress) -> str:
    """SHA-256 of the file, from memory as long as its status is the same."""
    status = path.stat()
    known = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
    memory = (
        cache.cache_root()
        / "kernel-source"
        / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.digest.json"
    )
    try:
        record = json.loads(memory.read_text())
        if record["status"] == known:
            return str(record["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    progress(f"reading {path.name}")
    digest = cache.digest_file(path)
    _write(memory, {"sha256": digest, "status": known})
    return digest


def _write(path: Path, record: dict[str, object]) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            new.write_text(json.dumps(record))
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise cache.CacheError(
            f"cannot write to {path.parent}: {error.strerror}; set UMM_GUEST_CACHE to a folder of your own"
        ) from error


def _digest_of_tree(tree: Path) -> str:
    """Of names, sizes and times, as make itself would judge: reading a gigabyte would take too long."""
    digest = hashlib.sha256()
    folders = [str(tree)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in sorted(entries, key=lambda item: item.name):
                if entry.is_dir(follow_symlinks=False):
                    if entry.name != ".git":
                        folders.append(entry.path)
                    continue
                status = entry.stat(follow_symlinks=False)
                digest.update(
                    f"{entry.path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="replace")
                )
    return digest.hexdigest()
