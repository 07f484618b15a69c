"""Debian's archive for one suite and architecture: names to packages, packages to checked files."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from uspace_mm.errors import InputError, UspaceError
from uspace_mm.guest import cache
from uspace_mm.guest.debian import configuration
from uspace_mm.guest.progress import Progress, silent

# Lists older than this are fetched again before a name is looked up.
LISTS_AGE_S = 24 * 3600
# Without a network the old lists serve; this long, nobody tries again.
_OFFLINE_S = 600
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]*")
_GONE = re.compile(r"404\s+Not Found|was not found|Unable to locate package|Can't find a source")


class ArchiveError(UspaceError):
    """The mirror cannot be reached, or what it sent is not what its signed lists promise."""

    exit_status = 3


class PackageGone(ArchiveError):
    """The mirror no longer has this version: a newer one took its place. Look the name up again."""


@dataclass(frozen=True)
class Package:
    """One version of one binary package, as the archive's signed lists describe it."""

    name: str
    version: str
    architecture: str
    sha256: str
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def check_name(name: str) -> None:
    """Raises :class:`InputError` for what cannot be the name of a Debian package (Debian policy 5.6.7)."""
    if not _NAME.fullmatch(name):
        raise InputError(f"package {name!r}: not a name of a Debian package")


class Archive:
    """Debian's `suite` for `architecture`, through a private apt in the cache folder; needs no root.

    Raises :class:`UnsupportedError` where apt, Debian's keyring or a mirror is missing, and
    :class:`ArchiveError` when the mirror cannot be reached and what is asked for is not in the cache.
    """

    def __init__(
        self, suite: str = "trixie", architecture: str = "arm64", *, progress: Progress = silent
    ) -> None:
        self.suite = suite
        self.architecture = architecture
        self._progress = progress

    def packages(
        self, names: Iterable[str], *, dependencies: bool = False, exclude: Iterable[str | Package] = ()
    ) -> list[Package]:
        """The newest version of each of `names`, sorted by name; with `dependencies`, of what they need, too.

        `exclude` are packages that count as installed: neither they nor what only they need is listed, except
        where one given with its version is too old. Raises :class:`InputError` for a name that the suite does
        not have or that cannot be installed.
        """
        wanted = sorted(set(names))
        exclude = list(exclude)
        for name in wanted:
            check_name(name)
        if not wanted:
            return []
        with self._apt() as apt:
            self._refresh_when_old(apt)
            found = self._show(apt, wanted)
            if dependencies:
                names_out = [item for item in exclude if isinstance(item, str)]
                out = [item for item in exclude if isinstance(item, Package)]
                out += self._show(apt, sorted(set(names_out))).values() if names_out else ()
                versions = {package.name: package.version for package in out}
                needed = self._closure(apt, wanted, out)
                found = self._show(apt, [name for name in needed if name not in names_out])
                found = {name: found[name] for name in found if found[name].version != versions.get(name)}
        return sorted(found.values(), key=lambda package: package.name)

    def fetch(self, packages: Iterable[Package]) -> list[Path]:
        """The ``.deb`` files of `packages`, in their order, checked against their digests; kept in the cache.

        Raises :class:`PackageGone` when the mirror has replaced one of them.
        """
        ordered = list(packages)
        if missing := [package for package in ordered if cache.find("deb", _key(package)) is None]:
            with self._apt() as apt, tempfile.TemporaryDirectory(prefix="fetch-", dir=apt.folder) as name:
                try:
                    apt.download(missing, Path(name), self._progress)
                except PackageGone:
                    self._refresh(apt)
                    apt.download(missing, Path(name), self._progress)
                self._keep(missing, Path(name))
        return [self._cached(package) for package in ordered]

    def update(self) -> None:
        """Fetch the archive's lists now, however old they are."""
        with self._apt() as apt:
            self._refresh(apt)

    def _keep(self, packages: Sequence[Package], folder: Path) -> None:
        fetched = {cache.digest_file(path): path for path in folder.glob("*.deb")}
        for package in packages:
            path = fetched.get(package.sha256)
            if path is None:
                raise ArchiveError(f"{package}: the mirror sent not what its lists promise; try again")

            def make(entry: Path, path: Path = path) -> None:
                shutil.copyfile(path, entry / path.name)

            cache.obtain("deb", _key(package), make, progress=self._progress)

    def _cached(self, package: Package) -> Path:
        entry = cache.find("deb", _key(package))
        if entry is None:
            raise ArchiveError(f"{package}: gone from the cache while it was used; try again")
        return next(entry.glob("*.deb"))

    @contextmanager
    def _apt(self) -> Iterator[_Apt]:
        """The private apt, for one user at a time: apt itself does not wait for the lock of its lists."""
        uri = configuration.mirror()
        key = cache.digest_of({"uri": uri, "suite": self.suite, "architecture": self.architecture})[:12]
        folder = cache.cache_root() / "apt" / f"{self.suite}-{self.architecture}-{key}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                for stale in folder.glob("fetch-*"):  # of one that was killed
                    cache.remove(stale)
                yield _Apt(folder, configuration.write(folder, uri, self.suite, self.architecture))
        except OSError as error:
            raise cache.CacheError(
                f"cannot write to {folder}: {error.strerror}; free space, or set UMM_GUEST_CACHE"
            ) from error

    def _refresh_when_old(self, apt: _Apt) -> None:
        if apt.age_s(apt.fetched) < LISTS_AGE_S:
            return
        if apt.fetched.exists() and apt.age_s(apt.tried) < _OFFLINE_S:
            return
        try:
            self._refresh(apt)
        except ArchiveError:
            if not apt.fetched.exists():
                raise
            self._progress("the mirror does not answer; using the lists fetched before")

    def _refresh(self, apt: _Apt) -> None:
        self._progress(f"fetching the lists of Debian {self.suite} for {self.architecture}")
        apt.tried.touch()
        apt.run("apt-get", "update", "--error-on=any", progress=self._progress)
        apt.fetched.touch()

    def _show(self, apt: _Apt, names: Sequence[str]) -> dict[str, Package]:
        text = apt.run("apt-cache", "show", "--no-all-versions", *names, may_fail=True)
        found: dict[str, Package] = {}
        for record in _records(text):
            package = Package(
                record["Package"],
                record["Version"],
                record["Architecture"],
                record["SHA256"],
                int(record["Size"]),
            )
            if package.name in names:
                found.setdefault(package.name, package)
        if unknown := [name for name in names if name not in found]:
            raise InputError(
                f"package {unknown[0]}: not in Debian {self.suite} for {self.architecture}; "
                "apt-cache search finds names"
            )
        return found

    def _closure(self, apt: _Apt, names: Sequence[str], exclude: Sequence[Package]) -> list[str]:
        # What is excluded counts as installed, so that apt's own resolver leaves it and its needs out.
        installed = [
            f"Package: {package.name}\nStatus: install ok installed\nVersion: {package.version}\n"
            f"Architecture: {package.architecture}\nMulti-Arch: foreign\n"
            "Maintainer: none\nDescription: none\n"
            for package in exclude
        ]
        status = apt.folder / "assumed"
        status.write_text("\n".join(installed))
        try:
            text = apt.run(
                "apt-get",
                "install",
                "--simulate",
                "--no-install-recommends",
                *("-o", f"Dir::State::status={status}", "-o", "Dir::Cache::pkgcache="),
                *names,
            )
        except ArchiveError as error:
            raise InputError(f"packages {', '.join(names)} cannot be installed together: {error}") from error
        finally:
            status.unlink()
        return re.findall(r"^Inst ([^ :]+)", text, re.MULTILINE)


class _Apt:
    """Runs the programs of apt with the configuration in `folder`, whose lock the caller holds."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder = folder
        self.fetched = folder / "fetched"
        self.tried = folder / "tried"
        self._environment = {**os.environ, "APT_CONFIG": str(config), "LC_ALL": "C", "TMPDIR": str(folder)}

    @staticmethod
    def age_s(stamp: Path) -> float:
        try:
            return abs(time.time() - stamp.stat().st_mtime)
        except FileNotFoundError:
            return float("inf")

    def download(self, packages: Sequence[Package], to: Path, progress: Progress) -> None:
        total = sum(package.size_bytes for package in packages)
        what = str(packages[0]) if len(packages) == 1 else f"{len(packages)} packages"
        progress(f"fetching {what}, {total / 1e6:.0f} MB", 0.0)
        names = [f"{package.name}={package.version}" for package in packages]
        self.run("apt-get", "download", *names, cwd=to, progress=progress)

    def run(
        self,
        *command: str,
        cwd: Path | None = None,
        may_fail: bool = False,
        progress: Progress = silent,
    ) -> str:
        """What the command printed; raises :class:`ArchiveError` with apt's own reason when it fails."""
        reading, writing = os.pipe()
        with (
            os.fdopen(reading) as states,
            tempfile.TemporaryFile("w+", dir=self.folder) as out,
            # In memory: on a full disk the reason would not be written down, either.
            os.fdopen(os.memfd_create("apt-errors"), "w+") as err,
        ):
            try:
                child = subprocess.Popen(
                    [*command[:2], "-q", "-o", f"APT::Status-Fd={writing}", *command[2:]],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    cwd=cwd or self.folder,
                    env=self._environment,
                    pass_fds=[writing],
                )
            finally:
                os.close(writing)
            with child:
                try:
                    for line in states:
                        # "dlstatus:1:37.5:Retrieving file 1 of 3 (12s remaining)"
                        kind, _, rest = line.partition(":")
                        if kind == "dlstatus":
                            _, percent, text = rest.split(":", 2)
                            progress(text.strip(), float(percent) / 100)
                    child.wait()
                except BaseException:
                    child.kill()
                    raise
            out.seek(0)
            err.seek(0)
            if child.returncode and not may_fail:
                said = err.read()
                if os.strerror(errno.ENOSPC) in said:
                    raise cache.CacheError(
                        f"no space left in {self.folder}: free some, or set UMM_GUEST_CACHE to another folder"
                    )
                raise _failure(command, said)
            return out.read()


def _failure(command: Sequence[str], said: str) -> ArchiveError:
    lines = [line[2:].strip() for line in said.splitlines() if line.startswith("E:")]
    reason = lines[0] if lines else "no reason given"
    for line in lines:
        # "E: Failed to fetch URI  REASON" says more than the summary that follows it.
        if match := re.match(r"Failed to fetch \S+\s+(.*)", line):
            reason = match[1]
            break
    if _GONE.search(said):
        return PackageGone(f"the mirror no longer has what its lists name ({reason}); update them")
    return ArchiveError(f"{' '.join(command[:2])} failed: {reason}; is the network up and the mirror right?")


def _records(text: str) -> Iterator[Mapping[str, str]]:
    """The paragraphs of a control file; lines that go on are left out, nobody here reads such fields."""
    for paragraph in text.split("\n\n"):
        fields = (line.partition(": ") for line in paragraph.splitlines() if not line.startswith(" "))
        if record := {name: value for name, _, value in fields}:
            yield record


def _key(package: Package) -> dict[str, object]:
    return {"sha256": package.sha256}
