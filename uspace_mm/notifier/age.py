"""Was memory used since it was last asked? :class:`Ages` says, and by which evidence.

=============  =====================================================================================
evidence       how it is had
=============  =====================================================================================
writes         own memory: UFFD_FEATURE_WP_ASYNC and PAGEMAP_SCAN (Linux 6.7), page by page
pages          reads and writes, page by page: idle page tracking, as root (CONFIG_IDLE_PAGE_TRACKING)
samples        reads and writes, sampled by DAMON, as root (CONFIG_DAMON_VADDR, CONFIG_DAMON_SYSFS)
touches        reads and writes: accessed bits, /proc/PID/clear_refs and smaps, mapping by mapping
refaults       a pager's region: faults that it served, for the region as a whole
subscribers    the young bits of whoever registered, :func:`young`
=============  =====================================================================================

"Used" is certain. "Not used" is certain for writes only: a read of a present page leaves its trace in the
accessed bit alone (which the second to fourth look at), and not even there while a CPU still holds the
translation. Pages that idle page tracking cannot mark (huge ones but their first, those not on an LRU list
yet) are not counted there. DAMON looks at one page of each of its regions every 10 ms; ranges up to 512 pages
are split into regions of single pages, step by step. It marks pages as idle itself and so disturbs idle page
tracking: here it is used where the latter is missing, or when asked for. The machine has one set of kdamonds;
while somebody uses DAMON, another of these objects included, it counts as taken. A page that was used before
the watching began may be seen late, once, when it comes onto an LRU list.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import Any, Self, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from uspace_mm.errors import InputError, UspaceError
from uspace_mm.kernel.page_idle import PageIdle
from uspace_mm.kernel.pagemap import PFN_MASK, Category, Pagemap, PagemapBit, ScanFlag, has_bits
from uspace_mm.kernel.proc import clear_referenced, page_size, smaps
from uspace_mm.kernel.userfaultfd import Feature, RegisterMode, Userfaultfd, UserfaultfdBuilder
from uspace_mm.notifier import _life
from uspace_mm.notifier._damon import Damon, Sampled
from uspace_mm.notifier.event import ADDRESS_END
from uspace_mm.notifier.process import Process
from uspace_mm.notifier.space import Space, as_interval, as_space
from uspace_mm.notifier.telling import young

# A word of the bitmap is read for each 64 frames or fewer, and frames are scattered.
_PAGES_MOST_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Evidence:
    """Whether a kind of use is seen here, and how, or why not."""

    name: str
    seen: bool
    how: str


@dataclass(frozen=True, slots=True)
class Age:
    """What was seen since the last time; None: cannot be seen (:attr:`Ages.evidence` says why).

    ``written_bytes``: bytes of pages written. ``used_bytes``: of pages read or written. ``touched``: one of
    the mappings that the range is part of.
    ``refaults``: faults served. ``subscribers``: one of them used it.
    ``sampled``: DAMON saw use since the last time. ``sampled_bytes``: of regions that it saw in use last.
    """

    written_bytes: int | None
    used_bytes: int | None
    touched: bool | None
    refaults: int | None
    subscribers: bool | None
    sampled: bool | None = None
    sampled_bytes: int | None = None

    @property
    def referenced(self) -> bool:
        """Whether any evidence says so."""
        signs = (self.written_bytes, self.used_bytes, self.touched, self.refaults, self.subscribers)
        return any(signs) or bool(self.sampled)


class Ages:
    """Watches the use of [start, end), memory as in :func:`register`, from now on; a context manager.

    `space`: another process (then without writes of their own kind). `touches` False leaves the accessed bits
    alone, which are the whole process's and which reclaim looks at, too. `damon` True: DAMON in place of idle
    page tracking; None: where that is missing; False: never. Its looks take up to half a second. Several
    objects do not disturb each other, unless `damon` differs; who else writes clear_refs or uses DAMON does.
    Raises InputError for a range that is empty or all memory.
    """

    def __init__(
        self,
        start: Any,
        end: SupportsIndex | None = None,
        *,
        space: Space | None = None,
        touches: bool = True,
        damon: bool | None = None,
    ) -> None:
        low, high = as_interval(start, end)
        if high == ADDRESS_END:
            raise InputError("Ages: give the end of the range, too")
        self._own = not isinstance(as_space(space), Process)
        self._pid = 0 if self._own else as_space(space).pid
        self._low, self._high = low, high
        self._writes: _Writes | None = None
        self._touches: _Touches | None = None
        self._region = start if hasattr(start, "stats") else None
        self._closed = False
        self._pages: _Pages | None = None
        self._damon: Damon | None = None
        writes, pages = self._watch_writes(), self._watch_pages(not damon)
        refaults = "a pager's region" if self._region is not None else "not a pager's region"
        self.evidence: tuple[Evidence, ...] = (
            Evidence("writes", self._writes is not None, writes),
            Evidence("pages", self._pages is not None, pages),
            self._watch_samples(damon),
            self._watch_touches(touches),
            Evidence("refaults", self._region is not None, refaults),
            Evidence(
                "subscribers", self._own, "their answers" if self._own else "they know this process only"
            ),
        )
        self._faults = self._count_faults()
        try:
            self.look()  # what happened before counts for nothing
        except BaseException:
            self.close()
            raise

    def _watch_writes(self) -> str:
        if not self._own:
            return "memory of another process: soft-dirty bits would be needed"
        try:
            self._writes = _Writes(self._low, self._high)
        except UspaceError as error:
            return str(error)
        return "UFFD_FEATURE_WP_ASYNC and PAGEMAP_SCAN"

    def _watch_pages(self, wanted: bool) -> str:
        if not wanted:
            return "DAMON is wanted in its place"
        if self._high - self._low > _PAGES_MOST_BYTES:
            return f"a range above {_PAGES_MOST_BYTES >> 30} GiB"
        try:
            self._pages = _Pages(self._pid, self._low, self._high)
        except UspaceError as error:
            return str(error)
        return "idle page tracking (/sys/kernel/mm/page_idle)"

    def _watch_samples(self, wanted: bool | None) -> Evidence:
        if wanted is False or (wanted is None and self._pages is not None):
            return Evidence(
                "samples", False, "not wanted" if wanted is False else "idle page tracking is better"
            )
        start, length = _whole_pages(self._low, self._high)
        try:
            self._damon = Damon(self._pid or os.getpid(), start, start + length)
        except UspaceError as error:
            return Evidence("samples", False, str(error))
        return Evidence("samples", True, "DAMON (/sys/kernel/mm/damon/admin)")

    def _watch_touches(self, wanted: bool) -> Evidence:
        if not wanted:
            return Evidence("touches", False, "not wanted")
        try:
            self._touches = _Touches.join(self._pid, self)
        except UspaceError as error:
            return Evidence("touches", False, str(error))
        return Evidence(
            "touches", True, "accessed bits of the mappings that it is part of (clear_refs, smaps)"
        )

    def _count_faults(self) -> int:
        if self._region is None:
            return 0
        return int(self._region.stats().counters.faults)

    def look(self) -> Age:
        """What was seen since the last call. Raises KernelError when a process has gone."""
        if self._closed:
            raise InputError("these Ages are closed")
        before, self._faults = self._faults, self._count_faults()
        used, answered = young(self._low, self._high) if self._own else (False, 0)
        sampled = Sampled(None, None) if self._damon is None else self._damon.take()
        return Age(
            written_bytes=None if self._writes is None else self._writes.take(),
            used_bytes=None if self._pages is None else self._pages.take(),
            touched=None if self._touches is None else self._touches.take(self),
            refaults=None if self._region is None else self._faults - before,
            subscribers=used if answered else None,
            sampled=sampled.used,
            sampled_bytes=sampled.last_bytes,
        )

    def close(self) -> None:
        """Ends the watching. Harmless when closed already."""
        self._closed = True
        if self._writes is not None:
            self._writes.close()
        if self._pages is not None:
            self._pages.close()
        if self._touches is not None:
            self._touches.leave(self)
            self._touches = None
        if self._damon is not None:
            self._damon.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _whole_pages(low: int, high: int) -> tuple[int, int]:
    """Address and length of the pages that [low, high) touches."""
    size = page_size()
    start = low // size * size
    return start, -(-high // size) * size - start


class _Pages:
    """Frames of a range that idle page tracking marked, page by page."""

    def __init__(self, pid: int, low: int, high: int) -> None:
        self._start, self._length = _whole_pages(low, high)
        self._idle = PageIdle()
        try:
            self._pagemap = Pagemap(pid)
        except BaseException:
            self._idle.close()
            raise
        self._frames = self._marked = self._look()

    def _look(self) -> NDArray[np.uint64]:
        """The frame of each page of the range, 0 where none is present."""
        entries = self._pagemap.entries(self._start, self._length)
        present = has_bits(entries, PagemapBit.PRESENT)
        return np.where(present, entries & np.uint64(PFN_MASK), np.uint64(0))

    def take(self) -> int:
        now = self._look()
        # Another frame than before, or one where there was none: somebody touched the page.
        used = (now != self._frames) & (now != 0)
        marked = np.flatnonzero((self._marked != 0) & (self._marked == now))
        used[marked] = ~self._idle.idle(now[marked])
        there = np.flatnonzero(now)
        self._idle.mark(now[there])
        self._frames, self._marked = now, np.zeros_like(now)
        held = there[self._idle.idle(now[there])]
        self._marked[held] = now[held]
        return int(used.sum()) * page_size()

    def close(self) -> None:
        self._idle.close()
        self._pagemap.close()


class _Writes:
    """Pages of our own that were written, found and protected again in one step."""

    def __init__(self, low: int, high: int) -> None:
        self._start, self._length = _whole_pages(low, high)
        wanted = Feature.WP_ASYNC | Feature.WP_UNPOPULATED
        self._uffd: Userfaultfd = UserfaultfdBuilder().require(wanted).open()
        try:
            self._uffd.register(self._start, self._length, RegisterMode.WP)
            self._pagemap = Pagemap()
        except BaseException:
            self._uffd.close()
            raise

    def take(self) -> int:
        found = self._pagemap.scan(
            self._start,
            self._length,
            all_of=Category.WRITTEN | Category.PRESENT,
            flags=ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC,
        )
        return found.total_bytes

    def close(self) -> None:
        self._uffd.close()
        self._pagemap.close()


class _Touches:
    """The accessed bits of a process, which can only be cleared for all of it: shared by who watches it."""

    _all: weakref.WeakValueDictionary[int, _Touches] = weakref.WeakValueDictionary()

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seen: weakref.WeakKeyDictionary[Ages, bool] = weakref.WeakKeyDictionary()
        self._collect()

    @classmethod
    def join(cls, pid: int, ages: Ages) -> _Touches:
        with _life.lock:
            shared = cls._all.get(pid) or cls(pid)
            cls._all[pid] = shared
            shared._seen[ages] = False
            return shared

    def leave(self, ages: Ages) -> None:
        with _life.lock:
            self._seen.pop(ages, None)

    def _collect(self) -> None:
        used = [(area.start, area.end) for area in smaps(self._pid) if area.referenced_bytes]
        clear_referenced(self._pid)
        for ages in list(self._seen):
            if any(start < ages._high and ages._low < end for start, end in used):
                self._seen[ages] = True

    def take(self, ages: Ages) -> bool:
        with _life.lock:
            self._collect()
            seen = self._seen[ages]
            self._seen[ages] = False
            return seen
