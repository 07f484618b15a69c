"""Making memory huge, whatever the settings of the machine are, and a lock for those settings."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from uspace_mm.errors import KernelError
from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.kernel.proc import pmd_size
from uspace_mm.kernel.transparent_hugepage import ROOT
from uspace_mm.sizes import format_size

# Of larger blocks a machine without much memory has few.
LARGE = 64 << 20


def huge_page_size() -> int:
    """Bytes of a huge page; skips where the machine has none, or no room for four (a test may need them)."""
    size = pmd_size()
    if size is None:
        pytest.skip("lacks: transparent huge pages")
    if psutil.virtual_memory().available < 4 * size:
        pytest.skip(f"lacks: free memory for huge pages of {format_size(size)}")
    make_blocks(size)
    return size


def make_blocks(size: int) -> None:
    """Let the kernel put free memory together: a small guest has no block of 512 MiB after many tests."""
    if size > LARGE:
        for setting in ("drop_caches", "compact_memory"):
            with suppress(OSError):  # root's
                (Path("/proc/sys/vm") / setting).write_text("1")


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
