"""Layers of root file systems, without a guest: what is in them, when they are made again, bad input."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from uspace_mm.cli import main
from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.guest import cache, rootfs
from uspace_mm.guest.debian import Archive, Package, PackageGone, extract
from uspace_mm.guest.rootfs import layers, own, toolchain
from uspace_mm.guest.rootfs.bytecode import compile_tree

PYC = "__pycache__/{}.cpython-313.pyc"


@pytest.fixture(autouse=True)
def needs() -> None:
    for tool, package in (("mksquashfs", "squashfs-tools"), ("apt-get", "apt")):
        if not shutil.which(tool):
            pytest.skip(f"lacks: {tool} (Debian: {package})")


@pytest.fixture(autouse=True)
def own_overlays(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's cache but for overlays, which would pile up there."""
    folder, users = tmp_path_factory.mktemp("cache"), cache.cache_root()
    for kind in users.iterdir() if users.is_dir() else ():
        if kind.is_dir() and kind.name != "root-overlay":
            (folder / kind.name).symlink_to(kind)
    monkeypatch.setenv("UMM_GUEST_CACHE", str(folder))


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    folder = tmp_path / "overlay"
    for name, text in {
        "src/module.py": "value = 1\n",
        "src/broken.py": "def\n",
        "src/__pycache__/module.cpython-311.pyc": "of the host",
        "bin/tool": "#!/bin/sh\necho tool\n",
        "etc/secret": "secret\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "bin/tool").chmod(0o755)
    (folder / "etc/secret").chmod(0o600)
    (folder / "src/link").symlink_to("/nowhere")
    (folder / "empty").mkdir(mode=0o700)
    return folder


def unpacked(image: Path, to: Path) -> Path:
    subprocess.run(
        ["unsquashfs", "-q", "-n", "-d", str(to), str(image)], check=True, stdout=subprocess.DEVNULL
    )
    return to


def test_a_directory_lands_at_the_root(overlay: Path, tmp_path: Path) -> None:
    tree = unpacked(layers.of_directory(overlay), tmp_path / "tree")
    found = {
        str(path.relative_to(tree)) for path in tree.rglob("*") if not path.is_dir() or path.is_symlink()
    }
    # A real /bin would hide the guest's link to usr/bin, and every program with it.
    assert found == {
        "usr/bin/tool",
        "etc/secret",
        "src/module.py",
        "src/broken.py",
        "src/link",
        f"src/{PYC.format('module')}",
    }
    assert os.readlink(tree / "src/link") == "/nowhere"
    assert (tree / "etc/secret").stat().st_mode & 0o777 == 0o600
    assert (tree / "empty").stat().st_mode & 0o777 == 0o700
    assert (tree / "usr/bin/tool").stat().st_mode & 0o777 == 0o755


def test_what_lies_in_bin_and_in_usr_is_one_folder(overlay: Path, tmp_path: Path) -> None:
    (overlay / "usr/bin").mkdir(parents=True)
    (overlay / "usr/bin/other").write_text("other")
    (overlay / "bin/twice").symlink_to("tool")
    (overlay / "usr/bin/twice").symlink_to("other")
    tree = unpacked(layers.of_directory(overlay), tmp_path / "tree")
    assert {path.name for path in (tree / "usr/bin").iterdir()} == {"tool", "other", "twice"}
    assert os.readlink(tree / "usr/bin/twice") == "other"
    assert not (tree / "bin").exists()


def test_bytecode_is_valid_where_it_lies(overlay: Path, tmp_path: Path) -> None:
    """Time and size of the source are in the header; else each guest would compile, or run old code."""
    tree = unpacked(layers.of_directory(overlay), tmp_path / "tree")
    source, compiled = tree / "src/module.py", tree / "src" / PYC.format("module")
    header = compiled.read_bytes()[:16]
    assert int.from_bytes(header[4:8], "little") == 0, "checked by time"
    assert int.from_bytes(header[8:12], "little") == int(source.stat().st_mtime)
    assert int.from_bytes(header[12:16], "little") == source.stat().st_size
    assert b"/src/module.py" in compiled.read_bytes()
    assert str(tmp_path).encode() not in compiled.read_bytes()


def test_made_again_when_something_changed_and_only_then(overlay: Path) -> None:
    first = layers.of_directory(overlay)
    assert layers.of_directory(overlay) == first
    status = (overlay / "src/module.py").stat()
    (overlay / "src/module.py").write_text("value = 2\n")
    os.utime(overlay / "src/module.py", ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = layers.of_directory(overlay)
    assert changed != first
    (overlay / "src/__pycache__/other.pyc").write_text("does not count")
    assert layers.of_directory(overlay) == changed
    (overlay / "bin/tool").chmod(0o700)
    assert layers.of_directory(overlay) not in (first, changed)


def test_the_same_input_gives_the_same_bytes(
    overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cache.digest_file(layers.of_directory(overlay))
    other = tmp_path / "cache"
    other.mkdir()
    for kind in ("resolved", "host-python"):
        (other / kind).symlink_to(cache.cache_root() / kind)
    monkeypatch.setenv("UMM_GUEST_CACHE", str(other))
    time.sleep(1.1)  # the times of files made now differ by a second
    image = layers.of_directory(overlay)
    assert image.is_relative_to(other)
    assert cache.digest_file(image) == first


def test_a_damaged_image_is_made_again(overlay: Path) -> None:
    image = layers.of_directory(overlay)
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    said = []
    assert layers.of_directory(overlay, lambda text, done=None: said.append(text)) == image
    assert image.read_bytes() == whole
    assert any("damaged" in text for text in said)


def test_what_cannot_be_in_a_guest_is_named(overlay: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"overlay .*nonesuch: no such directory"):
        rootfs.obtain(overlays=[tmp_path / "nonesuch"])
    with pytest.raises(InputError, match=r"overlay .*tool: no such directory"):
        rootfs.obtain(overlays=[overlay / "bin/tool"])
    os.mkfifo(overlay / "etc/pipe")
    with pytest.raises(InputError, match=r"etc/pipe is a device, pipe or socket"):
        layers.of_directory(overlay)
    (overlay / "etc/pipe").unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(overlay / "s"))
        with pytest.raises(InputError, match=r"/s is a device, pipe or socket"):
            layers.of_directory(overlay)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    odd = os.fsdecode(b"caf\xe9 \n.py")
    (folder / odd).write_text("value = 1\n")
    tree = unpacked(layers.of_directory(folder), tmp_path / "tree")
    assert (tree / odd).read_text() == "value = 1\n"
    assert len(list(tree.glob("__pycache__/*.pyc"))) == 1


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ("FATAL ERROR: Write failed because No space left on device", "no space left in .*UMM_GUEST_CACHE"),
        ("FATAL ERROR: something else", "mksquashfs failed: FATAL ERROR: something else"),
    ],
)
def test_mksquashfs_that_fails(
    overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, match: str
) -> None:
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "mksquashfs").write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    (fake / "mksquashfs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    with pytest.raises(Exception, match=match) as caught:
        layers.of_directory(overlay)
    assert "\n" not in str(caught.value)
    kind = cache.cache_root() / "root-overlay"
    assert not list(kind.glob(".*.new"))


def test_tools_that_are_missing_are_named(
    overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"lacks: mksquashfs \(Debian: squashfs-tools\)"):
        layers.of_directory(overlay)
    toolchain.compiler.cache_clear()
    try:
        with pytest.raises(UnsupportedError, match=r"lacks: .*gcc \(Debian: gcc-aarch64-linux-gnu\)"):
            toolchain.compiler()
    finally:
        toolchain.compiler.cache_clear()


def test_a_source_that_does_not_compile_for_the_guest_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.c"
    bad.write_text("int f(void) { return nonesuch; }\n")
    with (
        toolchain.toolchain() as tools,
        pytest.raises(Exception, match=r"bad\.c cannot be compiled.*nonesuch"),
    ):
        tools.compile([bad], tmp_path, ["-Wall"])


def test_the_toolchain_is_that_of_the_guest(tmp_path: Path) -> None:
    """Not the host's headers and C library, which may be older or newer than what runs in the guest."""
    source = tmp_path / "libc.c"
    source.write_text(
        "#include <features.h>\n#include <gnu/libc-version.h>\n#include <stdio.h>\n"
        '#if __GLIBC_MINOR__ != 41\n#error "headers"\n#endif\n'
        "int main() { return puts(gnu_get_libc_version()); }\n"
    )
    with toolchain.toolchain() as tools:
        objects = tools.compile([source], tmp_path, [])
        tools.link(objects, tmp_path / "program", ["-static"])
    assert b"\x002.41\0" in (tmp_path / "program").read_bytes()


def test_the_agent_is_a_static_program_for_arm64() -> None:
    data = rootfs.agent().read_bytes()
    assert data[:5] == b"\x7fELF\x02"
    assert int.from_bytes(data[18:20], "little") == 183
    table, size, count = (
        int.from_bytes(data[at : at + length], "little") for at, length in ((32, 8), (54, 2), (56, 2))
    )
    kinds = {int.from_bytes(data[table + size * n : table + size * n + 4], "little") for n in range(count)}
    assert 3 not in kinds, "PT_INTERP: it would need a loader"
    assert rootfs.agent().stat().st_mode & 0o111


def test_our_own_package_is_whole(tmp_path: Path) -> None:
    tree = unpacked(own.obtain(), tmp_path / "tree")
    site = tree / "usr/lib/uspace_mm/site-packages"
    package = Path(cache.__file__).parents[1]
    expected = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    found = {str(path.relative_to(site / "uspace_mm")) for path in site.rglob("*.py")}
    assert {name for name in expected if not name.startswith("_sources/")} == found
    assert {str(path.parent.parent / f"{path.name.split('.')[0]}.py") for path in site.rglob("*.pyc")} == {
        str(path) for path in site.rglob("*.py")
    }
    assert len(list(site.glob("uspace_mm/_native.cpython-313-aarch64-linux-gnu.so"))) == 1
    assert "uspace-mm" in (site / "uspace_mm-0.1.0.dist-info/entry_points.txt").read_text()


def test_every_module_of_a_tree_is_compiled_but_those_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for number in range(20):
        (tmp_path / f"p/m{number}.py").write_text(f"x = {number}\n")
    (tmp_path / "p/nul.py").write_bytes(b"x = 1\0\n")
    (tmp_path / "p/deep.py").write_text("(" * 5000 + ")" * 5000)
    (tmp_path / "p/gone.py").symlink_to("nowhere.py")
    assert compile_tree(tmp_path) == 22
    assert len(list((tmp_path / "p/__pycache__").iterdir())) == 20


def test_with_everything_cached_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no apt, no pip, no compiler that compiles: only versions are asked for."""
    before = rootfs.obtain()
    fake = tmp_path / "fake"
    fake.mkdir()
    for tool in ("apt-get", "apt-cache", "apt-config", "pip", "dpkg-deb"):
        (fake / tool).write_text("#!/bin/sh\nexit 99\n")
        (fake / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    monkeypatch.setenv("UMM_DEBIAN_MIRROR", "http://127.0.0.1:9/debian")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    said = []
    assert rootfs.obtain(progress=lambda text, done=None: said.append(text)) == before
    assert said == []


def test_the_command_prints_what_is_in_it(overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guest", "root", "build", "--overlay", str(overlay), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [layer["kind"] for layer in record["layers"]] == ["base", "own", "overlay"]
    base = record["layers"][0]
    assert any(name.startswith("libc6 2.41") for name in base["packages"])
    assert any(name.startswith("numpy-") for name in base["wheels"])
    assert Path(base["image"]).stat().st_size == base["size_bytes"]
    assert main(["guest", "root", "build", "--overlay", str(overlay)]) == 0
    printed = capsys.readouterr().out
    assert base["image"] in printed and "packages of Debian" in printed and "agent" in printed
    assert main(["guest", "root", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(layer["image"] in listed for layer in record["layers"])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--overlay", "/nonesuch"], 2, "overlay /nonesuch: no such directory"),
        (["--wheel", "/x-1-cp313-cp313-linux_x86_64.whl"], 2, "no such file"),
        (["--package", "No_Name"], 2, "not a name of a Debian package"),
        (["--pip", "-e ."], 2, "not a name that pip knows"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["guest", "root", "build", *arguments]) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_names_are_looked_up_again_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rootfs.obtain()
    own_cache, users = tmp_path / "cache", cache.cache_root()
    own_cache.mkdir()
    for kind in users.iterdir():
        if kind.is_dir() and kind.name != "resolved":
            (own_cache / kind.name).symlink_to(kind)
    shutil.copytree(users / "resolved", own_cache / "resolved")
    monkeypatch.setenv("UMM_GUEST_CACHE", str(own_cache))
    for memory in (own_cache / "resolved").glob("packages-*"):
        known = json.loads(memory.read_text())
        for package in known["answer"]:
            if package["name"] == "bash":
                package["version"] = "1.0"
        memory.write_text(json.dumps(known))
    assert main(["guest", "root", "update", "--json"]) == 0
    changes = json.loads(capsys.readouterr().out)["changes"]
    assert [change["is"][:6] for change in changes if change["was"] == "bash 1.0"] == ["bash 5"]
    assert rootfs.obtain().layers[0].parent.name == before.layers[0].parent.name or len(changes) > 1


@pytest.mark.slow
def test_the_real_archive(tmp_path: Path) -> None:
    archive = Archive()
    (package,) = archive.packages(["hostname"])
    assert package.architecture == "arm64"
    (deb,) = archive.fetch([package])
    assert cache.digest_file(deb) == package.sha256
    extract(deb, tmp_path / "to", only=lambda name: name.startswith("usr/bin"))
    assert (tmp_path / "to/usr/bin/hostname").read_bytes()[18:20] == (183).to_bytes(2, "little")
    with pytest.raises(InputError, match="package nonesuch-of-all: not in Debian trixie for arm64"):
        archive.packages(["nonesuch-of-all"])
    with pytest.raises(PackageGone):
        archive.fetch([Package("hostname", "0.0-gone", "arm64", "0" * 64, 1)])


@pytest.mark.slow
def test_our_package_is_the_same_wherever_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a cache that is copied, or an image for containers, would not be what is made here."""
    first = cache.digest_file(own.obtain())
    other = tmp_path / "cache"
    other.mkdir()
    for kind in ("resolved", "host-python", "sysroot"):
        (other / kind).symlink_to(cache.cache_root() / kind)
    monkeypatch.setenv("UMM_GUEST_CACHE", str(other))
    before = os.umask(0o077)
    try:
        assert cache.digest_file(own.obtain()) == first
    finally:
        os.umask(before)
