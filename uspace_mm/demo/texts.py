"""The text that the demo indexes: the standard library's sources, or the user's files, repeated to fill."""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from uspace_mm.errors import InputError


def standard_library() -> list[Path]:
    """The ``.py`` files of this Python's standard library, in order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for directory, below, names in os.walk(root):
        below[:] = [name for name in below if name != "site-packages"]
        found += [Path(directory, name) for name in names if name.endswith(".py")]
    if not found:
        raise InputError(f"no .py files below {root}; give files of your own with --input FILE...")
    return sorted(found)


def fill(text: npt.NDArray[np.uint8], files: Sequence[Path], seed: int) -> int:
    """Fill `text` with `files`, repeated; returns how many different bytes there were.

    Without files: the standard library's, in an order that `seed` chooses. Raises
    :class:`InputError` for a file that cannot be read, and when all of them are empty.
    """
    chosen = list(files)
    if not chosen:
        chosen = standard_library()
        random.Random(seed).shuffle(chosen)
    used = 0
    for path in chosen:
        try:
            with path.open("rb") as file:
                content = np.frombuffer(file.read(text.nbytes - used), np.uint8)
        except OSError as error:
            raise InputError(f"input {path}: {error.strerror}; give readable files with --input") from error
        text[used : used + content.nbytes] = content
        used += content.nbytes
        if used == text.nbytes:
            return used
    if not used:
        raise InputError("the input is empty: there is nothing to index")
    different = used
    while used < text.nbytes:
        more = min(used, text.nbytes - used)
        text[used : used + more] = text[:more]
        used += more
    return different
