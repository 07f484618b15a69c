"""What can go wrong with a region, beyond a failed system call."""

from __future__ import annotations

import errno
import os

from uspace_mm.errors import UspaceError


class RegionBusy(UspaceError):
    """The region or pager cannot be closed yet; the message says who holds it."""


class PageLost(UspaceError):
    """An access inside a guard met a unit whose bytes could not be had.

    ``address``: of the first such access; ``offset``: its place in the region; ``units``: how many units;
    ``errno``: what the store said.
    """

    def __init__(self, address: int, offset: int, units: int, error: int) -> None:
        name = errno.errorcode.get(error, str(error))
        more = f" (and {units - 1} more)" if units > 1 else ""
        super().__init__(
            f"the page at {address:#x}, offset {offset} of its region{more}, is lost: "
            f"its store said {os.strerror(error)} [{name}]; what the block read of it is fill, not data"
        )
        self.address = address
        self.offset = offset
        self.units = units
        self.errno = error
