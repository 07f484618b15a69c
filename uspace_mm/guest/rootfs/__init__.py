"""Root file systems for guests: Debian packages and wheels for arm64 in read-only images, made without root.

A root is a pile of squashfs images. The lowest is the same for every guest (Debian 13, Python, numpy,
pytest), above it lie this package and what the caller adds; each is cached by what it was made from, so a
change remakes one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from uspace_mm.guest.progress import Progress, silent


@dataclass(frozen=True)
class RootFilesystem:
    """What a guest boots from: squashfs images, the lowest first, and the program that becomes ``/init``."""

    layers: tuple[Path, ...]
    agent: Path


def obtain(
    *,
    packages: Iterable[str] = (),
    wheels: Iterable[Path] = (),
    pips: Iterable[str] = (),
    overlays: Iterable[Path] = (),
    own: bool = True,
    progress: Progress = silent,
) -> RootFilesystem:
    """A root with Debian's `packages`, `wheels` (files), what pip finds for `pips`, files of `overlays`.

    The files of a directory in `overlays` land at the guest's ``/``; later ones win. `own` adds this package.
    The first call downloads some 60 MB and takes half a minute; one with everything cached needs no network.
    Raises :class:`InputError` for a name or file that cannot be used, :class:`UnsupportedError` for a tool
    that is missing.
    """
    from uspace_mm.guest.rootfs import base, layers
    from uspace_mm.guest.rootfs import own as own_layer

    names, files, requirements = list(packages), [Path(file) for file in wheels], list(pips)
    directories = [Path(directory) for directory in overlays]
    # What cannot be used is said before anything is made.
    layers.check(names, files, requirements, directories)
    found = [base.obtain(progress)]
    if names:
        found.append(layers.of_packages(names, progress))
    if own:
        found.append(own_layer.obtain(progress))
    if files or requirements:
        found.append(layers.of_wheels(files, requirements, progress))
    found += [layers.of_directory(directory, progress) for directory in directories]
    return RootFilesystem(tuple(found), agent(progress))


def agent(progress: Progress = silent) -> Path:
    """The static aarch64 program that is a guest's init, compiled when its sources changed."""
    from uspace_mm.guest.rootfs import own

    return own.agent(progress)


def update(progress: Progress = silent) -> list[tuple[str, str]]:
    """Look up anew what packages and wheels there are, and the next root is made of those.

    Returns what differs for the base, as pairs of "NAME VERSION" before and after; either may be empty.
    """
    from uspace_mm.guest.debian import Archive
    from uspace_mm.guest.rootfs import base, remember, wheels
    from uspace_mm.guest.rootfs.bytecode import host_python
    from uspace_mm.guest.rootfs.target import ARCHITECTURE, SUITE

    def texts() -> dict[str, str]:
        found = {package.name: str(package) for package in base.resolve(progress)}
        names = [line.split("-")[:2] for line in wheels.base().identity(progress)]
        return found | {f"{name} (wheel)": f"{name} {version}" for name, version in names}

    before = texts() if remember.is_known() else {}
    for architecture in sorted({ARCHITECTURE, host_python().architecture}):
        Archive(SUITE, architecture, progress=progress).update()
    remember.forget_all()
    after = texts()
    names = sorted(before.keys() | after.keys())
    pairs = [(before.get(name, ""), after.get(name, "")) for name in names]
    return [(was, now) for was, now in pairs if was != now]
