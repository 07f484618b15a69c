"""The vocabulary of userfaultfd(2): feature, mode and ioctl bits, outcomes and events.

Use it through :mod:`uspace_mm.kernel.userfaultfd`, which has all of these names.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

from uspace_mm._native import lib
from uspace_mm.errors import KernelError, UnsupportedError


class Feature(IntFlag):
    """UFFD_FEATURE_*; what each is for is in :mod:`uspace_mm.kernel.features`."""

    PAGEFAULT_FLAG_WP = lib.UMM_UFFD_FEATURE_PAGEFAULT_FLAG_WP
    EVENT_FORK = lib.UMM_UFFD_FEATURE_EVENT_FORK
    EVENT_REMAP = lib.UMM_UFFD_FEATURE_EVENT_REMAP
    EVENT_REMOVE = lib.UMM_UFFD_FEATURE_EVENT_REMOVE
    MISSING_HUGETLBFS = lib.UMM_UFFD_FEATURE_MISSING_HUGETLBFS
    MISSING_SHMEM = lib.UMM_UFFD_FEATURE_MISSING_SHMEM
    EVENT_UNMAP = lib.UMM_UFFD_FEATURE_EVENT_UNMAP
    SIGBUS = lib.UMM_UFFD_FEATURE_SIGBUS
    THREAD_ID = lib.UMM_UFFD_FEATURE_THREAD_ID
    MINOR_HUGETLBFS = lib.UMM_UFFD_FEATURE_MINOR_HUGETLBFS
    MINOR_SHMEM = lib.UMM_UFFD_FEATURE_MINOR_SHMEM
    EXACT_ADDRESS = lib.UMM_UFFD_FEATURE_EXACT_ADDRESS
    WP_HUGETLBFS_SHMEM = lib.UMM_UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    WP_UNPOPULATED = lib.UMM_UFFD_FEATURE_WP_UNPOPULATED
    POISON = lib.UMM_UFFD_FEATURE_POISON
    WP_ASYNC = lib.UMM_UFFD_FEATURE_WP_ASYNC
    MOVE = lib.UMM_UFFD_FEATURE_MOVE


class RegisterMode(IntFlag):
    """UFFDIO_REGISTER_MODE_*: which faults are reported."""

    MISSING = lib.UMM_UFFD_MODE_MISSING
    WP = lib.UMM_UFFD_MODE_WP
    MINOR = lib.UMM_UFFD_MODE_MINOR


class Ioctl(IntFlag):
    """The bits in which UFFDIO_API and UFFDIO_REGISTER answer which ioctls work."""

    REGISTER = 1 << 0x00
    UNREGISTER = 1 << 0x01
    WAKE = 1 << 0x02
    COPY = 1 << 0x03
    ZEROPAGE = 1 << 0x04
    MOVE = 1 << 0x05
    WRITEPROTECT = 1 << 0x06
    CONTINUE = 1 << 0x07
    POISON = 1 << 0x08
    API = 1 << 0x3F


class Source(IntEnum):
    """How the descriptor is had. USER_MODE serves no faults taken inside the kernel: system calls that
    touch a missing page fail with EFAULT."""

    SYSCALL = lib.UMM_UFFD_SOURCE_SYSCALL
    DEVICE = lib.UMM_UFFD_SOURCE_DEVICE
    USER_MODE = lib.UMM_UFFD_SOURCE_USER_MODE
    ANY = lib.UMM_UFFD_SOURCE_ANY


class OutcomeKind(IntEnum):
    """What a resolving ioctl says."""

    INSTALLED = lib.UMM_OUTCOME_INSTALLED
    ALREADY_THERE = lib.UMM_OUTCOME_ALREADY_THERE
    DEFERRED = lib.UMM_OUTCOME_DEFERRED
    GONE = lib.UMM_OUTCOME_GONE
    NO_MEMORY = lib.UMM_OUTCOME_NO_MEMORY
    BUSY = lib.UMM_OUTCOME_BUSY
    PARTIAL = lib.UMM_OUTCOME_PARTIAL
    FAILED = lib.UMM_OUTCOME_FAILED


_ADVICE = {
    OutcomeKind.ALREADY_THERE: "ask pagemap: present means done (wake), else COPY over the marker or poison",
    OutcomeKind.DEFERRED: "read and apply the events that are waiting, yield, then try again",
    OutcomeKind.GONE: "the range is not registered (MOVE: or the source has a hole), or the process has gone",
    OutcomeKind.NO_MEMORY: "free memory (hugetlb: enlarge the pool) and try again",
    OutcomeKind.BUSY: "the page is pinned or shared after a fork: copy it instead",
    OutcomeKind.PARTIAL: "go on after the bytes that are done",
    OutcomeKind.FAILED: "check alignment, length, registration and mode against ioctl_userfaultfd(2)",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of COPY, ZEROPAGE, MOVE, CONTINUE, POISON or WRITEPROTECT.

    ``done`` is in bytes and never negative; ``error`` is a positive errno, 0 when installed.
    """

    kind: OutcomeKind
    done: int
    error: int
    call: str
    address: int
    length: int

    @property
    def ok(self) -> bool:
        """All of the range was resolved by this call."""
        return self.kind is OutcomeKind.INSTALLED

    def require(self) -> Outcome:
        """Itself when ``ok``; raises KernelError otherwise."""
        if self.ok:
            return self
        hint = f"{self.kind.name.lower().replace('_', ' ')} after {self.done} bytes: {_ADVICE[self.kind]}"
        raise KernelError(self.call, self.error, address=self.address, length=self.length, hint=hint)


class FaultFlag(IntFlag):
    """UFFD_PAGEFAULT_FLAG_*; none set: a read of a missing page."""

    WRITE = lib.UMM_UFFD_FAULT_WRITE
    WP = lib.UMM_UFFD_FAULT_WP
    MINOR = lib.UMM_UFFD_FAULT_MINOR


@dataclass(frozen=True, slots=True)
class PageFault:
    """A thread waits for a page. ``address`` is rounded down to the page unless EXACT_ADDRESS was granted;
    ``thread_id`` is 0 without THREAD_ID."""

    address: int
    flags: FaultFlag
    thread_id: int


@dataclass(frozen=True, slots=True)
class Fork:
    """The process forked. ``uffd``, the descriptor of the child's memory, is the reader's to close."""

    uffd: int


@dataclass(frozen=True, slots=True)
class Remap:
    """mremap(2) moved registered memory: ``length`` bytes at ``old`` are now at ``new``.

    With EVENT_UNMAP an :class:`Unmap` of the old range follows, and mremap waits for that one too.
    """

    old: int
    new: int
    length: int


@dataclass(frozen=True, slots=True)
class Remove:
    """Pages in [start, end) are about to be dropped (MADV_DONTNEED, FREE, REMOVE): they read as zero next."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """[start, end) was unmapped; its addresses may already be in use again."""

    start: int
    end: int


class EventKind(IntEnum):
    """UFFD_EVENT_*, the first byte of a message."""

    PAGEFAULT = lib.UMM_UFFD_EVENT_PAGEFAULT
    FORK = lib.UMM_UFFD_EVENT_FORK
    REMAP = lib.UMM_UFFD_EVENT_REMAP
    REMOVE = lib.UMM_UFFD_EVENT_REMOVE
    UNMAP = lib.UMM_UFFD_EVENT_UNMAP


Event = PageFault | Fork | Remap | Remove | Unmap


def decode_event(kind: int, arg0: int, arg1: int, arg2: int) -> Event:
    """The event in the fields of ``struct uffd_msg``."""
    if kind == EventKind.PAGEFAULT:
        return PageFault(address=arg1, flags=FaultFlag(arg0), thread_id=arg2 & 0xFFFFFFFF)
    if kind == EventKind.FORK:
        return Fork(uffd=arg0 & 0xFFFFFFFF)
    if kind == EventKind.REMAP:
        return Remap(old=arg0, new=arg1, length=arg2)
    if kind == EventKind.REMOVE:
        return Remove(start=arg0, end=arg1)
    if kind == EventKind.UNMAP:
        return Unmap(start=arg0, end=arg1)
    raise UnsupportedError(f"userfaultfd event {kind:#x} is newer than this program; update uspace_mm")
