"""Reading kernel images: what header, banner and configuration say, packed or not, and what hostile files
get."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import struct
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernel_images import choosing_at_boot, efi, image, write
from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.guest.kernel import boot_argument, from_file
from uspace_mm.guest.kernel import contents as contents_module
from uspace_mm.guest.kernel.contents import contents
from uspace_mm.guest.kernel.header import page_size_of_config, read_config, read_header, read_version
from uspace_mm.guest.pagesize import PAGE_SIZES


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMM_GUEST_CACHE", str(tmp_path / "cache"))


def by_tool(*command: str) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        if not shutil.which(command[0]):
            pytest.skip(f"lacks: {command[0]} (Debian: {command[0]})")
        return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout

    return pack


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "zstd": by_tool("zstd", "-qc"),
    # As the kernel's own build packs: the old format.
    "lz4": by_tool("lz4", "-lqc"),
}


@pytest.mark.parametrize("size", PAGE_SIZES, ids=str)
def test_the_header_says_the_page_size(tmp_path: Path, size: object) -> None:
    code = next(s.header_code for s in PAGE_SIZES if s is size)
    path = write(tmp_path / "Image", image(code))
    kernel = from_file(path)
    assert (kernel.page_size, kernel.version, kernel.origin, kernel.image) == (size, "6.12.107", "file", path)


def test_an_unspecified_page_size_is_chosen_at_boot(tmp_path: Path) -> None:
    assert from_file(write(tmp_path / "Image", image(0))).page_size is None
    stand_in = choosing_at_boot(image(2, "CONFIG_ARM64_16K_PAGES=y\n"))
    assert from_file(write(tmp_path / "stand-in", stand_in)).page_size is None
    assert read_config(stand_in) is None
    assert [boot_argument(size) for size in PAGE_SIZES] == [
        "arm64.pagesize=4k",
        "arm64.pagesize=16k",
        "arm64.pagesize=64k",
    ]


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("in_efi", [False, True], ids=["plain", "efi"])
def test_packed_images_are_unpacked(tmp_path: Path, kind: str, in_efi: bool) -> None:
    raw = image(3)
    packed = PACKERS[kind](raw)
    path = write(tmp_path / "vmlinuz", efi(packed, kind.encode()) if in_efi else packed)
    with contents(path) as held:
        assert held.data[:] == raw
        assert held.packing == (f"{kind} in EFI" if in_efi else kind)
        assert held.file_bytes == path.stat().st_size
    kernel = from_file(path)
    assert kernel.page_size is PAGE_SIZES[2]
    assert kernel.image.read_bytes() == raw
    assert from_file(path).image == kernel.image


def test_the_configuration_is_found_after_a_false_mark() -> None:
    data = b"IKCFG_ST\x1f\x8bno" + b"IKCFG_ST" + image(1, "CONFIG_ARM64_64K_PAGES=y\n# CONFIG_X is not set\n")
    config = read_config(data)
    assert config == "CONFIG_ARM64_64K_PAGES=y\n# CONFIG_X is not set\n"
    assert page_size_of_config(config) is PAGE_SIZES[2]
    assert page_size_of_config(config + "CONFIG_ARM64_BOOT_TIME_PAGE_SIZE=y\n") is None
    assert read_config(image(1)) is None
    assert read_config(image(1, "CONFIG_X=y\n" * 9)[:-5160]) is None


def test_the_header_holds_the_sizes(tmp_path: Path) -> None:
    header = read_header(image(1, text_offset=0x80000, image_bytes=77 << 16), "x")
    assert (header.text_offset, header.image_bytes, header.big_endian) == (0x80000, 77 << 16, False)


def x86() -> bytes:
    data = bytearray(4 << 10)
    data[0x202:0x206] = b"HdrS"
    return bytes(data)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "short": (b"MZ" * 20, "too short"),
    "text": (b"#!/bin/sh\n" * 100, "no arm64 kernel image"),
    "zeros": (bytes(1 << 16), "no arm64 kernel image"),
    "x86": (x86(), "x86"),
    "riscv": (bytes(0x38) + b"RSC\x05" + bytes(100), "RISC-V"),
    "elf": (b"\x7fELF\2\1\1" + bytes(100), "ELF"),
    "no banner": (image(1)[:900], "Linux version"),
    "big-endian": (image(1)[:24] + b"\x0b" + image(1)[25:], "big-endian"),
    "gzip cut": (gzip.compress(image(1))[:-100], "truncated"),
    "gzip damaged": (gzip.compress(image(1) * 99)[:300] + b"\xff" * 999, "damaged"),
    "xz cut": (lzma.compress(image(1))[:-50], "truncated"),
    "gzip of little": (gzip.compress(b"little"), "too short"),
    "gzip of nothing much": (gzip.compress(b"little") + bytes(64), "too few"),
    "efi past its end": (efi(gzip.compress(image(1)), b"gzip", length=1 << 30), "outside"),
    "efi before its start": (efi(gzip.compress(image(1)), b"gzip", offset=4), "outside"),
    "efi offset overflows": (efi(b"", b"gzip", offset=0xFFFFFFFF, length=0xFFFFFFFF), "outside"),
    "efi of unknown kind": (efi(gzip.compress(image(1)), b"brotli"), "'brotli'"),
    "efi wrong kind": (efi(lzma.compress(image(1)), b"gzip"), "damaged"),
    "efi of zstd that is none": (efi(b"no zstd" * 99, b"zstd"), "zstd"),
    "lzo": (b"\x89LZO\0\r\n\x1a\n" + bytes(100), "lzo"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_get_one_line(tmp_path: Path, name: str) -> None:
    data, expected = HOSTILE[name]
    path = write(tmp_path / "Image", data)
    with pytest.raises(InputError, match=expected) as caught:
        from_file(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none", Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(InputError):
            from_file(path)


@pytest.mark.parametrize("kind", ["gzip", "xz", "bzip2", "zstd"])
def test_a_bomb_ends_at_the_limit_and_takes_no_memory(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents_module, "UNPACKED_LIMIT", 24 << 20)
    path = write(tmp_path / "bomb", PACKERS[kind](bytes(64 << 20)))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="more than 24.0 MiB"):
            from_file(path)
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "vmlinuz", efi(PACKERS["zstd"](image(1)), b"zstd"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="zstd.*apt install zstd"):
        from_file(path)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_an_input_error_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["plain", "gzip", "efi"]))
    raw = image(2, "CONFIG_ARM64_16K_PAGES=y\n")
    whole = {"plain": raw, "gzip": gzip.compress(raw), "efi": efi(gzip.compress(raw), b"gzip")}[kind]
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path / "Image", bytes(damaged))
    try:
        with contents(path) as held:
            read_header(held.data, path)
            read_version(held.data, path)
            read_config(held.data)
    except (InputError, UnsupportedError) as error:
        assert "\n" not in str(error)


def test_a_banner_must_be_one() -> None:
    assert read_version(b"x" * 99 + b"Linux version 5.0-rc1+ (me@here) (gcc) #1\n", "x")[0] == "5.0-rc1+"
    for bad in (b"", b"Linux version ", b"Linux version " + b"9" * 999, struct.pack("<Q", 1)):
        with pytest.raises(InputError):
            read_version(bad, "x")
