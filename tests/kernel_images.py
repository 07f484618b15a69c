"""Kernel images made by hand: a header, a banner, a configuration; nothing in them runs."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

BANNER = b"Linux version 6.12.107 (uspace_mm@guest) (aarch64-linux-gnu-gcc 12) #1 SMP\n\0"


def image(code: int, config: str | None = None, *, text_offset: int = 0, image_bytes: int = 1 << 20) -> bytes:
    """An arm64 image whose header says page size `code` (0 to 3); with `config`, it carries that."""
    header = struct.pack("<IIQQQ", 0, 0, text_offset, image_bytes, code << 1 | 8) + bytes(24) + b"ARM\x64"
    body = header.ljust(64, b"\0") + bytes(1000) + b"%s version %s\0" + BANNER
    if config is not None:
        body += b"IKCFG_ST" + gzip.compress(config.encode()) + b"IKCFG_ED"
    return body + bytes(range(256)) * 20


def efi(packed: bytes, kind: bytes, *, offset: int = 512, length: int | None = None) -> bytes:
    """An EFI image that unpacks `packed`, with the padding and signature that follow in real ones."""
    size = len(packed) if length is None else length
    head = b"MZ\0\0zimg" + struct.pack("<II", offset, size) + bytes(8) + kind
    return head.ljust(512, b"\0") + packed + b"\xde\xad" * 100


def choosing_at_boot(real: bytes) -> bytes:
    """A stand-in for a kernel that takes its page size at boot, of which no released one exists.

    It is a real image, compiled for one page size, whose header is made to say "unspecified" and whose
    configuration is hidden. It boots with its own size only, whatever is asked for: what a silent fallback
    looks like.
    """
    data = bytearray(real.replace(b"IKCFG_ST\x1f\x8b", b"ikcfg_st\x1f\x8b"))
    data[0x18] &= ~6
    return bytes(data)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
