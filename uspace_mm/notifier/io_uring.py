"""Fixed buffers of an io_uring that stay right while their memory changes: :class:`IoUringBuffers`.

A ring pins the pages of its fixed buffers: after MADV_DONTNEED and a refill WRITE_FIXED delivers the old
bytes, and the pager cannot move a pinned page away. Here a slot of the ring is emptied before its memory
changes and registered anew afterwards. More, for users of liburing too, in native/notifier/io_uring.h.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, SupportsIndex

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.kernel._check import as_fd, as_int, as_range, check
from uspace_mm.kernel.io_uring import BUFFER_MAX, SLOTS_MAX
from uspace_mm.notifier._subscriber import NO_LIMIT_NS, as_ns

_HINTS = {
    errno.ENXIO: "the ring has no table of buffers: register_slots (io_uring_register_buffers_sparse) first",
    errno.EINVAL: "no such slot, or it is not in use",
    errno.ENOSPC: "every slot is taken",
    errno.EBUSY: "requests are in flight: done first",
    errno.EFAULT: "the memory is not mapped now, or not writable",
    errno.ENOMEM: "pinned memory is limited by RLIMIT_MEMLOCK (ulimit -l)",
    errno.ETIMEDOUT: "the memory was changing all the time",
    errno.ESRCH: "the address space was released",
    errno.EDEADLK: "not from a callback of a notifier",
    errno.ESHUTDOWN: "the ring's slots are the parent's: a forked child makes a ring of its own",
    errno.EOPNOTSUPP: "not a descriptor of an io_uring",
}


@dataclass(frozen=True)
class Slot:
    """A buffer: bytes [address, address + length). ``generation`` grows with every change of the memory,
    ``requests`` are in flight, ``registered``: the ring has it. ``error``: errno of the last registration, 0
    if it went well, EFAULT when the memory was gone."""

    address: int
    length: int
    generation: int
    requests: int
    registered: bool
    error: int


@dataclass(frozen=True)
class IoUringStats:
    """Counts: updates that pinned a buffer, slots emptied for a change, registrations undone because the
    memory changed meanwhile, and changes that went on with requests in flight."""

    registered: int
    emptied: int
    repeated: int
    kept_pinned: int


class IoUringBuffers:
    """Manages slots `first` to `first + slots - 1` of the ring with this descriptor; it has a table of them.

    ``slot = buffers.add(address, length)``, and for each request ``with buffers.using(slot): ...`` around
    submission and completion. An ordered change of the memory waits up to `wait_s` for requests in flight;
    then an eviction is given up, and other changes happen all the same. `at_use`: an emptied slot is
    registered when it is used next, and not at the end of the change.

    The ring stays the caller's, and open until :meth:`close`. UnsupportedError: a ring with
    IORING_SETUP_SINGLE_ISSUER, whose slots another thread may not update.
    """

    def __init__(
        self, ring_fd: SupportsIndex, *, slots: SupportsIndex, first: SupportsIndex = 0,
        wait_s: float = 0.1, at_use: bool = False, name: str = "io_uring",
    ) -> None:  # fmt: skip
        self._handle: Any = ffi.NULL
        options = ffi.new("struct umm_notify_io_uring_options *")
        text = ffi.new("char[]", name.encode())
        options.name, options.ring_fd = text, as_fd("IoUringBuffers", ring_fd)
        options.first = as_int("IoUringBuffers", "first", first, high=SLOTS_MAX - 1)
        options.slots = as_int("IoUringBuffers", "slots", slots, low=1, high=SLOTS_MAX)
        options.limit_ns, options.at_use = as_ns("wait_s", wait_s, none=0), at_use
        result = ffi.new("struct umm_notify_io_uring **")
        error = lib.umm_notify_io_uring_create(options, result)
        if error == -errno.EEXIST:
            raise UnsupportedError(
                "IoUringBuffers: the ring was set up with IORING_SETUP_SINGLE_ISSUER, so no other "
                "thread can empty a slot in time: set it up without"
            )
        hints = _HINTS | {errno.EINVAL: "the ring's table has fewer slots"}
        check(error, "io_uring_register(BUFFERS_UPDATE)", hints=hints)
        self._handle = result[0]

    @property
    def handle(self) -> Any:
        """The ``struct umm_notify_io_uring *`` for native code."""
        if self._handle == ffi.NULL:
            raise InputError("these buffers are closed")
        return self._handle

    def add(self, address: SupportsIndex, length: SupportsIndex) -> int:
        """Register `length` bytes (at most 1 GiB) at `address`: the number of the slot."""
        start, size = as_range("add", address, as_int("add", "length", length, low=1, high=BUFFER_MAX))
        slot = ffi.new("uint32_t *")
        error = lib.umm_notify_io_uring_add(self.handle, start, size, slot)
        check(error, "add a fixed buffer", address=start, length=size, hints=_HINTS)
        return int(slot[0])

    def remove(self, slot: SupportsIndex) -> None:
        """Give the slot back. KernelError with EBUSY: it is in use."""
        number = as_int("remove", "slot", slot, high=SLOTS_MAX)
        check(lib.umm_notify_io_uring_remove(self.handle, number), f"remove slot {number}", hints=_HINTS)

    def use(self, slot: SupportsIndex, timeout_s: float = 10.0) -> int:
        """Before a request is submitted: the ring has the memory that is there now. Returns the slot's
        generation. KernelError with EFAULT: nothing is mapped there (any more)."""
        number = as_int("use", "slot", slot, high=SLOTS_MAX)
        generation = ffi.new("uint64_t *")
        timeout_ns = as_ns("timeout_s", timeout_s, none=NO_LIMIT_NS)
        error = lib.umm_notify_io_uring_use(self.handle, number, timeout_ns, generation)
        check(error, f"use slot {number}", hints=_HINTS)
        return int(generation[0])

    def done(self, slot: SupportsIndex) -> None:
        """After the completion of the request."""
        number = as_int("done", "slot", slot, high=SLOTS_MAX)
        check(lib.umm_notify_io_uring_done(self.handle, number), f"done with slot {number}", hints=_HINTS)

    @contextmanager
    def using(self, slot: SupportsIndex, timeout_s: float = 10.0) -> Iterator[int]:
        """:meth:`use` and :meth:`done` around the requests of the block."""
        generation = self.use(slot, timeout_s)
        try:
            yield generation
        finally:
            self.done(slot)

    def look(self, slot: SupportsIndex) -> Slot:
        """The state of a slot."""
        number = as_int("look", "slot", slot, high=SLOTS_MAX)
        native = ffi.new("struct umm_notify_io_uring_slot *")
        error = lib.umm_notify_io_uring_look(self.handle, number, native)
        check(error, f"look at slot {number}", hints=_HINTS)
        return Slot(
            native.address,
            native.length,
            native.generation,
            native.requests,
            bool(native.registered),
            -native.error,
        )

    def stats(self) -> IoUringStats:
        """What happened so far."""
        native = ffi.new("struct umm_notify_io_uring_stats *")
        lib.umm_notify_io_uring_stats(self.handle, native)
        return IoUringStats(native.registered, native.emptied, native.repeated, native.kept_pinned)

    def close(self) -> None:
        """Empty the slots; harmless when done already. KernelError with EBUSY: requests are in flight."""
        if self._handle != ffi.NULL:
            check(lib.umm_notify_io_uring_destroy(self._handle), "close fixed buffers", hints=_HINTS)
            self._handle = ffi.NULL

    def __enter__(self) -> IoUringBuffers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
