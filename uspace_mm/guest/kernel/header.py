"""What an arm64 kernel says of itself: the header of its image, its banner, the configuration it may
carry."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from typing import Protocol

from uspace_mm.errors import InputError
from uspace_mm.guest.pagesize import PAGE_SIZES, PageSize

HEADER_BYTES = 64
FLAGS_OFFSET = 0x18
_MAGIC_OFFSET = 0x38
_MAGIC = b"ARM\x64"
_CONFIG_LIMIT = 16 << 20
_BANNER = re.compile(rb"Linux version (\d[\x21-\x7e]{0,80}) \([\x20-\x7e\n]{0,400}")


class Buffer(Protocol):
    """What bytes and mmap have in common."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> bytes: ...

    def find(self, wanted: bytes, start: int = ..., /) -> int: ...


@dataclass(frozen=True)
class Header:
    """The header of an image. ``page_size`` is None for "unspecified"; ``image_bytes`` counts the bss,
    too."""

    page_size: PageSize | None
    text_offset: int
    image_bytes: int
    big_endian: bool
    anywhere: bool


def is_image(data: Buffer) -> bool:
    """Whether `data` starts with the header of an arm64 image."""
    return data[_MAGIC_OFFSET : _MAGIC_OFFSET + 4] == _MAGIC


def read_header(data: Buffer, name: object) -> Header:
    """The header of the image in `data`; `name` is for the message.

    Raises :class:`InputError` for what is no arm64 kernel, saying what it looks like. Source:
    Documentation/arch/arm64/booting.rst of the kernel.
    """
    if len(data) < HEADER_BYTES or not is_image(data):
        raise InputError(f"{name}: {_what_instead(data)}")
    text_offset, image_bytes, flags = struct.unpack_from("<QQQ", data[8:32])
    return Header(
        next((size for size in PAGE_SIZES if size.header_code == flags >> 1 & 3), None),
        text_offset,
        image_bytes,
        bool(flags & 1),
        bool(flags & 8),
    )


def _what_instead(data: Buffer) -> str:
    start = data[:0x210]
    if start[:4] == b"\x7fELF":
        return "an ELF file (vmlinux?), which is not booted: give arch/arm64/boot/Image"
    if start[0x202:0x206] == b"HdrS":
        return "a kernel for x86, not for arm64"
    if start[0x38:0x3C] == b"RSC\x05":
        return "a kernel for RISC-V, not for arm64"
    if start[8:12] == b"\x08\0\0\0" and start[0x38:0x3C] == b"LoongArch"[:4]:
        return "a kernel for LoongArch, not for arm64"
    if start[0x24:0x28] == b"\x18\x28\x6f\x01":
        return "a kernel for 32-bit ARM, not for arm64"
    if start[:2] == b"MZ":
        return "a program for EFI, but no arm64 kernel image"
    return "no arm64 kernel image (its magic number at 0x38 is missing)"


def read_version(data: Buffer, name: object) -> tuple[str, str]:
    """The release ("6.12.107") and the whole banner of the kernel in `data`; raises InputError without
    one."""
    at = data.find(b"Linux version ")
    while at >= 0:
        if match := _BANNER.match(data[at : at + 600]):
            return match[1].decode("ascii"), match[0].decode("ascii").strip()
        at = data.find(b"Linux version ", at + 1)
    raise InputError(f'{name}: holds no "Linux version": the file is truncated or damaged')


def read_config(data: Buffer) -> str | None:
    """The configuration that a kernel with IKCONFIG carries, None without it."""
    at = data.find(b"IKCFG_ST")
    while at >= 0:
        start = at + len(b"IKCFG_ST")
        if data[start : start + 2] == b"\x1f\x8b":
            engine = zlib.decompressobj(wbits=31)
            try:
                # Packed, no configuration has a megabyte.
                text = engine.decompress(data[start : start + (1 << 20)], _CONFIG_LIMIT)
            except zlib.error:
                text = b""
            if engine.eof:
                return text.decode("utf-8", "replace")
        at = data.find(b"IKCFG_ST", start)
    return None


def page_size_of_config(config: str) -> PageSize | None:
    """The page size compiled in by `config`, None when it is chosen at boot or not said."""
    lines = set(config.splitlines())
    if "CONFIG_ARM64_BOOT_TIME_PAGE_SIZE=y" in lines:
        return None
    return next((size for size in PAGE_SIZES if f"CONFIG_{size.config}=y" in lines), None)
