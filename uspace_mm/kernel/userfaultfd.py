"""userfaultfd(2): opening, registering, resolving faults, reading events.

Sources: userfaultfd(2), ioctl_userfaultfd(2), Documentation/admin-guide/mm/userfaultfd.rst of Linux 6.18.

A Python thread that touches a missing page holds the GIL while the kernel blocks it, so a fault of this
process can only be served from Python when the access was made with the GIL released (a system call, a C
function). :mod:`uspace_mm.pager` serves faults in C.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import SupportsIndex

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.kernel._check import (
    PAGE_SIZE,
    address_of,
    as_fd,
    as_int,
    as_range,
    buffer_of,
    check,
)
from uspace_mm.kernel.userfaultfd_abi import (
    Event,
    EventKind,
    FaultFlag,
    Feature,
    Fork,
    Ioctl,
    Outcome,
    OutcomeKind,
    PageFault,
    RegisterMode,
    Remap,
    Remove,
    Source,
    Unmap,
    decode_event,
)

__all__ = [
    "Event",
    "EventKind",
    "FaultFlag",
    "Feature",
    "Fork",
    "Ioctl",
    "Outcome",
    "OutcomeKind",
    "PageFault",
    "RegisterMode",
    "Remap",
    "Remove",
    "Source",
    "Unmap",
    "Userfaultfd",
    "UserfaultfdBuilder",
    "UserfaultfdUnavailable",
    "decode_event",
    "open_remedy",
    "probe_features",
]


class UserfaultfdUnavailable(UnsupportedError):
    """No userfaultfd can be opened; ``errno`` says why and the message what to do."""

    def __init__(self, source: Source, error: int) -> None:
        super().__init__(f"cannot open a userfaultfd ({source.name}): {open_remedy(error)}")
        self.errno = error


def open_remedy(error: int) -> str:
    """What stands behind an errno of opening, and the remedy; one line."""
    name = errno.errorcode.get(error, str(error))
    if error == errno.ENOSYS:
        return f"[{name}] boot a kernel with CONFIG_USERFAULTFD=y (or a seccomp profile hides the call)"
    if error in (errno.EPERM, errno.EACCES):
        return (
            f"[{name}] sysctl vm.unprivileged_userfaultfd=1, or give your group /dev/userfaultfd "
            "(chgrp GROUP /dev/userfaultfd; chmod 660), or grant CAP_SYS_PTRACE; "
            "in a container also allow userfaultfd in its seccomp profile"
        )
    if error in (errno.EMFILE, errno.ENFILE):
        return f"[{name}] no descriptor left: raise the limit (ulimit -n) or close some"
    if error == errno.ENOENT:
        return f"[{name}] /dev/userfaultfd does not exist: Linux 6.1 and CONFIG_USERFAULTFD=y make it"
    return f"[{name}] {os.strerror(error)}"


def probe_features(source: Source = Source.ANY) -> Feature:
    """Features this kernel grants this caller, found out on descriptors of their own."""
    features = ffi.new("uint64_t *")
    result = lib.umm_uffd_probe_features(as_int("userfaultfd", "source", source, high=Source.ANY), features)
    if result < 0:
        raise UserfaultfdUnavailable(Source(source), -result)
    return Feature(features[0])


@dataclass(frozen=True, slots=True)
class UserfaultfdBuilder:
    """What a descriptor shall have; immutable, each method returns a changed copy.

    >>> UserfaultfdBuilder().require(Feature.EVENT_REMOVE).want(Feature.MOVE).open()  # doctest: +SKIP
    """

    source: Source = Source.ANY
    required: Feature = Feature(0)
    wanted: Feature = Feature(0)

    def using(self, source: Source) -> UserfaultfdBuilder:
        """Open in this way only; the default tries all, user-mode-only last."""
        return replace(self, source=source)

    def require(self, features: Feature) -> UserfaultfdBuilder:
        """:meth:`open` raises UnsupportedError when one of `features` is lacking."""
        return replace(self, required=self.required | features)

    def want(self, features: Feature) -> UserfaultfdBuilder:
        """Take those of `features` that the kernel has."""
        return replace(self, wanted=self.wanted | features)

    def open(self) -> Userfaultfd:
        """Open and do the UFFDIO_API handshake.

        Raises UserfaultfdUnavailable when no descriptor can be had, UnsupportedError for lacking features.
        """
        available = probe_features(self.source)
        # ~ of an IntFlag forgets bits that have no name: a newer kernel's feature would pass unseen.
        lacking = Feature(int(self.required) & ~int(available))
        if lacking:
            bits = (1 << number for number in range(64) if lacking >> number & 1)
            names = ", ".join(Feature(bit).name or hex(bit) for bit in bits)
            right = "; EVENT_FORK needs CAP_SYS_PTRACE" if Feature.EVENT_FORK in lacking else ""
            raise UnsupportedError(f"userfaultfd lacks {names} on this kernel (see uspace-mm doctor){right}")
        used = ffi.new("int *")
        fd = lib.umm_uffd_open(self.source, os.O_NONBLOCK, used)
        if fd < 0:
            raise UserfaultfdUnavailable(self.source, -fd)
        features = self.required | (self.wanted & available)
        ioctls = ffi.new("uint64_t *")
        # What UFFDIO_API reports back is all the kernel has; enabled is what was asked for.
        result = lib.umm_uffd_api(fd, features, ffi.NULL, ioctls)
        if result < 0:
            os.close(fd)
            check(result, f"ioctl(UFFDIO_API, features={int(features):#x})")
        return Userfaultfd(fd, granted=features, ioctls=Ioctl(ioctls[0]), source=Source(used[0]))


_REGISTER_HINTS = {
    errno.EINVAL: "not mapped, not page aligned, or this kind of memory does not take this mode",
    errno.EBUSY: "registered with another userfaultfd already",
    errno.EPERM: "the mapping's file must be writable by the caller",
    errno.ENOMEM: "the address space has too many mappings (vm.max_map_count) or the process is exiting",
}


class Userfaultfd:
    """An open userfaultfd, non-blocking, close-on-exec. Owns the descriptor; also a context manager.

    Closing the last descriptor unregisters: every page that never arrived reads as zero from then on.
    """

    def __init__(self, fd: int, *, granted: Feature, ioctls: Ioctl, source: Source) -> None:
        self._fd = as_fd("Userfaultfd", fd)
        self.granted = granted
        self.ioctls = ioctls
        self.source = source

    @classmethod
    def adopt(cls, fd: int, granted: Feature | None = None) -> Userfaultfd:
        """Own a descriptor from elsewhere (a :class:`Fork` event, pidfd_getfd) whose handshake is done."""
        os.set_blocking(as_fd("Userfaultfd.adopt", fd), False)
        return cls(fd, granted=granted or Feature(0), ioctls=Ioctl(0), source=Source.ANY)

    def fileno(self) -> int:
        """The descriptor; raises InputError after :meth:`close`."""
        if self._fd < 0:
            raise InputError("this userfaultfd is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` or :meth:`detach` was called."""
        return self._fd < 0

    def detach(self) -> int:
        """Give the descriptor away: the caller closes it."""
        fd, self._fd = self.fileno(), -1
        return fd

    def close(self) -> None:
        """Close the descriptor; harmless when closed already."""
        if self._fd >= 0:
            os.close(self.detach())

    def __enter__(self) -> Userfaultfd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd {self._fd}"
        return f"<Userfaultfd {state} {self.source.name} granted={self.granted!r}>"

    def register(self, address: SupportsIndex, length: SupportsIndex, mode: RegisterMode) -> Ioctl:
        """Report faults of a mapped range; returns the ioctls that work on it."""
        call = "ioctl(UFFDIO_REGISTER)"
        start, size = as_range(call, address, length, align=PAGE_SIZE)
        ioctls = ffi.new("uint64_t *")
        result = lib.umm_uffd_register(self.fileno(), start, size, as_int(call, "mode", mode), ioctls)
        check(result, call, address=start, length=size, hints=_REGISTER_HINTS)
        return Ioctl(ioctls[0])

    def unregister(self, address: SupportsIndex, length: SupportsIndex) -> None:
        """Report no more faults of the range; waiting threads are woken and see zeros."""
        call = "ioctl(UFFDIO_UNREGISTER)"
        start, size = as_range(call, address, length, align=PAGE_SIZE)
        check(lib.umm_uffd_unregister(self.fileno(), start, size), call, address=start, length=size)

    def wake(self, address: SupportsIndex, length: SupportsIndex) -> None:
        """Let threads that wait for a page of the range try again."""
        call = "ioctl(UFFDIO_WAKE)"
        start, size = as_range(call, address, length, align=PAGE_SIZE)
        check(lib.umm_uffd_wake(self.fileno(), start, size), call, address=start, length=size)

    def copy(
        self,
        address: SupportsIndex,
        source: int | bytes | bytearray | memoryview,
        length: SupportsIndex | None = None,
        *,
        wake: bool = True,
        write_protect: bool = False,
    ) -> Outcome:
        """Install pages with the bytes at `source`, an address or a buffer (then `length` defaults to its
        size)."""
        call = "ioctl(UFFDIO_COPY)"
        keep = None
        if not isinstance(source, int):
            keep = buffer_of(call, source, writable=False)
            length = len(keep) if length is None else length
            source = address_of(keep)
            if as_int(call, "length", length) > len(keep):
                raise InputError(f"{call}: length {length} is more than the {len(keep)} bytes of the source")
        if length is None:
            raise InputError(f"{call}: a source address needs a length")
        mode = (0 if wake else lib.UMM_UFFD_COPY_DONTWAKE) | (lib.UMM_UFFD_COPY_WP if write_protect else 0)
        return self._resolve(lib.umm_uffd_copy, call, address, length, mode, as_int(call, "source", source))

    def zeropage(self, address: SupportsIndex, length: SupportsIndex, *, wake: bool = True) -> Outcome:
        """Install zero pages (not on hugetlb)."""
        return self._resolve(
            lib.umm_uffd_zeropage, "ioctl(UFFDIO_ZEROPAGE)", address, length, 0 if wake else 1
        )

    def move(
        self,
        address: SupportsIndex,
        source: SupportsIndex,
        length: SupportsIndex,
        *,
        wake: bool = True,
        allow_holes: bool = False,
    ) -> Outcome:
        """Move pages of this process from `source` to `address` without copying them.

        A failed MOVE may have moved pages all the same (seen on 6.18): ask pagemap afterwards. GONE also
        means a hole in the source when `allow_holes` is not set.
        """
        call = "ioctl(UFFDIO_MOVE)"
        begin, _ = as_range(call, source, length, align=PAGE_SIZE)
        holes = lib.UMM_UFFD_MOVE_ALLOW_SRC_HOLES if allow_holes else 0
        mode = (0 if wake else lib.UMM_UFFD_MOVE_DONTWAKE) | holes
        return self._resolve(lib.umm_uffd_move, call, address, length, mode, begin)

    def continue_(
        self,
        address: SupportsIndex,
        length: SupportsIndex,
        *,
        wake: bool = True,
        write_protect: bool = False,
    ) -> Outcome:
        """Map pages that are in the page cache of shared memory already (minor faults)."""
        mode = (0 if wake else 1) | (2 if write_protect else 0)
        return self._resolve(lib.umm_uffd_continue, "ioctl(UFFDIO_CONTINUE)", address, length, mode)

    def poison(self, address: SupportsIndex, length: SupportsIndex, *, wake: bool = True) -> Outcome:
        """Let every access to the missing pages of the range end in SIGBUS; COPY heals it."""
        return self._resolve(lib.umm_uffd_poison, "ioctl(UFFDIO_POISON)", address, length, 0 if wake else 1)

    def writeprotect(
        self, address: SupportsIndex, length: SupportsIndex, *, protect: bool = True, wake: bool = True
    ) -> Outcome:
        """Write-protect pages, or (`protect` false) let writers go on. WAKE belongs to the latter only."""
        mode = lib.UMM_UFFD_WP_PROTECT if protect else 0
        if not protect and not wake:
            mode = lib.UMM_UFFD_WP_DONTWAKE
        return self._resolve(lib.umm_uffd_writeprotect, "ioctl(UFFDIO_WRITEPROTECT)", address, length, mode)

    def _resolve(
        self,
        function: Callable[..., int],
        call: str,
        address: SupportsIndex,
        length: SupportsIndex,
        mode: int,
        source: int | None = None,
    ) -> Outcome:
        start, size = as_range(call, address, length, align=PAGE_SIZE)
        result = ffi.new("struct umm_uffd_result *")
        if source is None:
            function(self.fileno(), start, size, mode, result)
        else:
            function(self.fileno(), start, source, size, mode, result)
        return Outcome(OutcomeKind(result.outcome), result.done, result.error, call, start, size)

    def read(self, timeout_s: float | None = 0.0) -> Event | None:
        """The next event; None when there is none within `timeout_s` seconds (None: wait without end).

        Raises KernelError EMFILE when a FORK event needs a descriptor and none is left.
        """
        message = ffi.new("struct umm_uffd_msg *")
        result = lib.umm_uffd_read(self.fileno(), message)
        if result == -errno.EAGAIN and timeout_s != 0.0:
            poll = select.poll()
            poll.register(self.fileno(), select.POLLIN)
            poll.poll(None if timeout_s is None else timeout_s * 1000)
            # Another reader may have been faster: then there is none for us.
            result = lib.umm_uffd_read(self.fileno(), message)
        if result == -errno.EAGAIN:
            return None
        check(result, "read(userfaultfd)", hints={errno.EMFILE: open_remedy(errno.EMFILE)})
        return decode_event(message.event, message.arg0, message.arg1, message.arg2)

    def events(self) -> Iterator[Event]:
        """The events that are waiting now."""
        while (event := self.read()) is not None:
            yield event
