"""Images built and run by buildah without an engine: chroot isolation, a storage that goes away again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from uspace_mm.guest import cache
from uspace_mm.guest.debian import configuration

SUITE = "trixie"
# Of the settings of the host's apt those that say how its mirror is reached, and how its dates are judged.
_REACHING = re.compile(r"Acquire::(?:https?|Retries|Check-Valid-Until|Check-Date)\b")
# As in Debian's own images for containers: no documents, no waiting for the disk.
_DPKG = "force-unsafe-io\n" + "".join(
    f"path-exclude /usr/share/{name}/*\n" for name in ("doc", "man", "locale")
)
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_MOUNTED = re.compile(r"\\040")


class Failed(Exception):
    """A command ended with another status than 0; the message is what it said last."""


class Buildah:
    """One storage in `folder`, with overlays where the file system has them and whole copies elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._driver = "vfs"
        if self.run("info", driver="overlay", check=False).returncode == 0:
            self._driver = "overlay"

    def run(
        self, *arguments: str, driver: str | None = None, check: bool = True, limit_s: float = 400
    ) -> subprocess.CompletedProcess[str]:
        """``buildah ARGUMENTS``; raises :class:`Failed` unless it exits 0."""
        done = subprocess.run(
            [
                "buildah",
                *("--root", str(self.folder / "root"), "--runroot", str(self.folder / "run")),
                *("--storage-driver", driver or self._driver),
                *arguments,
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            env={**os.environ, "TMPDIR": str(self.folder), "BUILDAH_ISOLATION": "chroot"},
        )
        if check and done.returncode:
            said = (done.stdout + done.stderr)[-4000:]
            raise Failed(f"buildah {' '.join(arguments)} exited {done.returncode}:\n{said}")
        return done

    def import_base(self, tarball: Path, name: str) -> None:
        """An image `name` of one layer, the files of `tarball`."""
        container = self.run("from", "scratch").stdout.strip()
        self.run("add", "--quiet", container, str(tarball), "/")
        self.run("commit", "--quiet", "--rm", "--disable-compression", container, name)

    def build(self, context: Path, dockerfile: str, name: str, arguments: Mapping[str, str]) -> None:
        """Build `dockerfile` of `context`; steps that an earlier build made are taken from it."""
        given = [f"--build-arg={key}={value}" for key, value in arguments.items()]
        self.run(
            *("bud", "--layers", "--pull-never", *given),
            *("--file", str(context / dockerfile), "--tag", name, str(context)),
        )

    def call(
        self, image: str, command: Sequence[str], *, options: Sequence[str] = (), user: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` in a container of `image`, made with `options` of ``buildah from``."""
        container = self.run("from", "--pull-never", *options, image).stdout.strip()
        try:
            as_user = ["--user", user] if user else []
            return self.run("run", *as_user, container, "--", *command, check=False)
        finally:
            self.run("rm", container)

    def remove(self) -> list[str]:
        """Remove the storage with all in it; answers what could not be removed: mounts and files."""
        self.run("rm", "--all", check=False)
        self.run("rmi", "--all", "--force", check=False)
        # The driver keeps its own folder mounted on itself while it is in use, and says nothing when it ends.
        for point in reversed(self.mounts()):
            if point == str(self.folder / "root" / self._driver):
                subprocess.run(["umount", point], check=False)
        left = self.mounts()
        if not left:
            shutil.rmtree(self.folder, ignore_errors=True)
        return left + ([str(self.folder)] if self.folder.exists() else [])

    def mounts(self) -> list[str]:
        """Mount points below the folder."""
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        return [point for point in points if _MOUNTED.sub(" ", point).startswith(f"{self.folder}/")]


def base_tarball() -> Path:
    """A minimal Debian 13 as debootstrap makes it, with what this machine needs to reach mirror and index.

    It is kept in the user's cache for as long as the mirror's release file, which names every package's
    version, stays the same. Raises OSError or CalledProcessError when the mirror does not answer.
    """
    mirror = configuration.mirror()
    release = _fetched(f"{mirror}/dists/{SUITE}/InRelease")

    def make(entry: Path) -> None:
        root = entry / "root"
        _quietly("debootstrap", "--variant=minbase", "--include=ca-certificates", SUITE, str(root), mirror)
        if _CERTIFICATES.exists():
            shutil.copyfile(_CERTIFICATES, root / _CERTIFICATES.relative_to("/"))
        settings = _quietly("apt-config", "dump", "Acquire").splitlines()
        reaching = "".join(f"{line}\n" for line in settings if _REACHING.match(line))
        (root / "etc/apt/apt.conf.d/90host").write_text(reaching)
        (root / "etc/dpkg/dpkg.cfg.d/90quick").write_text(_DPKG)
        without = [
            "./var/cache/apt/archives/*",
            "./var/lib/apt/lists/*",
            "./usr/share/doc/*",
            "./usr/share/man/*",
        ]
        _quietly(
            "tar",
            "-C",
            str(root),
            *(f"--exclude={name}" for name in without),
            "-cf",
            str(entry / "base.tar"),
            ".",
        )
        shutil.rmtree(root)

    inputs = {"suite": SUITE, "release": release, "machine": os.uname().machine, "recipe": 1}
    return cache.obtain("test-base", inputs, make) / "base.tar"


def pip_arguments() -> dict[str, str]:
    """Build arguments for the indexes that pip uses here; folders of this machine are left out."""
    found = {}
    for line in _quietly(sys.executable, "-m", "pip", "config", "list").splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        words = [word for word in value.strip("'\"").split() if not word.startswith(("file:", "/"))]
        if name in ("index-url", "extra-index-url") and words:
            found[f"PIP_{name.replace('-', '_').upper()}"] = " ".join(words)
    return found


def _fetched(uri: str) -> str:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"umm-release-{os.getpid()}"
    try:
        _quietly("/usr/lib/apt/apt-helper", "download-file", uri, str(path))
        return cache.digest_file(path)
    finally:
        path.unlink(missing_ok=True)


def _quietly(*command: str) -> str:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout
