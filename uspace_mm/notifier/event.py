"""What a notifier is told: :class:`Event`, and the words in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from uspace_mm._native import ffi, lib
from uspace_mm.sizes import format_size

if TYPE_CHECKING:
    from uspace_mm.notifier.registration import Registration

ADDRESS_END = (1 << 64) - 1


class Source(IntEnum):
    """Who saw it, and therefore what it may promise (:class:`Promise`)."""

    PAGER = lib.UMM_SOURCE_PAGER
    """Our pager does it: eviction, a region closed, a page poisoned. ORDERED."""
    CALL = lib.UMM_SOURCE_CALL
    """A call made through us: mmap, munmap, mremap, madvise, mprotect. ORDERED."""
    PRELOAD = lib.UMM_SOURCE_PRELOAD
    """The same calls of code that does not know us, caught by the preloaded library. ORDERED."""
    KERNEL = lib.UMM_SOURCE_KERNEL
    """An event of a userfaultfd: REMOVE comes BEFORE without an end, UNMAP and REMAP come AFTER."""
    SAMPLE = lib.UMM_SOURCE_SAMPLE
    """/proc/PID/maps and pagemap, looked at from time to time. SAMPLED."""
    PIDFD = lib.UMM_SOURCE_PIDFD
    """A pidfd: another process ended. Exactly once, AFTER."""
    POSTCOPY = lib.UMM_SOURCE_POSTCOPY
    """Postcopy: the memory lives on the other side from now on. ORDERED."""
    POOL = lib.UMM_SOURCE_POOL
    """The compressed pool: compaction and migration. ORDERED."""
    PROCESS = lib.UMM_SOURCE_PROCESS
    """This process itself: fork, exec, exit. ORDERED."""
    USER = lib.UMM_SOURCE_USER
    """Code of the user's, by :func:`invalidating` and its like. ORDERED."""
    LIBRARY = lib.UMM_SOURCE_LIBRARY
    """This library about itself: a registration ended, events were lost."""


class Reason(IntEnum):
    """What happens to the memory."""

    EVICT = lib.UMM_REASON_EVICT
    """Its pages leave; the content stays, elsewhere, and comes back when it is touched."""
    UNMAP = lib.UMM_REASON_UNMAP
    """munmap, MAP_FIXED over it, or a region is closed."""
    MOVE = lib.UMM_REASON_MOVE
    """mremap: the pages go to ``to``."""
    REMOVE = lib.UMM_REASON_REMOVE
    """MADV_DONTNEED, MADV_FREE, MADV_REMOVE, a hole in the file: the content goes."""
    POISON = lib.UMM_REASON_POISON
    """An access is SIGBUS from now on."""
    BACKING = lib.UMM_REASON_BACKING
    """Other pages with the same content: MADV_COLLAPSE, migration, compaction."""
    PROTECT = lib.UMM_REASON_PROTECT
    """Write-protected, or other permissions: mprotect, fork's copy on write."""
    SWITCH = lib.UMM_REASON_SWITCH
    """Postcopy: the memory lives on another machine now."""
    FORK = lib.UMM_REASON_FORK
    EXEC = lib.UMM_REASON_EXEC
    EXIT = lib.UMM_REASON_EXIT
    MAP = lib.UMM_REASON_MAP
    """Sampled: a mapping appeared."""
    PRESENCE = lib.UMM_REASON_PRESENCE
    """Sampled: pages came or went."""
    UNREGISTER = lib.UMM_REASON_UNREGISTER
    """The registration ends, not the memory."""
    LOST = lib.UMM_REASON_LOST
    """Events of this range were lost (queue full, an answer too late): assume that anything happened."""
    OTHER = lib.UMM_REASON_OTHER


class Promise(IntEnum):
    """What the source promises about the moment of the event."""

    ORDERED = lib.UMM_PROMISE_ORDERED
    """The start is told before anything changes, the end after all of it."""
    BEFORE = lib.UMM_PROMISE_BEFORE
    """Told before the change, whose end nobody sees; start and end come together."""
    AFTER = lib.UMM_PROMISE_AFTER
    """Told after the change; start and end come together."""
    SAMPLED = lib.UMM_PROMISE_SAMPLED
    """Some time after; what came and went between two samples was not seen."""


class Kind(IntEnum):
    """Which method of a :class:`Notifier` gets the event."""

    START = lib.UMM_NOTIFY_START
    """:meth:`Notifier.invalidate_range_start`"""
    END = lib.UMM_NOTIFY_END
    """:meth:`Notifier.invalidate_range_end`, with the ``id`` of its start"""
    PAGE = lib.UMM_NOTIFY_PAGE
    """:meth:`Notifier.invalidate_page`"""
    CHANGE = lib.UMM_NOTIFY_CHANGE
    """:meth:`Notifier.change`"""
    AGE = lib.UMM_NOTIFY_AGE
    """:meth:`Notifier.age`"""
    RELEASE = lib.UMM_NOTIFY_RELEASE
    """:meth:`Notifier.release`"""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happens to the addresses [start, end) of an address space.

    ``to``: with MOVE (in the end event), where ``start`` is now. ``id``: of the change; its start and its end
    have the same. ``generation``: of the address space when this was seen; grows with every change.
    ``error``: in an end event, the errno with which the change failed, else 0. ``blockable``: who changes
    the memory can wait. ``voluntary``: it can do without the change. ``pid``: of the address space.
    ``registration``: whose interval the range touches (of a stream: None).
    """

    kind: Kind
    start: int
    end: int
    to: int | None
    id: int
    generation: int
    error: int
    source: Source
    reason: Reason
    promise: Promise
    blockable: bool
    voluntary: bool
    pid: int
    registration: Registration | None = field(default=None, repr=False, compare=False)

    @property
    def ordered(self) -> bool:
        """Whether the start comes before anything changes and the end after all of it."""
        return self.promise is Promise.ORDERED

    @property
    def length(self) -> int:
        """Bytes of the range."""
        return self.end - self.start

    @property
    def everything(self) -> bool:
        """Whether the range is the whole address space."""
        return self.start == 0 and self.end == ADDRESS_END

    def to_dict(self) -> dict[str, Any]:
        """For JSON: enums by their names in lower case, addresses as numbers."""
        return {
            "kind": self.kind.name.lower(),
            "source": self.source.name.lower(),
            "promise": self.promise.name.lower(),
            "reason": self.reason.name.lower(),
            "start": self.start,
            "end": self.end,
            "to": self.to,
            "id": self.id,
            "generation": self.generation,
            "error": self.error,
            "blockable": self.blockable,
            "voluntary": self.voluntary,
            "pid": self.pid,
        }

    def __str__(self) -> str:
        where = (
            "all of it" if self.everything else f"{self.start:#x}-{self.end:#x} {format_size(self.length)}"
        )
        to = "" if self.to is None else f" to {self.to:#x}"
        return f"{self.kind.name.lower()} {self.reason.name.lower()} {where}{to} of process {self.pid}"


def event_of(native: Any, registration: Registration | None = None) -> Event:
    """The event in a ``struct umm_notify_event``."""
    reason = Reason(native.reason)
    return Event(
        kind=Kind(native.kind),
        start=native.start,
        end=native.end,
        to=native.to if reason is Reason.MOVE and native.to else None,
        id=native.id,
        generation=native.generation,
        error=-native.error,
        source=Source(native.source),
        reason=reason,
        promise=Promise(native.promise),
        blockable=bool(native.flags & lib.UMM_NOTIFY_BLOCKABLE),
        voluntary=bool(native.flags & lib.UMM_NOTIFY_VOLUNTARY),
        pid=native.pid,
        registration=registration,
    )


def new_event() -> Any:
    """Room for a ``struct umm_notify_event``."""
    return ffi.new("struct umm_notify_event *")
