"""A registration cache, as RDMA libraries need it: :class:`RegistrationCache`.

Registering memory with a device is dear, so a registration is kept after its use, and dropped before its
memory becomes something else. The cache itself is C; more in native/notifier/cache.h.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Any, Generic, SupportsIndex, TypeVar

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.kernel._check import as_int, as_range, check
from uspace_mm.notifier._subscriber import as_ns

T = TypeVar("T")

_log = logging.getLogger("uspace_mm.notifier")
_ENTRIES_MOST = 1 << 20
# What `enroll` answers when the user's function raised; no error of the cache's own.
_RAISED = errno.ECANCELED


class Follow(IntEnum):
    """Which changes the cache hears of.

    ``KERNEL``: raw system calls, too; memory that cannot be watched (regions of a pager, which have a
    userfaultfd already; see :class:`~uspace_mm.notifier.watch.Watch`) is registered anew every time.
    ``CALLS``: what the pager tells of its regions, calls made through :mod:`uspace_mm.notifier.calls`, and
    what is told with :func:`~uspace_mm.notifier.invalidating`; the caller makes no others.
    """

    KERNEL = lib.UMM_CACHE_FOLLOW_KERNEL
    CALLS = lib.UMM_CACHE_FOLLOW_CALLS


@dataclass(frozen=True)
class CacheStats:
    """Counts since the cache was made.

    ``invalidated``: entries dropped because of a change, ``evicted`` because of a limit, ``retired`` because
    a new one covers them. ``uncached``: registered for one use. ``repeated``: registrations undone because
    the memory changed meanwhile. ``overtaken``: changes that went on while the entry was in use. ``entries``,
    ``bytes``, ``in_use``: now. ``failed``: deregistrations that raised.
    """

    hits: int
    misses: int
    registered: int
    deregistered: int
    invalidated: int
    evicted: int
    retired: int
    uncached: int
    repeated: int
    overtaken: int
    entries: int
    bytes: int
    in_use: int
    failed: int


class _Device:
    """The two functions, and what they made; what C calls back. Lives as long as the cache in C."""

    def __init__(self, register: Callable[[int, int], Any], deregister: Callable[[Any], object]) -> None:
        self.register = register
        self.deregister = deregister
        self.made: dict[int, Any] = {}
        self.failed = 0
        self.raised = threading.local()
        self._numbers = itertools.count(1)
        self._owner = os.getpid()

    def enroll(self, address: int, length: int) -> int:
        if self._owner != os.getpid():
            # What was made before the fork is the parent's.
            self.made, self._owner = {}, os.getpid()
        made = self.register(address, length)
        number = next(self._numbers)
        self.made[number] = made
        return number

    def drop(self, number: int) -> None:
        try:
            self.deregister(self.made.pop(number))
        except BaseException as error:  # nobody could catch it: this may be a thread of the cache's own
            self.failed += 1
            _log.error("registration cache: deregister raised %s: %s", type(error).__name__, error)


@ffi.def_extern(error=-_RAISED)  # type: ignore[untyped-decorator]
def umm_python_enroll(context: Any, address: int, length: int, registration: Any) -> int:
    device = ffi.from_handle(context)
    try:
        registration[0] = ffi.cast("void *", device.enroll(address, length))
    except BaseException as error:  # raised again by get(), in this thread
        device.raised.error = error
        return -_RAISED
    return 0


@ffi.def_extern()  # type: ignore[untyped-decorator]
def umm_python_deregister(context: Any, registration: Any) -> None:
    ffi.from_handle(context).drop(int(ffi.cast("uintptr_t", registration)))


class Cached(Generic[T]):
    """A registration in use; a context manager that puts it back.

    ``registration`` is what `register` returned for [address, address + length), which covers what was asked
    for. ``hit``: it was there. ``cached``: it stays after its use.
    """

    def __init__(self, cache: RegistrationCache[T], native: Any, registration: T) -> None:
        self._cache = cache
        self._native = native
        self.registration = registration
        self.address = int(native.address)
        self.length = int(native.length)
        self.hit = bool(native.hit)
        self.cached = native.entry != ffi.NULL

    def put(self) -> None:
        """Give it back; harmless when done already."""
        native, self._native = self._native, None
        if native is not None:
            self._cache._put(native)

    def __del__(self) -> None:
        self.put()

    def __enter__(self) -> T:
        return self.registration

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.put()


class RegistrationCache(Generic[T]):
    """Keeps what `register(address, length)` returned until the memory changes; then `deregister` gets it.

    `register` is called with whole pages, in the thread that asks; what it raises, :meth:`get` raises.
    `deregister` is called exactly once for each registration, maybe in a thread of the cache's own; what it
    raises is logged and counted. An ordered change waits up to `wait_s` for registrations in use to be put
    back (the device may be at work), then an eviction is given up, and other changes happen all the same; the
    last :meth:`Cached.put` deregisters. At most `entries` are kept, and `max_bytes` of memory (None: no
    limit); the least recently used goes first.

    fork: the parent drops entries of private memory (not of MADV_DONTFORK memory), the child's cache is empty
    and deregisters nothing of the parent's. exit: everything is deregistered.
    """

    def __init__(
        self, register: Callable[[int, int], T], deregister: Callable[[T], object], *,
        entries: SupportsIndex = 1024, max_bytes: SupportsIndex | None = None, wait_s: float = 1.0,
        follow: Follow = Follow.KERNEL, name: str = "registration cache",
    ) -> None:  # fmt: skip
        self._handle: Any = ffi.NULL
        if not callable(register) or not callable(deregister):
            raise InputError("RegistrationCache: register and deregister must be callable")
        if not isinstance(follow, Follow):
            raise InputError(f"RegistrationCache: follow must be one of {', '.join(Follow.__members__)}")
        self._device = _Device(register, deregister)
        ops, options = ffi.new("struct umm_cache_ops *"), ffi.new("struct umm_cache_options *")
        ops.enroll, ops.deregister = lib.umm_python_enroll, lib.umm_python_deregister
        context, text = ffi.new_handle(self._device), ffi.new("char[]", name.encode())
        options.name, options.ops, options.context, options.follow = text, ops, context, follow
        options.entries_max = as_int("RegistrationCache", "entries", entries, low=1, high=_ENTRIES_MOST)
        options.bytes_max = as_int("RegistrationCache", "max_bytes", max_bytes or 0)
        options.limit_ns = as_ns("wait_s", wait_s, none=0)
        result = ffi.new("struct umm_cache **")
        error = lib.umm_cache_create(options, result)
        if error in (-errno.EOPNOTSUPP, -errno.ENOSYS, -errno.EPERM):
            raise UnsupportedError(
                "RegistrationCache: raw system calls cannot be followed without a userfaultfd with write "
                "protection and events (see uspace-mm doctor); make changes through uspace_mm.notifier.calls "
                "and give follow=Follow.CALLS"
            )
        check(error, "umm_cache_create")
        # The C side keeps pointers to these.
        self._alive = ops, context, text
        self._handle = result[0]

    @property
    def handle(self) -> Any:
        """The ``struct umm_cache *`` for native code."""
        if self._handle == ffi.NULL:
            raise InputError("this registration cache is closed")
        return self._handle

    def get(self, address: SupportsIndex, length: SupportsIndex) -> Cached[T]:
        """A registration of the pages of these bytes. Not from a callback of a notifier."""
        start, size = as_range("get", address, length)
        native = ffi.new("struct umm_cache_handle *")
        error = lib.umm_cache_get(self.handle, start, size, native)
        if error == -_RAISED:
            raise self._device.raised.__dict__.pop("error")
        check(error, "register", address=start, length=size)
        return Cached(self, native, self._device.made[int(ffi.cast("uintptr_t", native.registration))])

    def _put(self, native: Any) -> None:
        lib.umm_cache_put(self.handle, native)

    def trim(self) -> None:
        """Deregister what nobody uses."""
        lib.umm_cache_trim(self.handle)

    def stats(self) -> CacheStats:
        """What happened so far."""
        native = ffi.new("struct umm_cache_stats *")
        lib.umm_cache_stats(self.handle, native)
        counts = {
            name: int(getattr(native, name)) for name in CacheStats.__dataclass_fields__ if name != "failed"
        }
        return CacheStats(**counts, failed=self._device.failed)

    def close(self) -> None:
        """Deregister everything; harmless when done already. InputError: some are in use."""
        if self._handle != ffi.NULL:
            if lib.umm_cache_destroy(self._handle) == -errno.EBUSY:
                used = self.stats().in_use
                raise InputError(f"close: {used} registrations are in use: put them back first")
            self._handle = ffi.NULL

    def __enter__(self) -> RegistrationCache[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
