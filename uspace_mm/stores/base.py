"""What every store has: a size, a mode, and a policy for failed fetches."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Self

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError, KernelError
from uspace_mm.sizes import parse_size


class Mode(IntEnum):
    """What happens to pages that the program writes."""

    PRIVATE = 0
    """Kept by the pager (under a budget in an unlinked temporary file); the store is never written."""
    READONLY = 1
    """The arrays of the region refuse writes."""
    WRITEBACK = 2
    """Written to the store when they are evicted, flushed and closed."""


def as_mode(value: Mode | str) -> Mode:
    """`value` as a Mode; the names in any case are taken too."""
    if isinstance(value, Mode):
        return value
    try:
        return Mode[value.upper()]
    except (KeyError, AttributeError):
        names = ", ".join(mode.name.lower() for mode in Mode)
        raise InputError(f"store mode {value!r}: expected one of {names}") from None


class Store:
    """Base of the stores. ``size`` is in bytes. Closed by the pager that maps it, or by :meth:`close`.

    `retries`: how often a fetch that failed is tried again before the unit is lost (poisoned).
    """

    def __init__(self, size: int, mode: Mode, retries: int = 0) -> None:
        if not 0 <= retries <= 1000:
            raise InputError(f"retries {retries}: expected 0 to 1000")
        self.size = size
        self.mode = mode
        self.retries = retries
        self.users = 0
        """Open regions on this store; kept by the regions."""
        self._handle: Any = None
        self._keep: Any = None

    def _created(self, error: int, handle: Any, what: str, timeout_ms: int = 0) -> None:
        if error:
            raise KernelError(what, error, length=self.size)
        self._handle = handle[0]
        lib.umm_store_set_policy(self._handle, self.retries, timeout_ms)

    @property
    def handle(self) -> Any:
        """The ``struct umm_store *`` for native code; raises InputError once the store is closed."""
        if self._handle is None:
            raise InputError(f"this {type(self).__name__} is closed")
        return self._handle

    def close(self) -> None:
        """Give up this reference. Regions that use the store keep it until they are closed."""
        if self._handle is not None:
            lib.umm_store_put(self._handle)
            self._handle = None

    def released(self) -> None:
        """Called when neither a region nor this object holds the native store any more."""

    def region_closed(self) -> None:
        """One region fewer uses the store."""
        self.users -= 1
        if self.users == 0 and self._handle is None:
            self.released()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()


def new_handle() -> Any:
    """Room for the result of a native constructor."""
    return ffi.new("struct umm_store **")


def as_store_size(size: int | str) -> int:
    """`size` in bytes, greater than zero."""
    return parse_size(size)
