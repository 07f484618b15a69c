"""What becomes of memory of this process that is in no region, whoever changes it: :class:`Watch`.

Notifiers of the process hear of it with source KERNEL: of MADV_DONTNEED and its like before (reason REMOVE,
without an end), of munmap and mremap after the fact. Nobody waits for them. More in native/notifier/watch.h.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from types import TracebackType
from typing import Any, SupportsIndex

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.kernel._check import PAGE_SIZE, check
from uspace_mm.notifier.space import as_interval

_HINTS = {
    errno.EINVAL: f"both ends must be multiples of {PAGE_SIZE}, of hugetlb memory of its page",
    errno.EBUSY: "another userfaultfd has it: a pager's region tells by itself, and needs no watch",
    errno.EOPNOTSUPP: "the kernel does not watch this kind of mapping: keep nothing about it",
    errno.ENOMEM: "nothing is mapped there, or no memory",
    errno.ENOENT: "not all of it was added",
    errno.ENOSPC: "too many ranges",
    errno.ESRCH: "a forked child has no watch: make one there",
}


@dataclass(frozen=True)
class WatchStats:
    """Events read by kind; ``bytes`` and ``pieces`` (ranges): what is watched now."""

    removes: int
    unmaps: int
    remaps: int
    bytes: int
    pieces: int


class Watch:
    """A userfaultfd that follows what is mapped in the ranges that were added, and a thread that reads it.

    Memory that moves or grows (mremap) stays watched. What watching does to memory, and which changes it does
    not see (mprotect, swapping, migration), is in native/notifier/watch.h. A forked child has none.
    Raises UnsupportedError where the kernel has no userfaultfd with write protection and events.
    """

    def __init__(self) -> None:
        result = ffi.new("struct umm_watch **")
        error = lib.umm_watch_create(lib.umm_space_self(), result)
        if error in (-errno.EOPNOTSUPP, -errno.ENOSYS, -errno.EPERM):
            raise UnsupportedError(
                "watch: this machine has no userfaultfd with write protection and events (Linux 5.7; "
                "on arm64 6.10), or forbids it; see uspace-mm doctor"
            )
        check(error, "umm_watch_create")
        self._handle: Any = result[0]

    @property
    def handle(self) -> Any:
        """The ``struct umm_watch *`` for native code."""
        if not self._handle:
            raise InputError("this watch is closed")
        return self._handle

    def add(self, start: Any, end: SupportsIndex | None = None) -> None:
        """Watch what is mapped in [start, end) now, whole pages; memory as in :func:`register`. Each add has
        its :meth:`remove`, also where the memory went meanwhile; ranges may overlap.

        KernelError with EBUSY: another userfaultfd's; with EOPNOTSUPP: a kind of mapping that the kernel does
        not watch, of which one can keep nothing.
        """
        low, high = as_interval(start, end)
        check(
            lib.umm_watch_add(self.handle, low, high), "watch", address=low, length=high - low, hints=_HINTS
        )

    def remove(self, start: Any, end: SupportsIndex | None = None) -> None:
        """Undo one :meth:`add` of all of [start, end). KernelError with ENOENT: it was not added."""
        low, high = as_interval(start, end)
        error = lib.umm_watch_remove(self.handle, low, high)
        check(error, "unwatch", address=low, length=high - low, hints=_HINTS)

    @property
    def changing(self) -> bool:
        """Whether a change of watched memory, anywhere, has begun and may not have been read yet.

        To be asked before what is known about an address that was just mapped is used: another thread's
        munmap may have made room for it and not have returned.
        """
        return bool(check(lib.umm_watch_changing(self.handle), "umm_watch_changing", hints=_HINTS))

    def stats(self) -> WatchStats:
        result = ffi.new("struct umm_watch_stats *")
        lib.umm_watch_stats(self.handle, result)
        return WatchStats(result.removes, result.unmaps, result.remaps, result.bytes, result.pieces)

    def close(self) -> None:
        """Watch nothing any more; changes under way may not be told. Harmless when done already."""
        if self._handle:
            check(
                lib.umm_watch_destroy(self._handle),
                "umm_watch_destroy",
                hints={errno.EDEADLK: "not from a callback of a change that the watch tells"},
            )
            self._handle = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
