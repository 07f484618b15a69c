"""Making memory huge, whatever the settings of the machine are at the moment."""

from __future__ import annotations

import errno

from uspace_mm.errors import KernelError
from uspace_mm.kernel.madvise import Advice, madvise

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
