"""Writes ``/etc/ld.so.cache`` for arm64: the host's ldconfig knows only the architectures it runs on.

The loader finds libraries in its default folders without it, but ``ctypes.util.find_library`` asks
``ldconfig -p``, which reads this file. The format is that of glibc's ``sysdeps/generic/dl-cache.h``
(``struct cache_file_new``), as all glibcs since 2.2 read it.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from pathlib import Path

_MAGIC = b"glibc-ld.so.cache1.1"
_HEADER = struct.Struct("<20sIIB3xI12x")
_ENTRY = struct.Struct("<iIIIQ")
_LITTLE_ENDIAN = 2  # cache_file_new_flags_endian_little
_FLAGS = 0x0003 | 0x0A00  # FLAG_ELF_LIBC6 | FLAG_AARCH64_LIB64
_ELF_AARCH64 = b"\x7fELF\x02\x01"
_EM_AARCH64 = 183


def write(root: Path, folders: Iterable[str]) -> None:
    """Write the cache of the shared libraries in `folders` (paths from `root`, the first ones win)."""
    found: dict[str, str] = {}
    for folder in folders:
        paths = [path for pattern in ("lib*.so*", "ld-*.so*") for path in (root / folder).glob(pattern)]
        # "libz.so.1.3.1" is known by the link "libz.so.1", which is the name that others ask for.
        targets = {str(path.readlink()) for path in paths if path.is_symlink()}
        for path in sorted(paths):
            if path.name not in targets and _is_library(root, path):
                found.setdefault(path.name, f"/{folder}/{path.name}")
    # The loader searches by bisection, from the highest name down.
    names = sorted(found, key=functools.cmp_to_key(_compare), reverse=True)
    strings = bytearray()
    start = _HEADER.size + _ENTRY.size * len(names)
    entries = []
    for name in names:
        # "libc.so.6" is the end of "/usr/lib/aarch64-linux-gnu/libc.so.6": one text serves both.
        value = start + len(strings)
        strings += found[name].encode() + b"\0"
        entries.append(_ENTRY.pack(_FLAGS, value + len(found[name]) - len(name), value, 0, 0))
    header = _HEADER.pack(_MAGIC, len(names), len(strings), _LITTLE_ENDIAN, 0)
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/ld.so.cache").write_bytes(header + b"".join(entries) + strings)


def _is_library(root: Path, path: Path) -> bool:
    # Links are those of the tree, not of the host.
    for _ in range(8):
        if not path.is_symlink():
            break
        target = path.readlink()
        path = root / target.relative_to("/") if target.is_absolute() else path.parent / target
    try:
        with path.open("rb") as file:
            start = file.read(20)
    except OSError:
        return False
    return start.startswith(_ELF_AARCH64) and int.from_bytes(start[18:20], "little") == _EM_AARCH64


def _compare(one: str, other: str) -> int:
    """The order of glibc's ``_dl_cache_libcmp``: numbers by their value, and above other characters."""
    i = j = 0
    while i < len(one):
        if one[i].isdigit():
            if j >= len(other) or not other[j].isdigit():
                return 1
            a, i = _number(one, i)
            b, j = _number(other, j)
            if a != b:
                return a - b
        elif j < len(other) and other[j].isdigit():
            return -1
        elif j >= len(other) or one[i] != other[j]:
            return ord(one[i]) - (ord(other[j]) if j < len(other) else 0)
        else:
            i += 1
            j += 1
    return -ord(other[j]) if j < len(other) else 0


def _number(text: str, start: int) -> tuple[int, int]:
    end = start
    while end < len(text) and text[end].isdigit():
        end += 1
    return int(text[start:end]), end
