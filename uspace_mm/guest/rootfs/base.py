"""The layer that every guest has: Debian packages, numpy, pytest, and what scripts would write."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from uspace_mm.guest.debian import Package
from uspace_mm.guest.progress import Progress, silent
from uspace_mm.guest.rootfs import bytecode, image, ldcache, wheels
from uspace_mm.guest.rootfs.packages import Set, identity, obtain_again, unpack_all, wanted_in_guest
from uspace_mm.guest.rootfs.sources import makers
from uspace_mm.guest.rootfs.target import (
    BASE_PACKAGES,
    DEBIAN_SITE,
    NOT_NEEDED,
    OWN_SITE,
    PYTHON,
    TRIPLET,
)

LIBRARY_FOLDERS = (f"usr/local/lib/{TRIPLET}", "usr/local/lib", f"usr/lib/{TRIPLET}", "usr/lib")
_FILES = {
    "etc/hostname": "guest\n",
    "etc/hosts": "127.0.0.1 localhost guest\n::1 localhost\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\nservices: files\n",
    "etc/shadow": "root::1::::::\nnobody:*:1::::::\n",
    "etc/fstab": "",
    "etc/machine-id": "",
    "etc/ld.so.conf": "include /etc/ld.so.conf.d/*.conf\n",
    # Modules of ours come last, so that those of Debian and of the user win.
    f"{DEBIAN_SITE}/uspace_mm.pth": f"/{OWN_SITE}\n",
}
# What update-alternatives would link; only the links whose target is there are made.
_LINKS = {
    "etc/mtab": "../proc/self/mounts",
    "usr/bin/awk": "mawk",
    "usr/bin/nawk": "mawk",
    "usr/bin/python": "python3",
    "usr/bin/which": "which.debianutils",
}


def packages() -> Set:
    """The Debian packages of the base."""
    return Set(BASE_PACKAGES, dependencies=True, exclude=NOT_NEEDED)


def resolve(progress: Progress = silent) -> list[Package]:
    """What those names mean now."""
    return packages().resolve(progress)


def obtain(progress: Progress = silent) -> Path:
    """The image of the base."""
    wanted = wheels.base()

    def make(entry: Path) -> None:
        started_s = image.start()
        debs = packages().fetch(progress)
        files = wanted.fetch(progress)
        with tempfile.TemporaryDirectory(dir=entry) as folder:
            tree = Path(folder) / "tree"
            tree.mkdir()
            unpack_all(debs, tree, progress, wanted_in_guest)
            wheels.unpack(files, tree, OWN_SITE, "usr/bin", progress)
            configure(tree)
            image.normalise(tree, started_s)
            bytecode.compile_tree(tree, progress)
            image.pack(tree, entry / image.NAME, started_s, progress)

    def inputs(afresh: bool) -> dict[str, object]:
        return {
            "packages": identity(packages().resolve(progress, afresh=afresh)),
            "wheels": wanted.identity(progress),
            "image": image.identity(),
            "makers": makers("base", "ldcache", "bytecode", "image", "wheels", "target", "packages"),
        }

    return obtain_again("root-base", inputs, make, progress) / image.NAME


def configure(tree: Path) -> None:
    """Write what the packages' scripts would have written."""
    for folder in ("dev", "proc", "sys", "run", "tmp", "mnt", "root", "usr/local/bin", "etc/ld.so.conf.d"):
        (tree / folder).mkdir(parents=True, exist_ok=True)
    (tree / "tmp").chmod(0o1777)
    for name, text in _FILES.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(text)
    for name in ("passwd", "group"):
        shutil.copyfile(tree / f"usr/share/base-passwd/{name}.master", tree / "etc" / name)
    for link, target in _LINKS.items():
        path = tree / link
        if not path.is_symlink() and not path.exists() and ("/" in target or (path.parent / target).exists()):
            path.symlink_to(target)
    certificates(tree)
    (tree / "etc/ld.so.conf.d/uspace_mm.conf").write_text("\n".join(f"/{f}" for f in LIBRARY_FOLDERS) + "\n")
    ldcache.write(tree, LIBRARY_FOLDERS)
    if not (tree / f"usr/bin/python{PYTHON}").exists():
        raise AssertionError(f"the base has no Python {PYTHON}")


def certificates(tree: Path) -> None:
    """The bundle that ``update-ca-certificates`` would make, when the package is there."""
    found = sorted((tree / "usr/share/ca-certificates").rglob("*.crt"))
    if found:
        (tree / "etc/ssl/certs").mkdir(parents=True, exist_ok=True)
        (tree / "etc/ssl/certs/ca-certificates.crt").write_text("".join(path.read_text() for path in found))
