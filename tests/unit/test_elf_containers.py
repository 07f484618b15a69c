"""ELF files in archives of every kind, and archives that are damaged, encrypted, huge or made to hurt."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from tests.elfs import RW, RX, Ph, elf
from uspace_mm.elf.audit import audit
from uspace_mm.elf.limits import Limits
from uspace_mm.elf.records import Report
from uspace_mm.elf.render import text
from uspace_mm.errors import InputError
from uspace_mm.guest.pagesize import PAGE_SIZES

GOOD = elf((Ph(0, flags=RX), Ph(0x20000, 0x10000, flags=RW)))
BAD = elf((Ph(0, flags=RX), Ph(0x21000, 0x10000, flags=RW, align=0x1000)))
SMALL = replace(Limits(), floor_bytes=2 << 20, ratio=4)

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def look(path: Path, limits: Limits | None = None) -> Report:
    return audit([path], PAGE_SIZES, limits=limits)


def names(report: Report) -> list[str]:
    return [file.name.rpartition("!")[2] for file in report.files]


def tar_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zip_of(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def deb_of(data_tar: bytes, name: str = "data.tar") -> bytes:
    out = b"!<arch>\n"
    control = ("control.tar.xz", lzma.compress(tar_of({})))
    for member, data in (("debian-binary", b"2.0\n"), control, (name, data_tar)):
        out += f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data
        out += b"\n" * (len(data) % 2)
    return out


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_wheel(tmp_path: Path, method: int) -> None:
    path = tmp_path / "x-1-cp313-cp313-manylinux_2_28_aarch64.whl"
    path.write_bytes(zip_of({"x/a.so": GOOD, "x/b.so": BAD, "x/x.py": b"pass", "x/e": b""}, method))
    report = look(path)
    assert names(report) == ["x/a.so", "x/b.so"]
    assert report.exit_status == 1
    assert not report.problems


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_debian_package(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "x_1_arm64.deb"
    packed = COMPRESSIONS[suffix](tar_of({"./usr/lib/a.so": GOOD, "./usr/share/doc/x": b"text" * 999}))
    path.write_bytes(deb_of(packed, f"data.tar{suffix}"))
    report = look(path)
    assert names(report) == ["usr/lib/a.so"]
    assert (report.exit_status, report.problems) == (0, [])


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_tar(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.tar{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](tar_of({"a.so": BAD, "b": b"", "c.so": GOOD})))
    assert names(look(path)) == ["a.so", "c.so"]
    assert not look(path).problems


def test_gzip_in_several_streams_as_alpine_and_pigz_write_it(tmp_path: Path) -> None:
    whole = tar_of({"a.so": GOOD, "b.so": BAD})
    path = tmp_path / "x.apk"
    streams = [gzip.compress(whole[i : i + 9999]) for i in range(0, len(whole), 9999)]
    path.write_bytes(b"".join(streams) + bytes(700))
    report = look(path)
    assert names(report) == ["a.so", "b.so"]
    assert not report.problems


def test_image_with_layers(tmp_path: Path) -> None:
    layer = gzip.compress(tar_of({"usr/lib/a.so": GOOD, "app/x.whl": zip_of({"x/b.so": BAD})}))
    path = tmp_path / "image.tar"
    path.write_bytes(tar_of({"manifest.json": b"[]", "blobs/sha256/" + "0" * 64: layer}))
    report = look(path)
    assert [name.count("!") for name in (f.name for f in report.files)] == [2, 3]
    assert names(report) == ["usr/lib/a.so", "x/b.so"]


def test_a_compressed_elf_file_and_other_compressed_data(tmp_path: Path) -> None:
    (tmp_path / "a.so.xz").write_bytes(lzma.compress(GOOD))
    (tmp_path / "changelog.gz").write_bytes(gzip.compress(b"news" * 9999))
    report = look(tmp_path)
    assert len(report.files) == 1
    assert not report.problems


def test_directory_with_links_loops_fifos_and_unreadable_files(tmp_path: Path) -> None:
    lib = tmp_path / "lib"
    lib.mkdir()
    (lib / "a.so").write_bytes(GOOD)
    (lib / "a.so.1").symlink_to("a.so")
    (lib / "loop").symlink_to(".")
    (lib / "self").symlink_to("self")
    os.link(lib / "a.so", lib / "b.so")
    os.mkfifo(lib / "fifo")
    assert [Path(f.name).name for f in look(tmp_path).files] == ["a.so"]
    assert not look(tmp_path).problems
    assert len(look(lib / "a.so.1").files) == 1  # named by the user: followed
    (problem,) = look(lib / "fifo").problems
    assert "not opened" in problem.reason


def test_files_that_cannot_be_read_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.so").write_bytes(GOOD)
    real = os.open

    def refuse(path: os.PathLike[str] | str, flags: int, *rest: int) -> int:
        if str(path).endswith("a.so"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)  # root reads everything
    report = look(tmp_path)
    assert [p.reason for p in report.problems] == ["cannot be read: Permission denied"]
    assert report.exit_status == 1


def test_a_path_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        look(tmp_path / "none")
    with pytest.raises(InputError):
        look(Path("a\0b"))


def test_files_of_other_machines_and_object_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(elf((Ph(0),), machine=62))
    (tmp_path / "b").write_bytes(elf((Ph(0),), kind=1))
    report = look(tmp_path)
    assert (report.files, report.other_machines, report.not_loadable) == ([], {"x86_64": 1}, 1)
    assert report.exit_status == 2
    assert len(audit([tmp_path], PAGE_SIZES, machine="any").files) == 1


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_bomb_in_a_wheel_is_refused(tmp_path: Path, method: int) -> None:
    path = tmp_path / "bomb.whl"
    path.write_bytes(zip_of({"a.so": GOOD, "x.so": GOOD[:0x800] + bytes(16 << 20), "z.so": GOOD}, method))
    report = look(path, SMALL)
    assert names(report) == ["a.so"]
    assert ["bomb" in p.reason for p in report.problems] == [True]
    assert report.exit_status == 1


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_bomb_in_a_tar_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "bomb.tar"
    path.write_bytes(COMPRESSIONS[suffix](tar_of({"zeros": bytes(16 << 20), "a.so": GOOD})))
    report = look(path, SMALL)
    assert ["bomb" in p.reason for p in report.problems] == [True]
    assert report.exit_status == 1


def test_a_bomb_in_an_archive_in_an_archive_ends_the_whole_path(tmp_path: Path) -> None:
    inner = gzip.compress(tar_of({"zeros": bytes(16 << 20)}))
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of({"1.tgz": inner, "2.tgz": inner, "a.so": GOOD}))
    report = look(path, SMALL)
    assert len(report.problems) == 1
    assert "bomb" in report.problems[0].reason


def test_archives_in_archives_end_at_a_depth(tmp_path: Path) -> None:
    data = GOOD
    for _ in range(12):
        data = tar_of({"x": data})
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    (problem,) = look(path).problems
    assert "deep" in problem.reason


def test_more_members_than_allowed(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of({f"f{i}": b"" for i in range(50)}))
    (problem,) = look(path, replace(Limits(), members=20)).problems
    assert "members" in problem.reason


def test_encrypted_members_are_named(tmp_path: Path) -> None:
    data = bytearray(zip_of({"a.so": GOOD, "b.so": GOOD}, zipfile.ZIP_STORED))
    data[data.index(b"PK\1\2") + 8] |= 1
    path = tmp_path / "x.zip"
    path.write_bytes(data)
    report = look(path)
    assert [(p.name.rpartition("!")[2], p.reason) for p in report.problems] == [
        ("a.so", "encrypted: cannot be read")
    ]
    assert names(report) == ["b.so"]


def test_a_zip_that_claims_a_huge_directory(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    size = 64 << 20
    with path.open("wb") as file:
        file.write(b"PK\3\4" + bytes(60))
        file.seek(64 + size)
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, size, 64, 0))
    (problem,) = look(path).problems
    assert "table" in problem.reason


def test_a_tar_that_claims_a_huge_header(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    info.size = 1 << 33
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(1 << 34)
        file.write(b"\0")
    (problem,) = look(path).problems
    assert "table" in problem.reason


def test_xz_that_wants_gigabytes_of_memory(tmp_path: Path) -> None:
    data = bytearray(lzma.compress(b"x", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16}]))
    small, large = (bytes([0x21, 1, code]) for code in (8, 34))  # 64 KiB and 512 MiB
    assert data.count(small) == 1
    at = data.index(small)
    data[at : at + 3] = large
    header = data[12 : 12 + (data[12] + 1) * 4 - 4]
    data[12 + len(header) : 16 + len(header)] = struct.pack("<I", zlib.crc32(header))
    path = tmp_path / "x.xz"
    path.write_bytes(data)
    (problem,) = look(path).problems
    assert "memory" in problem.reason


@pytest.mark.parametrize("cut", [10, 100, 1000, 3000])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz", "tar.zst", "deb"])
def test_cut_archives_are_told(tmp_path: Path, cut: int, kind: str) -> None:
    files = {"a.so": os.urandom(3000), "b.so": GOOD}
    if kind == "zip":
        data = zip_of(files, zipfile.ZIP_STORED)
    elif kind == "deb":
        data = deb_of(lzma.compress(tar_of(files)), "data.tar.xz")
    else:
        data = COMPRESSIONS["." + kind.partition(".")[2] if "." in kind else ""](tar_of(files))
    path = tmp_path / f"x.{kind}"
    path.write_bytes(data[:cut])
    report = look(path)
    assert not report.files
    if cut > 512 or kind not in ("tar", "deb"):
        assert report.problems or kind == "deb", "a cut archive must not look like a complete one"


def test_temporary_files_of_large_members_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of({"a.so": GOOD + bytes(20 << 20)}))
    assert len(look(path).files) == 1  # conftest looks for what is left in TMPDIR


def test_many_small_bombs_share_one_bound(tmp_path: Path) -> None:
    for index in range(6):
        (tmp_path / f"{index}.gz").write_bytes(gzip.compress(tar_of({"zeros": bytes(1 << 20), "a.so": GOOD})))
    assert len(look(tmp_path).files) == 6
    report = look(tmp_path, replace(Limits(), ceiling_bytes=3 << 20))
    assert len(report.files) == 2
    assert ["under this path" in p.reason for p in report.problems] == [True] * 4


def test_names_that_no_terminal_should_see(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of({"a\x1b[2J\u202e.so": BAD, "b\udcff.so": BAD}))
    report = look(path)
    assert len(report.files) == 2
    shown = text.render(report)
    assert all(line.isprintable() for line in shown.splitlines())
    assert "\\x1b[2J" in shown
