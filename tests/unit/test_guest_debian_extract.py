"""Unpacking packages: what is in them lands in the folder, and nothing can land elsewhere."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.unit.guest_debs import ar, link, member, tar, write_deb
from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.guest.debian import extract

DIRECTORY = tarfile.DIRTYPE


@pytest.fixture(params=["dpkg-deb", "without"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs twice: with dpkg-deb, and with what Python has."""
    way = str(request.param)
    if way == "dpkg-deb":
        if not shutil.which("dpkg-deb"):
            pytest.skip("lacks: dpkg-deb (Debian: dpkg)")
    else:
        which = shutil.which
        monkeypatch.setattr(shutil, "which", lambda name: None if name == "dpkg-deb" else which(name))
    return way


@pytest.mark.parametrize("data_name", ["data.tar", "data.tar.gz", "data.tar.xz"])
def test_files_links_rights_and_times(how: str, tmp_path: Path, data_name: str) -> None:
    deb = write_deb(
        tmp_path / "x.deb",
        [
            member("./", type=DIRECTORY, mode=0o755),
            member("./usr/", type=DIRECTORY, mode=0o755),
            member("./usr/bin/", type=DIRECTORY, mode=0o755),
            member("./usr/bin/tool", b"#!/bin/sh\n", mode=0o755, mtime=1_000_000_000, uid=0, gid=0),
            link("./usr/bin/other", "tool"),
            link("./usr/bin/same", "./usr/bin/tool", tarfile.LNKTYPE),
            member("./tmp/", type=DIRECTORY, mode=0o1777),
        ],
        data_name,
    )
    to = tmp_path / "to"
    extract(deb, to)
    tool = to / "usr/bin/tool"
    assert tool.read_bytes() == b"#!/bin/sh\n"
    assert stat.S_IMODE(tool.stat().st_mode) == 0o755
    assert tool.stat().st_mtime == 1_000_000_000
    assert os.readlink(to / "usr/bin/other") == "tool"
    assert (to / "usr/bin/same").samefile(tool)
    assert stat.S_IMODE((to / "tmp").stat().st_mode) == 0o1777


def test_only_what_is_wanted(how: str, tmp_path: Path) -> None:
    deb = write_deb(
        tmp_path / "x.deb", [member("./usr/include/a.h", b"a"), member("./usr/share/man/a.1", b"m")]
    )
    asked = []

    def only(name: str) -> bool:
        asked.append(name)
        return name.startswith("usr/include/")

    extract(deb, tmp_path / "to", only=only)
    assert asked == ["usr/include/a.h", "usr/share/man/a.1"]
    assert [path.name for path in (tmp_path / "to").rglob("*") if path.is_file()] == ["a.h"]


def test_a_link_between_folders_inside_is_followed(how: str, tmp_path: Path) -> None:
    """As a package that still says /lib, where lib is a link into usr."""
    to = tmp_path / "to"
    (to / "usr/lib").mkdir(parents=True)
    (to / "lib").symlink_to("usr/lib")
    deb = write_deb(tmp_path / "x.deb", [member("./lib/", type=DIRECTORY), member("./lib/libx.so", b"x")])
    extract(deb, to)
    assert (to / "usr/lib/libx.so").read_bytes() == b"x"
    assert (to / "lib").is_symlink()


def test_a_later_package_replaces_a_file_and_not_what_its_link_points_to(how: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    to = tmp_path / "to"
    to.mkdir()
    (to / "name").symlink_to(outside)
    extract(write_deb(tmp_path / "x.deb", [member("./name", b"new")]), to)
    assert (to / "name").read_bytes() == b"new"
    assert outside.read_text() == "mine"


@pytest.mark.parametrize(
    "members",
    [
        pytest.param([member("../escaped", b"x")], id="parent"),
        pytest.param([member("./a/../../escaped", b"x")], id="parent-later"),
        pytest.param([member("/escaped", b"x")], id="absolute"),
        pytest.param([link("./d", ".."), member("./d/escaped", b"x")], id="through-relative-link"),
        pytest.param([link("./d", "/tmp"), member("./d/escaped", b"x")], id="through-absolute-link"),
        pytest.param([link("./d", "/tmp"), member("./d/e/", type=DIRECTORY)], id="folder-through-link"),
        pytest.param([link("./h", "../secret", tarfile.LNKTYPE)], id="hard-link"),
        pytest.param([link("./d", ".."), link("./h", "d/secret", tarfile.LNKTYPE)], id="hard-link-by-link"),
        pytest.param([member("./null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)], id="device"),
        pytest.param([member("./fifo", type=tarfile.FIFOTYPE)], id="pipe"),
    ],
)
def test_what_leads_out_is_refused(
    how: str, tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    (tmp_path / "secret").write_text("secret")
    before = sorted(tmp_path.rglob("*"))
    deb = write_deb(tmp_path / "bad.deb", members)
    with pytest.raises(InputError, match=r"bad\.deb: .*(leads|device or pipe)"):
        extract(deb, tmp_path / "to")
    outside = [path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "to")]
    assert sorted({*outside} - {deb}) == before
    assert not Path("/tmp/escaped").exists()


@pytest.mark.parametrize("keep", [0, 1, 30, 70, 250, -30])
def test_a_package_cut_short_is_an_error(how: str, tmp_path: Path, keep: int) -> None:
    whole = write_deb(tmp_path / "whole.deb", [member("./file", os.urandom(2000))]).read_bytes()
    deb = tmp_path / "cut.deb"
    deb.write_bytes(whole[:keep])
    with pytest.raises(InputError, match=r"cut\.deb") as caught:
        extract(deb, tmp_path / "to")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"not a package at all",
        ar([("debian-binary", b"2.0\n"), ("control.tar.xz", tar([]))]),
        ar([("debian-binary", b"2.0\n"), ("control.tar.xz", tar([])), ("data.tar.xz", b"rubbish")]),
    ],
    ids=["text", "no-data", "rubbish"],
)
def test_what_is_no_package_is_an_error(how: str, tmp_path: Path, content: bytes) -> None:
    deb = tmp_path / "bad.deb"
    deb.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.deb"):
        extract(deb, tmp_path / "to")


def test_zstd_by_the_tool_and_named_when_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which("zstd"):
        pytest.skip("lacks: zstd (Debian: zstd)")
    data = tar([member("./file", b"x" * 100_000)], "")
    packed = subprocess.run(["zstd", "-c"], input=data, capture_output=True, check=True).stdout
    deb = tmp_path / "x.deb"
    deb.write_bytes(ar([("debian-binary", b"2.0\n"), ("data.tar.zst", packed)]))
    which = shutil.which
    hidden = {"dpkg-deb"}
    monkeypatch.setattr(shutil, "which", lambda name: None if name in hidden else which(name))
    extract(deb, tmp_path / "to")
    assert (tmp_path / "to/file").read_bytes() == b"x" * 100_000
    hidden.add("zstd")
    with pytest.raises(UnsupportedError, match=r"lacks: zstd"):
        extract(deb, tmp_path / "to2")
