"""io_uring(7), as much of it as fixed buffers need: a ring, slots for buffers, READ_FIXED and WRITE_FIXED.

Sources: io_uring_setup(2), io_uring_enter(2), io_uring_register(2).

A fixed buffer is memory whose pages a ring has pinned: requests go to those pages, whatever the address maps
meanwhile. :mod:`uspace_mm.notifier` keeps the slots of a ring right while memory changes.
"""

from __future__ import annotations

import errno
from types import TracebackType
from typing import SupportsIndex

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.kernel._check import as_fd, as_int, as_range, check

SLOTS_MAX = int(lib.UMM_IO_URING_SLOTS_MAX)
BUFFER_MAX = int(lib.UMM_IO_URING_BUFFER_MAX)
_CURRENT_POSITION = (1 << 64) - 1

_HINTS = {
    errno.EBUSY: "the ring has a table of buffers already, or is full of requests",
    errno.ENXIO: "the ring has no table of buffers: register_slots first",
    errno.EINVAL: "no such slot, or a buffer of more than 1 GiB, or a kernel before 5.19",
    errno.EFAULT: "not mapped, or not writable",
    errno.EEXIST: "the ring is SINGLE_ISSUER: only the thread that made it may change its buffers",
    errno.ENOMEM: "pinned memory is limited by RLIMIT_MEMLOCK (ulimit -l)",
    errno.EOPNOTSUPP: "not a descriptor of an io_uring",
    errno.EBADF: "not an open descriptor",
}


class IoUringUnavailable(UnsupportedError):
    """No ring can be made; ``errno`` says why and the message what to do."""

    def __init__(self, error: int) -> None:
        name = errno.errorcode.get(error, str(error))
        super().__init__(
            f"cannot make an io_uring [{name}]: sysctl kernel.io_uring_disabled=0 (1: CAP_SYS_ADMIN or its "
            "io_uring_group), CONFIG_IO_URING=y, and a container whose seccomp profile allows io_uring_setup"
        )
        self.errno = error


def update_slot(ring_fd: SupportsIndex, slot: SupportsIndex, address: SupportsIndex, length: int) -> None:
    """Pin `length` bytes at `address` as buffer `slot` of the ring with this descriptor; 0 empties the slot.

    Requests under way go on with the pages that they had, which stay pinned until then.
    """
    call = f"io_uring_register(BUFFERS_UPDATE, slot {as_int('update_slot', 'slot', slot, high=SLOTS_MAX)})"
    start, size = (0, 0) if length == 0 else as_range(call, address, length)
    result = lib.umm_io_uring_update_slot(as_fd(call, ring_fd), slot, start, size)
    check(result, call, address=start, length=size, hints=_HINTS)


class IoUring:
    """A ring of `entries` requests, for one thread at a time. Raises :class:`IoUringUnavailable`.

    ``with IoUring() as ring: ring.register_slots(8); update_slot(ring.fd, 0, address, length)``.
    """

    def __init__(self, entries: SupportsIndex = 8, *, single_issuer: bool = False) -> None:
        self._ring = ffi.NULL
        ret = ffi.new("struct umm_io_uring **")
        flags = lib.UMM_IO_URING_SINGLE_ISSUER if single_issuer else 0
        result = lib.umm_io_uring_create(
            as_int("io_uring_setup", "entries", entries, low=1, high=32768), flags, ret
        )
        if result in (-errno.ENOSYS, -errno.EPERM):
            raise IoUringUnavailable(-result)
        check(result, "io_uring_setup")
        self._ring = ret[0]

    @property
    def fd(self) -> int:
        """The ring's descriptor; it belongs to this object."""
        return int(lib.umm_io_uring_fd(self._open()))

    def register_slots(self, slots: SupportsIndex) -> None:
        """Give the ring a table of empty slots; a ring has one at most."""
        number = as_int("io_uring_register(BUFFERS2)", "slots", slots, low=1, high=SLOTS_MAX)
        check(lib.umm_io_uring_register_slots(self.fd, number), "io_uring_register(BUFFERS2)", hints=_HINTS)

    def unregister_slots(self) -> None:
        """Take the table away with all its buffers."""
        call = "io_uring_register(UNREGISTER_BUFFERS)"
        check(lib.umm_io_uring_unregister_slots(self.fd), call, hints=_HINTS)

    def write_fixed(
        self, fd: SupportsIndex, slot: SupportsIndex, address: SupportsIndex, length: SupportsIndex,
        offset: SupportsIndex | None = None,
    ) -> int:  # fmt: skip
        """Write `length` bytes of the buffer in `slot` to `fd`, at `offset` (None: where it stands): the
        bytes written. The range is named by the addresses that the buffer was registered with."""
        return self._transfer(lib.UMM_IO_URING_WRITE_FIXED, fd, slot, address, length, offset)

    def read_fixed(
        self, fd: SupportsIndex, slot: SupportsIndex, address: SupportsIndex, length: SupportsIndex,
        offset: SupportsIndex | None = None,
    ) -> int:  # fmt: skip
        """Read from `fd` into the buffer in `slot`: the bytes read; see :meth:`write_fixed`."""
        return self._transfer(lib.UMM_IO_URING_READ_FIXED, fd, slot, address, length, offset)

    def _transfer(
        self, operation: int, fd: SupportsIndex, slot: SupportsIndex, address: SupportsIndex,
        length: SupportsIndex, offset: SupportsIndex | None,
    ) -> int:  # fmt: skip
        call = "io_uring WRITE_FIXED" if operation == lib.UMM_IO_URING_WRITE_FIXED else "io_uring READ_FIXED"
        start, size = as_range(call, address, length)
        request = ffi.new("struct umm_io_uring_request *")
        request.operation = operation
        request.address, request.length = start, as_int(call, "length", size, high=(1 << 32) - 1)
        request.offset = _CURRENT_POSITION if offset is None else as_int(call, "offset", offset, high=1 << 62)
        request.fd, request.slot = as_fd(call, fd), as_int(call, "slot", slot, high=SLOTS_MAX)
        hints = {errno.EFAULT: "no buffer in this slot, or the range is not within it"}
        done = int(lib.umm_io_uring_transfer(self._open(), request))
        return check(done, call, address=start, length=size, hints=hints)

    def _open(self) -> object:
        if self._ring == ffi.NULL:
            raise InputError("this io_uring is closed")
        return self._ring

    def close(self) -> None:
        """Give the ring back; harmless when done already."""
        if self._ring != ffi.NULL:
            ring, self._ring = self._ring, ffi.NULL
            lib.umm_io_uring_destroy(ring)

    def __enter__(self) -> IoUring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
