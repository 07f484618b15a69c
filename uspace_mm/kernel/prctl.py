"""prctl(2): transparent huge pages for this process as a whole, and access to its /proc files."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from uspace_mm._native import lib
from uspace_mm.errors import InputError
from uspace_mm.kernel._check import check


class ThpMode(IntEnum):
    """PR_SET_THP_DISABLE: huge pages as configured, none at all, or (Linux 6.18) only where madvise asks."""

    ALLOWED = lib.UMM_THP_ALLOWED
    DISABLED = lib.UMM_THP_DISABLED
    EXCEPT_ADVISED = lib.UMM_THP_EXCEPT_ADVISED


def thp_mode() -> ThpMode:
    """The mode of this process."""
    return ThpMode(check(lib.umm_thp_disable_get(), "prctl(PR_GET_THP_DISABLE)"))


def set_thp_mode(mode: ThpMode) -> None:
    """Set the mode of this process; children and executed programs inherit it."""
    try:
        known = ThpMode(mode)
    except ValueError:
        raise InputError(f"prctl(PR_SET_THP_DISABLE): {mode!r} is not a ThpMode") from None
    hints = {errno.EINVAL: "EXCEPT_ADVISED needs Linux 6.18"} if known is ThpMode.EXCEPT_ADVISED else {}
    check(lib.umm_thp_disable_set(known), f"prctl(PR_SET_THP_DISABLE, {known.name})", hints=hints)


@contextmanager
def thp_mode_changed(mode: ThpMode) -> Iterator[None]:
    """`mode` within the ``with`` block, the former one after it."""
    before = thp_mode()
    set_thp_mode(mode)
    try:
        yield
    finally:
        set_thp_mode(before)


def dumpable() -> bool:
    """Whether /proc/self belongs to this user; a change of user id turns it off (hiding its pagemap)."""
    return check(lib.umm_dumpable_get(), "prctl(PR_GET_DUMPABLE)") == 1


def set_dumpable(value: bool) -> None:
    """See :func:`dumpable`."""
    check(lib.umm_dumpable_set(bool(value)), "prctl(PR_SET_DUMPABLE)")
