"""A region: a range of memory over a store, used as numpy arrays."""

from __future__ import annotations

import ctypes
import errno
import gc
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError, KernelError
from uspace_mm.pager.errors import RegionBusy
from uspace_mm.pager.statistics import Statistics, statistics_of
from uspace_mm.stores.base import Mode, Store

if TYPE_CHECKING:
    from uspace_mm.pager.pager import Pager

_ADVICE = {"normal": 0, "sequential": 1, "random": 2}
_POPULATE_SLICE = 64 << 20


class Region:
    """Memory of ``size`` bytes at ``address``, paged from ``store`` in units of ``unit`` bytes.

    Made by :meth:`Pager.map`. Every range below is in bytes from the region's start.
    """

    def __init__(self, pager: Pager, store: Store, handle: Any, size: int) -> None:
        self.pager = pager
        self.store = store
        self.size = size
        self._handle = handle
        self._calls: list[int] = []
        store.users += 1
        # The native region reads the store's memory until it is closed: also when this object is forgotten,
        # and while the interpreter takes everything down at its end.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(store))
        self.address = int(lib.umm_region_address(handle))
        self.unit = int(lib.umm_region_unit(handle))
        self._buffer = ffi.buffer(ffi.cast("char *", self.address), size)

    @property
    def handle(self) -> Any:
        """The ``struct umm_region *`` for native code; raises InputError once the region is closed."""
        if self._handle is None:
            raise InputError("this region is closed")
        return self._handle

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""
        return self._handle is None

    def __buffer__(self, _flags: int) -> memoryview:
        return self.view()

    def view(self) -> memoryview:
        """The bytes of the region, without a copy. Held, it keeps the region from being closed."""
        self.handle  # noqa: B018 - raises when closed
        view = memoryview(self._buffer)
        return view.toreadonly() if self.store.mode is Mode.READONLY else view

    def array(
        self,
        dtype: DTypeLike = np.uint8,
        shape: int | Sequence[int] | None = None,
        order: Literal["C", "F"] = "C",
        offset: int = 0,
    ) -> NDArray[Any]:
        """An array over the region from byte `offset` on, the way np.memmap gives one.

        Without a `shape`: one dimension, as many whole elements as fit. Read-only when the store is.
        Raises InputError when it does not fit, or for a dtype that holds Python objects.
        """
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise InputError(f"dtype {kind}: Python objects cannot live in a region")
        if kind.itemsize == 0:
            raise InputError(f"dtype {kind}: its elements have no size")
        if order not in ("C", "F"):
            raise InputError(f"order {order!r}: expected 'C' or 'F'")
        if not 0 <= offset < self.size:
            raise InputError(f"offset {offset}: the region has {self.size} bytes")
        if shape is None:
            shape = (self.size - offset) // kind.itemsize
        dimensions = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(length < 0 for length in dimensions):
            raise InputError(f"shape {dimensions}: lengths must not be negative")
        needed = math.prod(dimensions) * kind.itemsize
        if offset + needed > self.size:
            raise InputError(
                f"shape {dimensions} of {kind} at offset {offset} needs {offset + needed} bytes, "
                f"the region has {self.size}"
            )
        return np.ndarray(dimensions, kind, buffer=self.view(), offset=offset, order=order)

    def _range(self, start: int, stop: int | None) -> tuple[int, int]:
        end = self.size if stop is None else stop
        if not 0 <= start <= end <= self.size:
            raise InputError(f"range {start} to {end}: the region has {self.size} bytes")
        return start, end - start

    def _check(self, error: int, what: str, offset: int | None = None, length: int | None = None) -> None:
        if error == -errno.EDEADLK:
            from uspace_mm.notifier.errors import WouldDeadlock

            raise WouldDeadlock(
                f"{what} of the region at {self.address:#x}: not in a callback of a notifier, "
                "for which the pager may be waiting"
            )
        if error:
            address = None if offset is None else self.address + offset
            raise KernelError(what, error, address=address, length=length)

    def _call(self, function: Any, *arguments: Any) -> int:
        # Noted before the handle is read: close() in another thread either sees the call or hides the handle.
        # By process: a forked child inherits the notes, not the threads.
        self._calls.append(os.getpid())
        try:
            return int(function(self.handle, *arguments))
        finally:
            self._calls.pop()

    def prefetch(self, start: int = 0, stop: int | None = None) -> None:
        """Have a range brought in, in the background; demand faults go first."""
        offset, length = self._range(start, stop)
        self._check(self._call(lib.umm_region_prefetch, offset, length), "prefetch", offset, length)

    def populate(self, start: int = 0, stop: int | None = None) -> None:
        """Bring a range in now. KernelError when the store fails for a unit of it.

        Signal handlers of Python run between slices of 64 MiB, so Ctrl-C ends it there.
        """
        offset, left = self._range(start, stop)
        while left:
            # Up to a boundary: no unit or huge page is asked for twice.
            length = min(left, _POPULATE_SLICE - offset % _POPULATE_SLICE)
            self._check(self._call(lib.umm_region_populate, offset, length), "populate", offset, length)
            offset, left = offset + length, left - length

    def evict(self, start: int = 0, stop: int | None = None) -> None:
        """Push a range out: modified units to the store (or the spill), the others just away."""
        offset, length = self._range(start, stop)
        self._check(self._call(lib.umm_region_evict, offset, length), "evict", offset, length)

    def advise(self, advice: Literal["normal", "sequential", "random"]) -> None:
        """How the region will be used: ``random`` turns prefetching off."""
        if advice not in _ADVICE:
            raise InputError(f"advice {advice!r}: expected one of {', '.join(_ADVICE)}")
        self._check(self._call(lib.umm_region_advise, _ADVICE[advice]), "advise")

    def flush(self) -> None:
        """Write every modified unit to a WRITEBACK store, and the store to its disk.

        When the store refuses (a full disk), KernelError; nothing is dropped, and a later flush tries again.
        """
        self._check(self._call(lib.umm_region_flush), "write back to the store", 0, self.size)

    def stats(self) -> Statistics:
        """A snapshot of this region's statistics."""
        native = ffi.new("struct umm_pager_stats *")
        self._check(self._call(lib.umm_region_stats, native), "read statistics")
        return statistics_of(native)

    def _holders(self) -> int:
        # Ours, and the argument of getrefcount. Every array, view and copy of a view counts one.
        return sys.getrefcount(self._buffer) - 2

    def close(self) -> None:
        """Flush a WRITEBACK store, then unmap. Raises RegionBusy while an array or view of it is held."""
        if self._handle is None:
            return
        if self._holders():
            gc.collect()
        holders = self._holders()
        if holders:
            raise RegionBusy(
                f"region at {self.address:#x}, {self.size} bytes, cannot be unmapped: "
                f"{holders} array(s) or view(s) of it are still held; delete them first"
            )
        if self.store.mode is Mode.WRITEBACK:
            self.flush()
        # From here on no thread gets an array any more; one may have come during the flush.
        handle, self._handle = self._handle, None
        if handle is None:
            return
        if self._holders() or os.getpid() in self._calls:
            self._handle = handle
            raise RegionBusy(f"region at {self.address:#x} cannot be unmapped: another thread is using it")
        error = lib.umm_region_close(handle)
        if error:
            self._handle = handle
        if error == -errno.EBUSY:
            raise RegionBusy(f"region at {self.address:#x} is the store of another region; close that first")
        self._check(error, "unmap", 0, self.size)
        self.pager._forget(self)
        self.store.region_closed()
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(self.store))

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"at {self.address:#x}"
        return f"<Region {state}, {self.size} bytes of a {type(self.store).__name__}>"
