"""Frames of the postcopy protocol as the C core writes them, right and wrong ones, for tests."""

from __future__ import annotations

import mmap
import struct
from typing import Any

from uspace_mm._native import ffi, lib

PAGE = mmap.PAGESIZE
PAGES = 600
IDLE_S = 3.0
CONTENT = bytes(range(256)) * (PAGE // 256)
PAGES_FRAME, STATE, SWITCH, ROUND, STREAMED, DIGESTS, HELLO, WELCOME = 3, 5, 6, 4, 9, 10, 1, 2


def frame(type_: int, first: int = 0, count: int = 0, payload: bytes = b"", **wrong: Any) -> bytes:
    """A frame as the C core writes it; `wrong` replaces fields, or the checked part of the payload."""
    checked = payload[: 8 * count] if type_ == PAGES_FRAME else payload
    fields = {
        "type": type_,
        "first": first,
        "count": count,
        "length": len(payload),
        "payload_check": lib.umm_frame_payload_check(checked, len(checked)),
    }
    fields |= wrong
    header = ffi.new("uint8_t[32]")
    lib.umm_frame_encode(ffi.new("struct umm_frame *", fields), header)
    return bytes(header) + payload


def page_payload(content: bytes, digest: int | None = None) -> bytes:
    own = lib.umm_page_digest(content, PAGE)
    return struct.pack("<Q", own if digest is None else digest) + content
