"""Other processes: pidfd_open(2), pidfd_getfd(2), process_madvise(2), process_vm_readv(2) and writev."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from enum import IntFlag
from typing import Any, SupportsIndex

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError
from uspace_mm.kernel._check import address_of, as_fd, as_int, as_pid, as_range, buffer_of, check
from uspace_mm.kernel.madvise import HINTS, Advice, as_advice

# What process_vm_readv(2) and process_madvise(2) take in one call (UIO_MAXIOV).
IOV_MAX = 1024


class PidfdFlag(IntFlag):
    """PIDFD_*. THREAD is Linux 6.9, NONBLOCK 5.10."""

    THREAD = lib.UMM_PIDFD_THREAD
    NONBLOCK = lib.UMM_PIDFD_NONBLOCK


_PTRACE = "needs the rights of ptrace(2): the same user, or CAP_SYS_PTRACE (and kernel.yama.ptrace_scope)"
_HINTS = {
    errno.ESRCH: "no such process",
    errno.EPERM: _PTRACE,
    errno.EACCES: _PTRACE,
    errno.EFAULT: "part of the range is not mapped in the process",
    errno.EBADF: "not an open descriptor, here or there",
    errno.ENOSYS: "this kernel is built without it (CONFIG_CROSS_MEMORY_ATTACH, CONFIG_ADVISE_SYSCALLS)",
    errno.EINVAL: "a thread id needs PidfdFlag.THREAD, or this kernel lacks a flag",
    errno.ENOENT: "a thread id needs PidfdFlag.THREAD",
}

_OTHERS = "another process needs CAP_SYS_NICE and the right to read it (ptrace(2))"
_MADVISE_HINTS = HINTS | {
    errno.ESRCH: "no such process",
    errno.EPERM: _OTHERS,
    errno.EACCES: _OTHERS,
    errno.EINVAL: "another process takes COLD, PAGEOUT, WILLNEED and COLLAPSE only (or no page is there)",
    errno.ENOSYS: "this kernel is built without it (CONFIG_ADVISE_SYSCALLS)",
}


def pidfd_open(pid: SupportsIndex, flags: PidfdFlag | None = None) -> int:
    """A descriptor of process `pid`, close-on-exec; it never comes to mean another process."""
    number = as_pid("pidfd_open", pid)
    bits = as_int("pidfd_open", "flags", flags or 0, high=0xFFFFFFFF)
    return check(lib.umm_pidfd_open(number, bits), f"pidfd_open({number})", hints=_HINTS)


def pidfd_getfd(pidfd: SupportsIndex, target: SupportsIndex) -> int:
    """A duplicate of descriptor `target` of that process, close-on-exec; the caller closes it."""
    call = "pidfd_getfd"
    number = as_fd(call, target)
    return check(lib.umm_pidfd_getfd(as_fd(call, pidfd), number), f"{call}(target {number})", hints=_HINTS)


def _spans(call: str, ranges: Sequence[tuple[SupportsIndex, SupportsIndex]]) -> tuple[Any, int]:
    if not ranges:
        raise InputError(f"{call}: no range given")
    if len(ranges) > IOV_MAX:
        raise InputError(f"{call}: {len(ranges)} ranges, at most {IOV_MAX} fit in one call")
    spans = ffi.new("struct umm_span[]", len(ranges))
    total = 0
    for span, (address, length) in zip(spans, ranges, strict=True):
        span.address, span.length = as_range(call, address, length)
        total += span.length
    return spans, total


def process_madvise(
    pidfd: SupportsIndex, ranges: Sequence[tuple[SupportsIndex, SupportsIndex]], advice: Advice
) -> int:
    """Give `advice` (COLD, PAGEOUT, WILLNEED, COLLAPSE) for (address, length) ranges of another process.

    Returns the bytes advised: fewer than the sum when a range after the first failed, the errno is then
    not told; one call is cut at 2 GiB less a page. Needs CAP_SYS_NICE and ptrace read access.
    """
    known = as_advice("process_madvise", advice)
    call = f"process_madvise({known.name})"
    spans, total = _spans(call, ranges)
    done = ffi.new("uint64_t *")
    result = lib.umm_process_madvise(as_fd(call, pidfd), spans, len(ranges), known, done)
    check(result, call, address=spans[0].address, length=total, hints=_MADVISE_HINTS)
    return int(done[0])


Ranges = Sequence[tuple[SupportsIndex, SupportsIndex]]


def process_read(pid: SupportsIndex, address: SupportsIndex, into: Any) -> int:
    """Read memory of process `pid` into a writable buffer: the bytes read, fewer at an unmapped page."""
    call = "process_vm_readv"
    buffer = buffer_of(call, into, writable=True)
    return _transfer(lib.umm_process_read, call, pid, [(address, len(buffer))], buffer)


def process_readv(pid: SupportsIndex, ranges: Ranges, into: Any) -> int:
    """Read (address, length) ranges of process `pid`, one after the other, into a writable buffer that is
    as large as their sum: the bytes read, fewer at an unmapped page. At most IOV_MAX ranges."""
    call = "process_vm_readv"
    return _transfer(lib.umm_process_read, call, pid, ranges, buffer_of(call, into, writable=True))


def process_write(pid: SupportsIndex, address: SupportsIndex, data: Any) -> int:
    """Write a buffer to memory of process `pid`: the bytes written, fewer at a page that cannot be."""
    call = "process_vm_writev"
    buffer = buffer_of(call, data, writable=False)
    return _transfer(lib.umm_process_write, call, pid, [(address, len(buffer))], buffer)


def process_writev(pid: SupportsIndex, ranges: Ranges, data: Any) -> int:
    """Write a buffer to (address, length) ranges of process `pid`; see :func:`process_readv`."""
    call = "process_vm_writev"
    return _transfer(lib.umm_process_write, call, pid, ranges, buffer_of(call, data, writable=False))


def _transfer(function: Any, call: str, pid: SupportsIndex, ranges: Ranges, buffer: Any) -> int:
    remote, length = _spans(call, ranges)
    if length != len(buffer):
        raise InputError(f"{call}: the ranges are {length} bytes, the buffer is {len(buffer)}")
    local, _ = _spans(call, [(address_of(buffer), len(buffer))])
    done = ffi.new("uint64_t *")
    result = function(as_pid(call, pid), local, 1, remote, len(ranges), done)
    check(result, call, address=remote[0].address, length=length, hints=_HINTS)
    return int(done[0])
