"""/sys/kernel/mm/page_idle/bitmap (CONFIG_IDLE_PAGE_TRACKING): which page frames were not used since they
were marked. Source: Documentation/admin-guide/mm/idle_page_tracking.rst.

Only pages of user memory on an LRU list can be marked, of a huge page the first one; others read as not idle.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from uspace_mm.errors import KernelError, UnsupportedError

BITMAP = Path("/sys/kernel/mm/page_idle/bitmap")
_BITS = np.uint64(64)  # of a word, the least that is read or written
_WORD = 8


class PageIdle:
    """The bitmap, open. A context manager.

    Raises UnsupportedError where the kernel lacks it, or the rights (root's) are lacking.
    """

    def __init__(self, path: Path = BITMAP) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UnsupportedError(f"no {path}: this kernel lacks CONFIG_IDLE_PAGE_TRACKING") from None
        except PermissionError:
            raise UnsupportedError(f"{path}: needs root") from None

    def mark(self, frames: NDArray[np.uint64]) -> None:
        """Mark page frames idle. Raises KernelError."""
        words, bits = frames // _BITS, np.uint64(1) << (frames % _BITS)
        for word in np.unique(words):
            chosen = np.bitwise_or.reduce(bits[words == word])
            try:
                done = os.pwrite(self._fd, chosen.tobytes(), int(word) * _WORD)
            except OSError as error:
                raise KernelError("write(page_idle)", error.errno or errno.EIO) from None
            if done != _WORD:
                raise KernelError("write(page_idle)", errno.ENXIO, hint="a frame past the end of memory")

    def idle(self, frames: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which frames are still marked, shape (frames,): the kernel asks the page tables that map them."""
        unique, back = np.unique(frames // _BITS, return_inverse=True)
        words = np.empty(len(unique), np.uint64)
        for place, word in enumerate(unique):
            try:
                data = os.pread(self._fd, _WORD, int(word) * _WORD)
            except OSError as error:
                raise KernelError("read(page_idle)", error.errno or errno.EIO) from None
            if len(data) != _WORD:
                raise KernelError("read(page_idle)", errno.ENXIO, hint="a frame past the end of memory")
            words[place] = np.frombuffer(data, np.uint64)[0]
        result: NDArray[np.bool_] = (words[back] >> (frames % _BITS) & np.uint64(1)) != 0
        return result

    def close(self) -> None:
        """Close; harmless when closed already."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
