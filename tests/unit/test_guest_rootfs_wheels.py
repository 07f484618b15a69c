"""Wheels: which are refused, what pip's failures become, and what markers mean for the guest."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from uspace_mm.errors import InputError
from uspace_mm.guest import rootfs
from uspace_mm.guest.debian import PackageGone
from uspace_mm.guest.rootfs import pip
from uspace_mm.guest.rootfs.wheels import Wheels, unpack

UNREACHABLE = "http://127.0.0.1:9/simple"  # the discard port: nobody listens


def make_wheel(
    folder: Path,
    name: str,
    version: str = "1",
    *,
    tag: str = "py3-none-any",
    requires: tuple[str, ...] = (),
    files: dict[str, str] | None = None,
    entry_points: str = "",
) -> Path:
    """A wheel as PEP 427 has it."""
    about = f"{name}-{version}.dist-info"
    contents = {f"{name}.py": f"version = {version!r}\n", **(files or {})}
    needed = "".join(f"Requires-Dist: {line}\n" for line in requires)
    contents[f"{about}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}"
    contents[f"{about}/WHEEL"] = f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
    if entry_points:
        contents[f"{about}/entry_points.txt"] = entry_points
    contents[f"{about}/RECORD"] = "".join(f"{path},,\n" for path in [*contents, f"{about}/RECORD"])
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in contents.items():
            archive.writestr(inside, text)
    return path


@pytest.fixture(autouse=True)
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip looks into one folder only."""
    index = tmp_path / "index"
    index.mkdir()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("UMM_GUEST_CACHE", str(tmp_path / "cache"))
    return index


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x-1-cp313-cp313-manylinux_2_28_x86_64.whl", "for manylinux_2_28_x86_64, the guest is aarch64"),
        ("x-1-cp313-cp313-win_arm64.whl", "for win_arm64, the guest is aarch64"),
        ("x-1-cp313-cp313-macosx_11_0_arm64.whl", "the guest is aarch64"),
        ("x-1-cp313-cp313-musllinux_1_2_aarch64.whl", "the guest has Linux with glibc"),
        ("x-1-cp311-cp311-manylinux_2_28_aarch64.whl", "for Python cp311 .cp311., the guest has cp313"),
        ("x-1-cp313-cp313t-manylinux_2_28_aarch64.whl", "for Python cp313 .cp313t., the guest has cp313"),
        ("x.whl", "not the name of a wheel"),
        ("x-1.tar.gz", "not the name of a wheel"),
    ],
)
def test_a_wheel_for_something_else_is_refused_at_once(tmp_path: Path, name: str, reason: str) -> None:
    path = tmp_path / name
    path.touch()
    with pytest.raises(InputError, match=reason):
        rootfs.obtain(wheels=[path])


def test_a_wheel_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"wheel .*x-1-py3-none-any\.whl: no such file"):
        rootfs.obtain(wheels=[tmp_path / "x-1-py3-none-any.whl"])


@pytest.mark.parametrize("name", ["", "-r file", "--index-url=x", "a/b", "http://x/y.whl", "a\nb"])
def test_what_is_no_name_for_pip(name: str) -> None:
    with pytest.raises(InputError, match="not a name that pip knows"):
        rootfs.obtain(pips=[name])


def test_a_damaged_wheel_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x-1-py3-none-any.whl"
    path.write_bytes(b"no zip")
    with pytest.raises(InputError, match=r"x-1-py3-none-any\.whl") as caught:
        Wheels([], [path]).identity()
    assert "\n" not in str(caught.value)


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(
        InputError, match="pip: nonesuch: no such name or version, or no wheel of it for Python 3.13"
    ):
        Wheels(["nonesuch"]).identity()


def test_an_index_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", UNREACHABLE)
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    with pytest.raises(pip.PipError, match="cannot reach its index for attrs: is the network up") as caught:
        Wheels(["attrs"]).identity()
    assert caught.value.exit_status == 3


def test_markers_are_those_of_the_guest(no_index: Path) -> None:
    """pip would evaluate them for the host's Python and machine, whatever it is asked to fetch for."""
    requires = (
        'arm; platform_machine == "aarch64"',
        'intel; platform_machine == "x86_64"',
        'new; python_version >= "3.13"',
        'old; python_version < "3.13"',
    )
    make_wheel(no_index, "top", requires=requires)
    for name in ("arm", "intel", "new", "old"):
        make_wheel(no_index, name)
    names = [line.split("-")[0] for line in Wheels(["top"]).identity()]
    assert names == ["arm", "new", "top"]


def test_what_the_guest_has_is_not_taken_twice_and_may_be_overruled(no_index: Path) -> None:
    make_wheel(no_index, "shared", "1")
    base = Wheels(["shared"])
    assert [line.split(" ")[0] for line in base.identity()] == ["shared-1-py3-none-any.whl"]
    make_wheel(no_index, "shared", "2")
    make_wheel(no_index, "easy", requires=("shared",))
    make_wheel(no_index, "picky", requires=("shared>=2",))
    easy = Wheels(["easy"], present=base).identity()
    assert [line.split(" ")[0] for line in easy] == ["easy-1-py3-none-any.whl"]
    picky = Wheels(["picky"], present=base).identity()
    assert [line.split("-")[:2] for line in picky] == [["picky", "1"], ["shared", "2"]]


def test_resolved_once_and_fetched_again_when_the_cache_lost_it(no_index: Path, tmp_path: Path) -> None:
    make_wheel(no_index, "shared", "1")
    wanted = Wheels(["shared"])
    (path,) = wanted.fetch()
    make_wheel(no_index, "shared", "2")
    assert wanted.fetch() == [path], "what it means is remembered"
    path.write_bytes(b"damaged")
    with pytest.raises(PackageGone):  # whoever made a key of the old ones has to make another
        wanted.fetch()
    (again,) = wanted.fetch()
    assert again.name == "shared-2-py3-none-any.whl"


def test_modules_programs_and_data_land_where_the_guest_looks(tmp_path: Path, no_index: Path) -> None:
    files = {"tool-1.data/data/share/man/tool.1": "m", "tool-1.data/scripts/other": "#!python\nprint()\n"}
    wheel = make_wheel(tmp_path, "tool", files=files, entry_points="[console_scripts]\ntool = tool:main\n")
    tree = tmp_path / "tree"
    tree.mkdir()
    unpack([wheel], tree, "usr/lib/site", "usr/bin")
    found = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    assert {"usr/lib/site/tool.py", "usr/bin/tool", "usr/bin/other", "usr/local/share/man/tool.1"} <= found
    assert not any("__pycache__" in name for name in found)
    for program in ("tool", "other"):
        path = tree / "usr/bin" / program
        assert path.read_text().startswith("#!/usr/bin/python3\n")
        assert path.stat().st_mode & 0o111
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "cache",
        "index",
        "tree",
    ] or (sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["index", "tree"])
