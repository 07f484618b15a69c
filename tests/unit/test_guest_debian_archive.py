"""The archive, with programs in place of apt: when it asks, what it believes, what it says."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from uspace_mm.errors import InputError
from uspace_mm.guest import cache
from uspace_mm.guest.debian import Archive, ArchiveError, Package, PackageGone, configuration

DEB = b"the bytes of a package"
SHA256 = hashlib.sha256(DEB).hexdigest()
# Does what the files in its folder say; notes each call in "calls".
APT_GET = """#!/bin/sh
echo "$*" >> "$FAKE/calls"
case "$1" in
update) cat "$FAKE/update.err" >&2; exit "$(cat "$FAKE/update.status")" ;;
download)
    if [ -f "$FAKE/gone" ]; then
        echo "E: Version '9' for 'hello' was not found" >&2; exit 100
    fi
    for fd in $(echo "$*" | sed -n 's/.*Status-Fd=\\([0-9]*\\).*/\\1/p'); do
        echo "dlstatus:1:50:Retrieving file 1 of 1" > /proc/self/fd/$fd
    done
    cp "$FAKE/deb" hello_1_arm64.deb ;;
install) cp "$FAKE"/../cache/apt/*/assumed "$FAKE/assumed"; cat "$FAKE/install" ;;
esac
"""
APT_CACHE = """#!/bin/sh
echo "cache $*" >> "$FAKE/calls"
cat "$FAKE/show"
"""


def record(name: str, version: str = "1", depends: str = "") -> str:
    return (
        f"Package: {name}\nVersion: {version}\nArchitecture: arm64\n{depends}Size: {len(DEB)}\n"
        f"SHA256: {SHA256}\nDescription: a\n text: of two lines\n\n"
    )


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "fake"
    folder.mkdir()
    for name, text in (("apt-get", APT_GET), ("apt-cache", APT_CACHE), ("apt-config", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    keyring = tmp_path / "keyring.gpg"
    keyring.touch()
    for name, text in (
        ("show", record("hello")),
        ("install", ""),
        ("update.err", ""),
        ("update.status", "0"),
    ):
        (folder / name).write_text(text)
    (folder / "deb").write_bytes(DEB)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("UMM_DEBIAN_MIRROR", "http://mirror.invalid/debian")
    monkeypatch.setenv("UMM_GUEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(configuration, "KEYRING", keyring)
    return folder


def calls(fake: Path, what: str) -> int:
    path = fake / "calls"
    return sum(what in line for line in path.read_text().splitlines()) if path.exists() else 0


def age(seconds: float, *names: str) -> None:
    for path in (cache.cache_root() / "apt").glob("*/*"):
        if path.name in names:
            os.utime(path, (time.time() - seconds,) * 2)


def test_lists_are_fetched_once_a_day(fake: Path) -> None:
    hello = Package("hello", "1", "arm64", SHA256, len(DEB))
    assert Archive().packages(["hello"]) == [hello]
    assert Archive().packages(["hello"]) == [hello]
    assert calls(fake, "update") == 1
    age(25 * 3600, "fetched", "tried")
    Archive().packages(["hello"])
    assert calls(fake, "update") == 2
    Archive().update()
    assert calls(fake, "update") == 3


def test_old_lists_serve_where_there_is_no_network(fake: Path) -> None:
    Archive().packages(["hello"])
    (fake / "update.status").write_text("100")
    (fake / "update.err").write_text(
        "E: Failed to fetch http://mirror.invalid/InRelease  Could not resolve 'mirror.invalid'\n"
        "E: Some index files failed to download.\n"
    )
    age(25 * 3600, "fetched", "tried")
    said = []
    archive = Archive(progress=lambda text, done=None: said.append(text))
    assert [package.name for package in archive.packages(["hello"])] == ["hello"]
    assert said[-1] == "the mirror does not answer; using the lists fetched before"
    archive.packages(["hello"])
    assert calls(fake, "update") == 2, "asked again only after some minutes"
    with pytest.raises(ArchiveError, match=r"Could not resolve 'mirror\.invalid'; is the network up"):
        archive.update()


def test_without_lists_and_network_it_says_so(fake: Path) -> None:
    (fake / "update.status").write_text("100")
    (fake / "update.err").write_text("E: Could not connect\n")
    with pytest.raises(ArchiveError, match="apt-get update failed: Could not connect") as caught:
        Archive().packages(["hello"])
    assert caught.value.exit_status == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "Hello", "a b", "--option", "hello=1", "../x"])
def test_what_is_no_name_is_refused_before_anybody_is_asked(fake: Path, name: str) -> None:
    with pytest.raises(InputError, match="not a name of a Debian package"):
        Archive().packages([name])
    assert calls(fake, "") == 0


def test_an_unknown_name(fake: Path) -> None:
    with pytest.raises(InputError, match="package nonesuch: not in Debian trixie for arm64"):
        Archive().packages(["hello", "nonesuch"])


def test_what_is_fetched_is_kept_and_needs_nobody_again(fake: Path) -> None:
    archive = Archive()
    packages = archive.packages(["hello"])
    (apt,) = (cache.cache_root() / "apt").iterdir()
    (apt / "fetch-of-one-that-was-killed").mkdir()
    said = []
    archive = Archive(progress=lambda text, done=None: said.append((text, done)))
    (path,) = archive.fetch(packages)
    assert path.read_bytes() == DEB
    assert ("Retrieving file 1 of 1", 0.5) in said
    assert not list(apt.glob("fetch-*"))
    before = (fake / "calls").read_text()
    assert archive.fetch(packages) == [path]
    assert (fake / "calls").read_text() == before
    path.write_bytes(b"damaged")
    (again,) = archive.fetch(packages)
    assert again.read_bytes() == DEB


def test_other_bytes_than_the_lists_promise_are_not_kept(fake: Path) -> None:
    packages = Archive().packages(["hello"])
    (fake / "deb").write_bytes(b"something else")
    with pytest.raises(ArchiveError, match="hello 1: the mirror sent not what its lists promise"):
        Archive().fetch(packages)
    assert not list(cache.cache_root().rglob("*.deb"))


def test_a_version_that_is_gone(fake: Path) -> None:
    packages = Archive().packages(["hello"])
    (fake / "gone").touch()
    with pytest.raises(PackageGone, match="no longer has what its lists name"):
        Archive().fetch(packages)
    assert calls(fake, "update") == 2, "the lists were fetched again first"


def test_dependencies_leave_out_what_is_excluded(fake: Path) -> None:
    (fake / "show").write_text(
        record("hello") + record("libx") + record("perl-base", "5") + record("base", "2")
    )
    (fake / "install").write_text("Inst libx (1 Debian:13/stable [arm64])\nInst hello (1 Debian [arm64])\n")
    base = Package("base", "1.9", "arm64", SHA256, 1)
    found = Archive().packages(["hello"], dependencies=True, exclude=["perl-base", base])
    assert [package.name for package in found] == ["hello", "libx"]
    assumed = (fake / "assumed").read_text()
    assert "Package: perl-base\nStatus: install ok installed\nVersion: 5\n" in assumed
    assert "Package: base\nStatus: install ok installed\nVersion: 1.9\n" in assumed
    assert not list(cache.cache_root().rglob("assumed"))


def test_what_is_excluded_in_an_older_version_comes_along(fake: Path) -> None:
    """As apt decides: hello needs base >= 2, and the guest has 1.9."""
    (fake / "show").write_text(record("hello") + record("base", "2"))
    (fake / "install").write_text("Inst base [1.9] (2 Debian [arm64])\nInst hello (1 Debian [arm64])\n")
    base = Package("base", "1.9", "arm64", SHA256, 1)
    found = Archive().packages(["hello"], dependencies=True, exclude=[base])
    assert [str(package) for package in found] == ["base 2", "hello 1"]


def test_a_cache_that_cannot_be_written(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("UMM_GUEST_CACHE", str(tmp_path / "file"))
    with pytest.raises(cache.CacheError, match="cannot write to .*set UMM_GUEST_CACHE"):
        Archive().packages(["hello"])
