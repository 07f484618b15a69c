"""What the cache folder holds, and emptying it: only what has the form of ours is touched."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uspace_mm.guest import cache

_ENTRY = re.compile(r"[0-9a-f]{32}")
_WORK = re.compile(r"\.[0-9a-f]{32}(\.lock|-.*\.new)")
_MEMORY = re.compile(r"\.?[a-z]+-[0-9a-f]{32}\.json(\.\d+)?")


@dataclass(frozen=True)
class Stored:
    """One entry: its kind and folder, the bytes it takes, when it was made and last used, and what from."""

    kind: str
    folder: Path
    size_bytes: int
    made_s: float
    used_s: float
    inputs: dict[str, Any]


def entries(*kinds: str) -> list[Stored]:
    """The entries of the cache, of `kinds` or of all, the oldest of each kind first."""
    found = []
    for folder in _folders():
        if kinds and folder.name not in kinds:
            continue
        for entry in folder.iterdir():
            if not _ENTRY.fullmatch(entry.name):
                continue
            try:
                inputs = json.loads((entry / cache.MANIFEST).read_text())["inputs"]
                made_s = entry.stat().st_mtime
                used_s = (entry / cache.MANIFEST).stat().st_mtime
            except (OSError, ValueError, KeyError, TypeError):
                inputs, made_s, used_s = {}, 0.0, 0.0  # damaged: it counts, and can be cleared
            found.append(Stored(folder.name, entry, _size(entry), made_s, used_s, inputs))
    return sorted(found, key=lambda item: (item.kind, item.made_s, item.folder.name))


def work_bytes() -> int:
    """Bytes of what is in the cache besides its entries: apt's lists, memories of what names meant."""
    root = cache.cache_root()
    return sum(_size(root / name) for name in ("apt", "resolved") if (root / name).is_dir())


def clear_unused(age_s: float) -> int:
    """Remove the entries that nobody has used for `age_s`; returns the bytes they took.

    Raises :class:`~uspace_mm.guest.cache.CacheError` while another command uses the cache.
    """
    if not cache.cache_root().is_dir():
        return 0
    removed = 0
    with cache.alone():
        for entry in entries():
            if time.time() - entry.used_s > age_s:
                removed += entry.size_bytes
                cache.remove(entry.folder)
                cache.remove(entry.folder.with_name(f".{entry.folder.name}.lock"))
    return removed


def clear() -> int:
    """Remove everything that is ours from the cache folder; returns the bytes it took.

    Raises :class:`~uspace_mm.guest.cache.CacheError` while another command uses it.
    """
    root = cache.cache_root()
    if not root.is_dir():
        return 0
    removed = 0
    with cache.alone():
        ours = [
            path
            for folder in _folders()
            for path in folder.iterdir()
            if _ENTRY.fullmatch(path.name) or _WORK.fullmatch(path.name)
        ]
        ours += [path for path in (root / "resolved").glob("*") if _MEMORY.fullmatch(path.name)]
        # What the name of a kernel's source or package meant when it was last looked up.
        ours += root.glob("kernel*/*.json")
        ours += [path for path in (root / "apt").glob("*") if (path / "apt.conf").is_file()]
        for path in ours:
            removed += _size(path)
            cache.remove(path)
        for folder in {path.parent for path in ours}:
            if not any(folder.iterdir()):
                folder.rmdir()
    return removed


def _folders() -> Iterator[Path]:
    root = cache.cache_root()
    if root.is_dir():
        yield from sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _size(path: Path) -> int:
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size
    return sum(item.lstat().st_size for item in path.rglob("*") if item.is_file() or item.is_symlink())
