"""Making memory huge, whatever the settings of the machine are, and a lock for those settings."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from uspace_mm.errors import KernelError
from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.kernel.transparent_hugepage import ROOT

# Kernels with pages of 64 KiB have huge pages of 512 MiB.
HUGE_LIMIT = 64 << 20


def collapse(address: int, length: int) -> None:
    """MADV_COLLAPSE until it is done: EAGAIN while the pages are on their way to the LRU."""
    for attempt in range(20):
        try:
            madvise(address, length, Advice.COLLAPSE)
        except KernelError as error:
            if error.errno != errno.EAGAIN or attempt == 19:
                raise
        else:
            return


@contextmanager
def settings_lock() -> Iterator[None]:
    """One test at a time changes or compares the machine's settings, also among several runs."""
    fd = os.open(ROOT, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
