"""The other side: code that changes memory itself tells those who registered."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, SupportsIndex

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError, KernelError
from uspace_mm.notifier.errors import TryAgain
from uspace_mm.notifier.event import Reason, Source
from uspace_mm.notifier.space import as_interval, this_process


class Change:
    """A change under way; ``moved_to`` is set by who moves the memory, and told with the end."""

    moved_to: int | None = None


def _flags(blockable: bool, voluntary: bool) -> int:
    return (lib.UMM_NOTIFY_BLOCKABLE if blockable else 0) | (lib.UMM_NOTIFY_VOLUNTARY if voluntary else 0)


def _reason(reason: Reason) -> int:
    if not isinstance(reason, Reason):
        raise InputError(f"reason {reason!r}: expected a Reason")
    return int(reason)


@contextmanager
def invalidating(
    start: Any,
    end: SupportsIndex | None = None,
    *,
    reason: Reason = Reason.OTHER,
    blockable: bool = True,
    voluntary: bool = False,
) -> Iterator[Change]:
    """Around a change of [start, end), memory as in :func:`register`: start before it, end after it, also
    when the block raises (then with the errno of an OSError, or EIO).

    Raises TryAgain before the block when the change must not be made now: not `blockable` and a subscriber
    would have to wait; or `voluntary` and a subscriber with ``keep`` is late, or a fork is under way.
    """
    low, high = as_interval(start, end)
    native = ffi.new("struct umm_notify_range *")
    flags = _flags(blockable, voluntary)
    error = lib.umm_notify_start(
        native, lib.umm_space_self(), low, high, lib.UMM_SOURCE_USER, _reason(reason), flags
    )
    if error in (-errno.EAGAIN, -errno.EBUSY):
        why = "would have to wait" if error == -errno.EAGAIN else "is late and keeps what it has"
        raise TryAgain(f"change of {low:#x}-{high:#x}: a subscriber {why}; try again later")
    if error:
        raise KernelError("umm_notify_start", error, address=low, length=high - low)
    change = Change()
    failure = 0
    try:
        yield change
    except BaseException as raised:
        failure = (raised.errno if isinstance(raised, OSError) else None) or errno.EIO
        raise
    finally:
        if change.moved_to is not None:
            native.event.to = change.moved_to
        lib.umm_notify_end(native, -failure)


def invalidate_page(start: Any, end: SupportsIndex | None = None, *, reason: Reason = Reason.OTHER) -> None:
    """One unit has gone already; returns when everybody has let go of it, or was too late."""
    low, high = as_interval(start, end)
    flags = _flags(True, False)
    lib.umm_notify_page(lib.umm_space_self(), low, high, Source.USER, _reason(reason), flags)


def changed(start: Any, end: SupportsIndex | None = None, *, reason: Reason = Reason.BACKING) -> None:
    """The addresses have other pages with the same content."""
    low, high = as_interval(start, end)
    flags = _flags(True, False)
    lib.umm_notify_change(lib.umm_space_self(), low, high, Source.USER, _reason(reason), flags)


def young(start: Any, end: SupportsIndex | None = None) -> tuple[bool, int]:
    """Whether a subscriber used the range since this was last asked, and how many answered."""
    low, high = as_interval(start, end)
    answered = ffi.new("uint64_t *")
    used = lib.umm_notify_age(this_process().handle, low, high, Source.USER, answered)
    return bool(used), int(answered[0])


def in_callback() -> bool:
    """Whether this thread is in a callback: who changes memory may be waiting for it."""
    return bool(lib.umm_notify_in_callback())
