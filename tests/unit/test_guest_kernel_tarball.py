"""Tarballs of a kernel's source: what is unpacked, what is left out, and what hostile ones get."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.guest.kernel import tarball
from uspace_mm.guest.progress import silent


def tar(*members: tarfile.TarInfo | str, content: bytes = b"x" * 100) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if info.isfile():
                info.size = info.size or len(content)
                archive.addfile(info, io.BytesIO(content.ljust(info.size, b"\0")))
            else:
                archive.addfile(info)
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


def unpack(folder: Path, data: bytes) -> Path:
    path = folder / "source.tar"
    path.write_bytes(data)
    return tarball.unpack(path, folder / "to", silent)


def by_zstd(data: bytes) -> bytes:
    if not shutil.which("zstd"):
        pytest.skip("lacks: zstd (Debian: zstd)")
    return subprocess.run(["zstd", "-qc"], input=data, stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.parametrize(
    "pack",
    [bytes, gzip.compress, lzma.compress, bz2.compress, by_zstd],
    ids=["tar", "gz", "xz", "bz2", "zst"],
)
def test_every_packing_is_read(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    tree = unpack(tmp_path, pack(tar("linux-6.12/Makefile", "linux-6.12/mm/memory.c")))
    assert tree == tmp_path / "to" / "linux-6.12"
    assert (tree / "mm" / "memory.c").read_bytes() == b"x" * 100


def test_what_no_guest_compiles_is_left_out(tmp_path: Path) -> None:
    kept = [
        *("Makefile", "mm/memory.c", "arch/arm64/kernel/head.S", "arch/x86/Kconfig", "arch/Kconfig"),
        *("drivers/gpu/drm/Kconfig", "drivers/gpu/drm/Makefile", "drivers/net/loopback.c", "drivers/Kconfig"),
        *(
            "Documentation/Kconfig",
            "tools/include/linux/types.h",
            "drivers/virtio/virtio.c",
            "fs/ext4/super.c",
        ),
    ]
    dropped = [
        *(
            "arch/x86/kernel/head_64.S",
            "drivers/gpu/drm/amd/x.c",
            "Documentation/mm/thp.rst",
            "sound/core/pcm.c",
        ),
        *("tools/testing/selftests/mm/x.c", "arch/arm64/boot/dts/a/b.dtsi", "fs/btrfs/super.c"),
    ]
    for number, prefix in enumerate(("linux-6.12/", "")):
        folder = tmp_path / str(number)
        folder.mkdir()
        tree = unpack(folder, tar(*(prefix + name for name in kept + dropped)))
        assert {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()} == set(kept)


def test_programs_stay_executable_and_links_stay_links(tmp_path: Path) -> None:
    script = tarfile.TarInfo("l/scripts/x.sh")
    script.mode = 0o6755
    tree = unpack(tmp_path, tar(script, special("l/link", tarfile.SYMTYPE, "scripts/x.sh"), "l/plain"))
    assert (tree / "link").readlink() == Path("scripts/x.sh")
    assert [(tree / name).stat().st_mode & 0o7111 for name in ("scripts/x.sh", "plain")] == [0o111, 0]


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "no tar": (lambda: b"no tar" * 999, "not a whole tarball"),
    "empty": (lambda: b"", "not a whole tarball"),
    "cut": (lambda: tar(*"abcdef")[:2600], "not a whole tarball"),
    "cut xz": (lambda: lzma.compress(tar(*map(str, range(5000))))[:-3000], "not a whole|truncated"),
    "damaged gzip": (
        lambda: gzip.compress(tar(*map(str, range(5000))))[:9000] + b"\1" * 9999,
        "not a whole|damaged",
    ),
    "absolute": (lambda: tar("/etc/passwd"), "leads out"),
    "upward": (lambda: tar("l/../../x"), "leads out"),
    "link out": (lambda: tar(special("l/a", tarfile.SYMTYPE, "../../x")), "out of it"),
    "absolute link": (lambda: tar(special("l/a", tarfile.SYMTYPE, "/etc")), "out of it"),
    "through a link": (
        lambda: tar("l/d/x", special("l/a", tarfile.SYMTYPE, "d"), "l/a/y"),
        "below what is no folder",
    ),
    "twice": (lambda: tar("l/x", "l/x"), "twice"),
    "hard link": (lambda: tar("l/x", special("l/y", tarfile.LNKTYPE, "l/x")), "neither file"),
    "device": (lambda: tar(special("l/null", tarfile.CHRTYPE)), "neither file"),
    "pipe": (lambda: tar(special("l/pipe", tarfile.FIFOTYPE)), "neither file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tarballs_get_one_line(tmp_path: Path, name: str) -> None:
    make, expected = HOSTILE[name]
    with pytest.raises(InputError, match=expected) as caught:
        unpack(tmp_path, make())
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"source.tar", "to"}


def test_bombs_end_at_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarball, "FILES_LIMIT", 50)
    with pytest.raises(InputError, match="more than 50 files"):
        unpack(tmp_path, gzip.compress(tar(*map(str, range(60)))))
    shutil.rmtree(tmp_path / "to")
    monkeypatch.setattr(tarball, "BYTES_LIMIT", 1 << 20)
    big = tarfile.TarInfo("big")
    big.size = 2 << 20
    with pytest.raises(InputError, match="1.0 MiB"):
        unpack(tmp_path, gzip.compress(tar("a", big)))
    assert not (tmp_path / "to" / "big").exists()


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    header = special("x", tarfile.XHDTYPE)
    header.size = 256 << 20
    data = gzip.compress(header.tobuf(tarfile.USTAR_FORMAT) + bytes(64 << 20), 1)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="header of 268435456 bytes"):
            unpack(tmp_path, data)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_what_goes_on_after_the_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="goes on after the end"):
        unpack(tmp_path, gzip.compress(tar("l/x") + bytes(16 << 20), 1))


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="xz.*apt install xz-utils"):
        unpack(tmp_path, lzma.compress(tar("x")))
