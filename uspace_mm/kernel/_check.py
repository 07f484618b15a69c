"""The one place where a negative errno becomes an exception, and where arguments are looked at before.

cffi turns a negative or too large int into an OverflowError of its own; callers get an InputError that names
the call instead.
"""

from __future__ import annotations

import operator
import resource
from collections.abc import Mapping
from typing import Any, SupportsIndex

from uspace_mm._native import ffi
from uspace_mm.errors import InputError, KernelError

PAGE_SIZE = resource.getpagesize()
_ADDRESS_END = 1 << 64


def check(
    result: int,
    call: str,
    *,
    address: int | None = None,
    length: int | None = None,
    hints: Mapping[int, str] | None = None,
) -> int:
    """`result` when it is not negative, else the KernelError for it; `hints` maps errno to what to do."""
    if result >= 0:
        return result
    hint = (hints or {}).get(-result, "")
    raise KernelError(call, -result, address=address, length=length, hint=hint)


def as_int(call: str, name: str, value: SupportsIndex, *, low: int = 0, high: int = _ADDRESS_END - 1) -> int:
    """`value` as an int within [low, high]; numpy integers are fine, floats and strings are not."""
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{call}: {name} must be an integer, not {type(value).__name__}") from None
    if not low <= number <= high:
        raise InputError(f"{call}: {name} {number} is not within {low} to {high}")
    return number


def as_range(
    call: str, address: SupportsIndex, length: SupportsIndex, *, align: int | None = None
) -> tuple[int, int]:
    """Address and length of a range that is not empty and, with `align`, whose edges are multiples of it."""
    start = as_int(call, "address", address)
    size = as_int(call, "length", length, low=1)
    if start + size > _ADDRESS_END:
        raise InputError(f"{call}: {size} bytes at {start:#x} reach past the end of the address space")
    if align is not None:
        if start % align:
            raise InputError(f"{call}: address {start:#x} is not a multiple of {align}")
        if size % align:
            raise InputError(f"{call}: length {size} is not a multiple of {align}")
    return start, size


def as_fd(call: str, value: SupportsIndex) -> int:
    """`value` as a descriptor number."""
    return as_int(call, "descriptor", value, high=0x7FFFFFFF)


def as_pid(call: str, value: SupportsIndex, *, low: int = 1) -> int:
    """`value` as a process id; 0, where it is allowed, is the caller."""
    return as_int(call, "pid", value, low=low, high=0x7FFFFFFF)


def buffer_of(call: str, data: Any, *, writable: bool) -> Any:
    """`data` as a cffi buffer that keeps it alive; its address and length are those of the memory itself."""
    try:
        return ffi.from_buffer("uint8_t[]", data, require_writable=writable)
    except (TypeError, BufferError, ValueError) as error:
        raise InputError(f"{call}: cannot use a {type(data).__name__} as memory: {error}") from None


def address_of(buffer: Any) -> int:
    """Address of a cffi pointer or buffer."""
    return int(ffi.cast("uintptr_t", buffer))
