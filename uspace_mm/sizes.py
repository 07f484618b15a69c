"""Sizes as people write them: ``512M``, ``2G``, ``16k`` (powers of 1024)."""

from __future__ import annotations

import re

from uspace_mm.errors import InputError

_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes meant by `text`: an int, or digits with an optional ``k``, ``M``, ``G`` or ``T``.

    Raises :class:`InputError` for anything else, for zero and for negative sizes.
    """
    if isinstance(text, int):
        size = text
    else:
        match = _SIZE.fullmatch(text.strip())
        if not match:
            raise InputError(f"size {text!r}: expected a number with an optional k, M, G or T, e.g. 512M")
        size = int(float(match[1]) * _FACTORS[match[2].lower()])
    if size <= 0:
        raise InputError(f"size {text!r}: must be greater than zero")
    return size


def format_size(size: float) -> str:
    """`size` bytes for people: ``1.5 GiB``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
