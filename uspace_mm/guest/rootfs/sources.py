"""Digests of our own sources: a layer is made again when what makes it, or goes into it, was edited."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from uspace_mm.guest import cache


def digest_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """One digest of the names and bytes of `files`."""
    digest = hashlib.sha256()
    for name, path in sorted(files):
        digest.update(f"{name}\0{cache.digest_file(path)}\0".encode())
    return digest.hexdigest()


def makers(*modules: str) -> str:
    """Digest of the modules of this package that make a layer."""
    here = Path(__file__).parent
    return digest_of_files((name, here / f"{name}.py") for name in modules)
