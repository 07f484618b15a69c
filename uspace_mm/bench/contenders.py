"""Who answers the faults of a benchmark: the floors in C, and our pager.

Each is a context that yields the address of a range.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from uspace_mm._native import ffi, lib
from uspace_mm.bench.memory import Words
from uspace_mm.errors import KernelError, UnsupportedError, UspaceError
from uspace_mm.pager import Pager
from uspace_mm.stores import MemoryStore

PINNED: int = lib.UMM_FLOOR_PINNED
POLLING: int = lib.UMM_FLOOR_POLLING
IN_THREAD: int = lib.UMM_FLOOR_IN_THREAD


class WrongContent(UspaceError):
    """A contender delivered other bytes than its source holds: its times mean nothing."""


def _check(call: str, result: int) -> None:
    if result in (-errno.EPERM, -errno.ENOSYS, -errno.EACCES):
        raise UnsupportedError(
            f"{call}: no right to use userfaultfd here; see `uspace-mm doctor` for the setting that grants it"
        )
    if result < 0:
        raise KernelError(call, result)


@contextmanager
def floor(kind: int, source: Words) -> Iterator[int]:
    """A range with the content of `source` whose faults the floor `kind` serves."""
    handle = ffi.new("struct umm_floor **")
    _check("umm_floor_create", lib.umm_floor_create(kind, ffi.from_buffer(source), source.nbytes, handle))
    try:
        yield int(lib.umm_floor_address(handle[0]))
    finally:
        error = lib.umm_floor_destroy(handle[0])
    _check("fault handler of the floor", error)


@contextmanager
def pager(source: Words, *, in_thread: bool = False) -> Iterator[int]:
    """A region with the content of `source` in a pager of its own, all options at their defaults."""
    with Pager(in_thread=in_thread) as owner:
        region = owner.map(MemoryStore(source))
        try:
            yield region.address
        finally:
            region.close()


@dataclass(frozen=True)
class Touches:
    """How long each touch took, and all of them together."""

    latency_ns: npt.NDArray[np.uint32]
    elapsed_ns: int

    def quantile(self, q: float) -> float:
        """Nanoseconds, exact (not from a histogram)."""
        return float(np.quantile(self.latency_ns, q))

    @property
    def per_s(self) -> float:
        return len(self.latency_ns) * 1e9 / self.elapsed_ns


def touch(addresses: Words, expected: Words, threads: int) -> Touches:
    """Read the word at each address with `threads` threads in C, and hold it against the expected one."""
    latency = np.zeros(len(addresses), dtype=np.uint32)
    job = ffi.new("struct umm_touch_job *")
    # Kept in variables: cffi does not keep a buffer alive through a pointer in a structure.
    address_buffer = ffi.from_buffer("uint64_t[]", addresses)
    expected_buffer = ffi.from_buffer("uint64_t[]", expected)
    latency_buffer = ffi.from_buffer("uint32_t[]", latency)
    job.addresses, job.expected, job.latency_ns = address_buffer, expected_buffer, latency_buffer
    job.count, job.threads = len(addresses), threads
    _check("umm_bench_touch", lib.umm_bench_touch(job))
    if job.wrong:
        raise WrongContent(f"{job.wrong} of {job.count} touched pages held other bytes than their source")
    return Touches(latency, int(job.elapsed_ns))
