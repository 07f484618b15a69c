"""Reads of present pages, seen by idle page tracking, which the guests' kernels have."""

from __future__ import annotations

from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.kernel.mapping import Mapping
from uspace_mm.kernel.proc import page_size, pmd_size
from uspace_mm.notifier import Ages

PAGES = 64


def test_reads_are_seen_page_by_page() -> None:
    page = page_size()
    with Mapping(PAGES * page) as memory:
        if pmd_size() is not None:
            madvise(memory.address, memory.length, Advice.NOHUGEPAGE)
        memory.array[:] = 1
        with Ages(memory.address, memory.address + memory.length, touches=False) as ages:
            evidence = {one.name: one for one in ages.evidence}
            assert evidence["pages"].seen, evidence["pages"].how
            # Pages come onto an LRU list in batches, and CPUs hold translations for a while: some are seen.
            for _ in range(50):
                ages.look()
                assert int(memory.array[::page].sum()) == PAGES
                age = ages.look()
                if age.used_bytes == memory.length:
                    break
            assert age.used_bytes
            assert age.referenced
            assert not age.written_bytes
            # And what nobody touches is not.
            assert not ages.look().used_bytes
