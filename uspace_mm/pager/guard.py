"""Turning the SIGBUS of a lost page into an exception."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from uspace_mm._native import ffi, lib
from uspace_mm.errors import KernelError
from uspace_mm.pager.errors import PageLost

FILL_BYTE = 0xBD
"""What a lost page reads as inside a guard."""


@contextmanager
def guard() -> Iterator[None]:
    """Inside the block, an access of this thread to a lost unit completes on bytes of 0xBD.

    No library is unwound in the middle: the access goes on, and the end of the block raises
    :class:`PageLost` and poisons the unit again. Other threads may see the fill meanwhile. Without a guard
    the access is a SIGBUS. Guards nest; the outermost one raises. It holds for the calling thread.
    """
    error = lib.umm_guard_enter()
    if error:
        raise KernelError("sigaction(SIGBUS)", error)
    lost = ffi.new("struct umm_lost *")
    try:
        yield
    finally:
        error = lib.umm_guard_leave(lost)
    if lost.units:
        raise PageLost(lost.address, lost.offset, lost.units, lost.error)
    if error:
        raise KernelError("poison a lost page again", error)
