"""Debian packages of the guest: looked up once, unpacked into a tree or into a folder that goes away."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from uspace_mm.guest import cache
from uspace_mm.guest.debian import Archive, Package, PackageGone, extract
from uspace_mm.guest.progress import Progress, silent
from uspace_mm.guest.rootfs.remember import remembered
from uspace_mm.guest.rootfs.target import ARCHITECTURE, SUITE

# Kept of the documentation: the licences.
_LEFT_OUT = (
    "usr/share/bash-completion/",
    "usr/share/bug/",
    "usr/share/gdb/",
    "usr/share/info/",
    "usr/share/lintian/",
    "usr/share/locale/",
    "usr/share/man/",
    "usr/share/zsh/",
)


def wanted_in_guest(path: str) -> bool:
    """Whether a file of a package belongs in an image: not so manuals and translations."""
    if path.startswith("usr/share/doc/"):
        return path.endswith("/copyright")
    return not path.startswith(_LEFT_OUT)


class Set:
    """Packages that are wanted together: what their names mean is remembered until ``guest root update``."""

    def __init__(
        self,
        names: Iterable[str],
        *,
        architecture: str = ARCHITECTURE,
        dependencies: bool = False,
        exclude: Iterable[str | Package] = (),
    ) -> None:
        self._names = sorted(set(names))
        self.architecture = architecture
        self._dependencies = dependencies
        self._exclude = sorted(set(exclude), key=str)

    def resolve(self, progress: Progress = silent, *, afresh: bool = False) -> list[Package]:
        """The packages; raises what :meth:`Archive.packages` raises."""
        question = {
            "names": self._names,
            "suite": SUITE,
            "architecture": self.architecture,
            "dependencies": self._dependencies,
            "exclude": [str(name) for name in self._exclude],
        }

        def ask() -> list[dict[str, object]]:
            archive = Archive(SUITE, self.architecture, progress=progress)
            found = archive.packages(self._names, dependencies=self._dependencies, exclude=self._exclude)
            return [asdict(package) for package in found]

        answer = remembered("packages", question, ask, afresh=afresh)
        return [Package(**package) for package in answer]

    def fetch(self, progress: Progress = silent) -> list[Path]:
        """Their files. Raises :class:`PackageGone` when the mirror has newer ones."""
        archive = Archive(SUITE, self.architecture, progress=progress)
        return archive.fetch(self.resolve(progress))


def identity(packages: Sequence[Package]) -> list[str]:
    """What distinguishes `packages` in the key of a cache entry, and tells a reader what they are."""
    return [f"{package.name} {package.version} {package.sha256}" for package in packages]


def unpack_all(debs: Sequence[Path], to: Path, progress: Progress, only: Callable[[str], bool]) -> None:
    """Unpack `debs` into the tree `to`."""
    for number, deb in enumerate(debs):
        progress(f"unpacking {deb.name.partition('_')[0]}", number / len(debs))
        extract(deb, to, only=only)


@contextmanager
def unpacked(
    kind: str, packages: Set, only: Callable[[str], bool], progress: Progress = silent
) -> Iterator[Path]:
    """A folder with the files of `packages` that `only` wants, gone at the end.

    What was unpacked is cached as one file: many small ones cost more to keep whole than to unpack.
    """

    def make(entry: Path) -> None:
        with tempfile.TemporaryDirectory(dir=entry) as tree:
            unpack_all(packages.fetch(progress), Path(tree), progress, only)
            with tarfile.open(entry / "tree.tar", "w") as archive:
                archive.add(tree, arcname=".")

    def inputs(afresh: bool) -> dict[str, object]:
        return {"packages": identity(packages.resolve(progress, afresh=afresh))}

    entry = obtain_again(kind, inputs, make, progress)
    with tempfile.TemporaryDirectory(prefix=f"umm-{kind}-") as folder:
        with tarfile.open(entry / "tree.tar") as archive:
            # Python 3.14 would refuse the absolute links that packages have; the tree is our own.
            archive.extraction_filter = lambda member, path: member
            archive.extractall(folder)
        yield Path(folder)


def obtain_again(
    kind: str,
    inputs: Callable[[bool], dict[str, object]],
    make: Callable[[Path], None],
    progress: Progress,
) -> Path:
    """:func:`cache.obtain`, once more when what the names meant is no longer to be had.

    ``inputs(afresh)`` names what the entry depends on; `afresh`: look up what is remembered.
    """
    try:
        return cache.obtain(kind, inputs(False), make, progress=progress)
    except PackageGone:
        progress("there are newer versions, looking them up again")
        return cache.obtain(kind, inputs(True), make, progress=progress)
