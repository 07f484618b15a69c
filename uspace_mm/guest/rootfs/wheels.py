"""Wheels for the guest's Python: chosen once by the host's pip, kept in the cache, unpacked into a tree."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.guest import cache
from uspace_mm.guest.debian import PackageGone
from uspace_mm.guest.progress import Progress, silent
from uspace_mm.guest.rootfs import pip
from uspace_mm.guest.rootfs.remember import digest_of_file, remembered
from uspace_mm.guest.rootfs.target import GLIBC_MINOR, PYTHON

# name-version(-build)-python-abi-platform.whl, PEP 427
_WHEEL = re.compile(r"([^-]+)-([^-]+)(?:-\d[^-]*)?-([^-]+)-([^-]+)-([^-]+)\.whl")
_PIP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\s*(\[[^\]]*\])?\s*([<>=!~,].*)?")


def base() -> Wheels:
    """The wheels that every guest has: pytest, and what this package needs."""
    try:
        needed = [line for line in metadata.requires("uspace-mm") or () if "extra ==" not in line]
    except metadata.PackageNotFoundError:
        raise UnsupportedError("uspace-mm is not installed here, only imported: pip install it") from None
    return Wheels([*needed, "pytest>=8"])


class Wheels:
    """Wheels wanted together, by pip's requirements and as files."""

    def __init__(
        self, names: Sequence[str], files: Sequence[Path] = (), *, present: Wheels | None = None
    ) -> None:
        """`present` is in the guest already: its versions are taken where they fit, and not twice."""
        for name in names:
            if not _PIP_NAME.fullmatch(name.strip()):
                raise InputError(f"{name!r}: not a name that pip knows (NAME, NAME==VERSION)")
        for file in files:
            _check(file)
        self._names = sorted(set(names))
        self._files = sorted(set(files))
        self._present = present

    def identity(self, progress: Progress = silent) -> list[str]:
        """For the key of a cache entry, and for readers: file names and digests."""
        return [f"{name} {digest}" for name, digest in sorted(self._resolve(progress).items())]

    def fetch(self, progress: Progress = silent) -> list[Path]:
        """The wheels' files, from the cache where they are there.

        Raises :class:`PackageGone` when they had to be looked up again and others were found.
        """
        wanted = self._resolve(progress)
        found = [_cached(digest) for digest in wanted.values()]
        if None in found:
            if self._resolve(progress, afresh=True) != wanted:
                raise PackageGone("the index has other wheels than it had: try again")
            found = [_cached(digest) for digest in wanted.values()]
        return [path for path in found if path is not None]

    def _resolve(self, progress: Progress, *, afresh: bool = False) -> Mapping[str, str]:
        question: dict[str, object] = {
            "names": self._names,
            "files": [f"{path.name} {digest_of_file(path)}" for path in self._files],
            "python": PYTHON,
            "glibc": GLIBC_MINOR,
            "present": self._present.identity(progress) if self._present else None,
        }
        answer: dict[str, str] = remembered("wheels", question, lambda: self._ask(progress), afresh=afresh)
        return answer

    def _ask(self, progress: Progress) -> dict[str, str]:
        present = self._present._resolve(progress) if self._present else {}
        with tempfile.TemporaryDirectory(prefix="umm-wheels-") as name:
            folder = Path(name)
            wanted = [*self._names, *(str(path.resolve()) for path in self._files)]
            progress(f"pip: choosing wheels for {', '.join(self._names) or self._files[0].name}")
            pip.download(wanted, folder, constraints=[_pin(wheel) for wheel in present])
            found = {}
            for path in sorted(folder.glob("*.whl")):
                if path.name in present and not any(path.name == file.name for file in self._files):
                    continue
                digest = cache.digest_file(path)
                cache.obtain("wheel", {"sha256": digest}, _copy(path), progress=progress)
                found[path.name] = digest
            return found


def unpack(files: Sequence[Path], tree: Path, site: str, scripts: str, progress: Progress = silent) -> None:
    """Install `files` in `tree`: modules in its folder `site`, programs in `scripts`, data in usr/local."""
    if not files:
        return
    progress(f"unpacking {len(files)} wheels")
    with tempfile.TemporaryDirectory(dir=tree.parent) as name:
        target = Path(name) / "target"
        pip.unpack(files, target)
        _forget_origin(target)
        for program in (target / "bin").glob("*"):
            program.chmod(0o755)
        for source, to in (("bin", scripts), ("share", "usr/local/share"), ("etc", "usr/local/etc")):
            if (target / source).is_dir():
                _move_into(target / source, tree / to)
        _move_into(target, tree / site)


def _forget_origin(target: Path) -> None:
    """pip notes where the wheels lie on this machine, and the image would depend on that."""
    for about in target.glob("*.dist-info"):
        (about / "direct_url.json").unlink(missing_ok=True)
        record = about / "RECORD"
        if record.is_file():
            lines = record.read_text().splitlines(keepends=True)
            record.write_text("".join(line for line in lines if "/direct_url.json," not in line))


def _move_into(source: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_dir() and not path.is_symlink() and (to / path.name).is_dir():
            _move_into(path, to / path.name)
        else:
            path.rename(to / path.name)
    source.rmdir()


def _check(file: Path) -> None:
    if not file.is_file():
        raise InputError(f"wheel {file}: no such file")
    match = _WHEEL.fullmatch(file.name)
    if not match:
        raise InputError(f"wheel {file}: not the name of a wheel (NAME-VERSION-PYTHON-ABI-PLATFORM.whl)")
    python, abi, platform = match[3], match[4], match[5]
    if platform != "any" and "aarch64" not in platform:
        raise InputError(f"wheel {file}: for {platform}, the guest is aarch64 (manylinux or linux_aarch64)")
    if platform != "any" and "linux" not in platform or "musllinux" in platform:
        raise InputError(f"wheel {file}: for {platform}, the guest has Linux with glibc 2.{GLIBC_MINOR}")
    exact = "cp" + PYTHON.replace(".", "")
    if not {exact, "abi3", "none"} & set(abi.split(".")) or (abi == exact and exact not in python.split(".")):
        raise InputError(f"wheel {file}: for Python {python} ({abi}), the guest has {exact}")


def _pin(wheel: str) -> str:
    match = _WHEEL.fullmatch(wheel)
    assert match is not None
    return f"{match[1]}=={match[2]}"


def _cached(digest: str) -> Path | None:
    entry = cache.find("wheel", {"sha256": digest})
    return next(entry.glob("*.whl"), None) if entry else None


def _copy(path: Path) -> Callable[[Path], Any]:
    return lambda entry: shutil.copyfile(path, entry / path.name)
