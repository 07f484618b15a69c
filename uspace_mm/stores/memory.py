"""Stores in memory of this process."""

from __future__ import annotations

from typing import Any

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError
from uspace_mm.stores.base import Mode, Store, as_mode, as_store_size, new_handle


class ZeroStore(Store):
    """`size` bytes of zeros; what is written is private to the region. Takes no memory."""

    def __init__(self, size: int | str) -> None:
        super().__init__(as_store_size(size), Mode.PRIVATE)
        handle = new_handle()
        self._created(lib.umm_store_zero_create(self.size, handle), handle, "create a zero store")


class MemoryStore(Store):
    """The bytes of a contiguous buffer, or with a size, as many bytes of the store's own, zero at first.

    The buffer must not change while a region uses it, but for write-back, which changes it. It cannot be
    memory of a region: a fault handler that reads it would wait for itself (use :class:`RegionStore`).
    """

    def __init__(self, data: Any, mode: Mode | str = Mode.PRIVATE) -> None:
        mode = as_mode(mode)
        handle = new_handle()
        if isinstance(data, (int, str)):
            super().__init__(as_store_size(data), mode)
            error = lib.umm_store_memory_create(ffi.NULL, self.size, mode, handle)
        else:
            try:
                buffer = ffi.from_buffer("uint8_t[]", data, require_writable=mode is Mode.WRITEBACK)
            except (TypeError, BufferError, ValueError) as error_:
                raise InputError(f"memory store: cannot use a {type(data).__name__}: {error_}") from None
            if len(buffer) == 0:
                raise InputError("memory store: the buffer is empty")
            super().__init__(len(buffer), mode)
            if lib.umm_range_in_region(int(ffi.cast("uintptr_t", buffer)), len(buffer)):
                raise InputError("memory store: the buffer is memory of a region; use RegionStore for it")
            self._keep = buffer
            error = lib.umm_store_memory_create(buffer, self.size, mode, handle)
        self._created(error, handle, "create a memory store")
