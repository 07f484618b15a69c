"""Memory that benchmarks read from and write to: filled, warmed, and known to be there."""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from uspace_mm.errors import UnsupportedError
from uspace_mm.sizes import format_size

PAGE_BYTES = os.sysconf("SC_PAGESIZE")
_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it

Words = npt.NDArray[np.uint64]


def private_memory(size: int) -> mmap.mmap:
    """`size` bytes of private anonymous memory, zero (mmap's own default is shared memory)."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def require_memory(size: int) -> None:
    """Raise :class:`UnsupportedError` when less than `size` bytes are available."""
    available = psutil.virtual_memory().available
    if available < size:
        raise UnsupportedError(
            f"memory: this benchmark needs {format_size(size)}, {format_size(available)} are available; "
            "free some, or run it with --quick"
        )


def warm_memory(size: int) -> None:
    """Touch `size` bytes and free them: what a hypervisor has not backed yet is slower the first time.

    To be called right before each measured run: under free page reporting a guest's kernel gives blocks that
    were freed back to the hypervisor after about two seconds.
    """
    require_memory(size)
    with private_memory(size) as area:
        if huge_page_bytes() is not None:
            area.madvise(mmap.MADV_HUGEPAGE)
        area.madvise(_MADV_POPULATE_WRITE)


def numbered_words(size: int) -> Words:
    """`size` bytes of present memory whose words all differ, so that a page in the wrong place shows."""
    words = np.frombuffer(private_memory(size), dtype=np.uint64)
    words[:] = np.arange(1, len(words) + 1, dtype=np.uint64)
    return words


def huge_page_bytes() -> int | None:
    """Size of a transparent huge page, or None when this kernel gives none to madvise(MADV_HUGEPAGE)."""
    settings = Path("/sys/kernel/mm/transparent_hugepage")
    try:
        if "[never]" in (settings / "enabled").read_text():
            return None
        return int((settings / "hpage_pmd_size").read_text())
    except OSError:
        return None


def huge_bytes_in(start: int, end: int) -> int:
    """Bytes of this process between the addresses that are in transparent huge pages (proc_pid_smaps(5)).

    A mapping that reaches out of the range is counted up to what lies inside.
    """
    total = 0
    inside = 0
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            header = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
            if header:
                low, high = int(header[1], 16), int(header[2], 16)
                inside = max(0, min(high, end) - max(low, start))
            elif inside and line.startswith("AnonHugePages:"):
                total += min(inside, int(line.split()[1]) * 1024)
    return total
