"""Where the C sources lie that are compiled for guests: in the installed package, or in its tree."""

from __future__ import annotations

from pathlib import Path

import uspace_mm
from uspace_mm.errors import UnsupportedError


def native_sources() -> Path:
    """The folder ``native`` with the C sources of this version.

    A wheel carries it as package data (``uspace_mm/_sources/native``); an editable one runs in its tree.
    Raises :class:`UnsupportedError` when neither is there.
    """
    package = Path(uspace_mm.__file__).resolve().parent
    for folder in (package / "_sources" / "native", package.parent / "native"):
        if (folder / "guest").is_dir():
            return folder
    raise UnsupportedError(
        f"the C sources of uspace_mm are missing beside {package}: install the package from its source tree"
    )
