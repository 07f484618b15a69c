"""Address spaces: this process's own, and the base of those of others."""

from __future__ import annotations

import os
from typing import Any, Protocol, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError
from uspace_mm.kernel._check import as_int
from uspace_mm.notifier.event import ADDRESS_END


class Holder(Protocol):
    """A registration or a stream."""

    def close(self) -> None: ...


class Space:
    """An address space that can be registered on."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @property
    def handle(self) -> Any:
        """The ``struct umm_space *`` for native code."""
        return self._handle

    @property
    def pid(self) -> int:
        """Its process."""
        return int(lib.umm_space_pid(self.handle))

    @property
    def generation(self) -> int:
        """Grows with every change that was told of."""
        return int(lib.umm_space_generation(self.handle))

    @property
    def registrations(self) -> int:
        """How many subscriptions it has, those of native code included."""
        return int(lib.umm_space_subscriptions(self.handle))

    def _begin(self, holder: Holder) -> None:
        """Somebody registered."""

    def _end(self, holder: Holder) -> None:
        """And is there no more."""


class _Own(Space):
    """This process's; in a forked child that is the child's."""

    def __init__(self) -> None:
        super().__init__(ffi.NULL)

    @property
    def handle(self) -> Any:
        return lib.umm_space_self()

    @property
    def pid(self) -> int:
        return os.getpid()


_OWN = _Own()


def this_process() -> Space:
    """The address space of this process."""
    return _OWN


def as_space(space: Space | None) -> Space:
    """`space`; None is this process."""
    if space is None:
        return _OWN
    if not isinstance(space, Space):
        raise InputError(f"space: expected None or a Process, not {type(space).__name__}")
    return space


def as_interval(start: Any, end: SupportsIndex | None) -> tuple[int, int]:
    """[start, end) of two addresses, of an object that has memory, or (two times None) of all memory.

    Memory: what has ``address`` and ``size`` or ``length`` (a region, a mapping), a numpy array, also one
    with gaps, or another buffer. The object is not kept.
    """
    call = "range"
    if start is None:
        if end is not None:
            raise InputError(f"{call}: an end without a start")
        return 0, ADDRESS_END
    memory = _memory_of(start)
    if memory is not None:
        if end is not None:
            raise InputError(f"{call}: a {type(start).__name__} has an end of its own")
        low, high = memory
    else:
        low = as_int(call, "start", start)
        high = ADDRESS_END if end is None else as_int(call, "end", end)
    if low >= high:
        raise InputError(f"{call}: the range {low:#x} to {high:#x} is empty")
    return low, high


def _memory_of(thing: Any) -> tuple[int, int] | None:
    if isinstance(thing, int | np.generic):
        return None
    if isinstance(thing, np.ndarray):
        return _extent_of(thing)
    address = getattr(thing, "address", None)
    length = getattr(thing, "size", getattr(thing, "length", None))
    if isinstance(address, int) and isinstance(length, int):
        return address, address + length
    try:
        view = memoryview(thing)
    except TypeError:
        return None
    with view:
        if not view.c_contiguous:
            raise InputError(f"range: this {type(thing).__name__} has gaps; give two addresses instead")
        begin = int(ffi.cast("uintptr_t", ffi.from_buffer(view)))
        return begin, begin + view.nbytes


def _extent_of(array: NDArray[Any]) -> tuple[int, int]:
    low = high = int(array.__array_interface__["data"][0])
    if not array.size:
        return low, low
    for length, stride in zip(array.shape, array.strides, strict=True):
        span = (length - 1) * stride
        low, high = (low + span, high) if span < 0 else (low, high + span)
    return low, high + array.itemsize
