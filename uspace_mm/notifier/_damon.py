"""Reads and writes of a range, sampled by DAMON: a kdamond of our own, for one range of one process.

Source: Documentation/admin-guide/mm/damon/usage.rst, "sysfs Interface"; Documentation/mm/damon/design.rst.
It needs CONFIG_DAMON_SYSFS, CONFIG_DAMON_VADDR, root, and Linux 6.2 (update_schemes_tried_regions).

`fvaddr` are the operations of `vaddr` for fixed ranges (both come with CONFIG_DAMON_VADDR): `vaddr` itself
replaces the regions that it was given by the whole process's at each update interval.

kdamonds are the machine's, and whoever writes nr_kdamonds makes all of them anew: when there is one already,
DAMON is taken, and nothing is written. What is removed is only what still has our process and range in it.
A process that is killed leaves its kdamond behind; then root writes off to its state and 0 to nr_kdamonds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from uspace_mm.errors import KernelError, UnsupportedError, UspaceError
from uspace_mm.kernel.proc import page_size

ADMIN = Path("/sys/kernel/mm/damon/admin")
_OPERATIONS = "fvaddr"

# One page of each region is looked at per sample. With fewer than ten samples per aggregation, regions are
# merged only when they were used equally often: a single use is not averaged away (mm/damon/core.c).
_SAMPLE_US = 10_000
_AGGREGATION_US = 80_000

# As many regions as there are pages, up to a limit that costs a CPU a few percent.
_LEAST_REGIONS = 3  # the kernel's
_PAGE_BY_PAGE = 512
_MOST_REGIONS = 4 * _PAGE_BY_PAGE

_UINT_MAX = (1 << 32) - 1
_ULONG_MAX = (1 << 64) - 1

# Reads and writes give EBUSY while the kernel is at any of the files, and until a kdamond has ended.
_PATIENCE_S = 5.0
_PAUSE_S = 0.01

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Sampled:
    """``used`` since the last time; ``last_bytes`` of regions in the last interval. None: not looked at."""

    used: bool | None
    last_bytes: int | None


@dataclass(frozen=True, slots=True)
class _Place:
    """Our kdamond in sysfs, and what tells it from another user's."""

    admin: Path
    pid: int
    start: int
    end: int

    @property
    def count(self) -> Path:
        return self.admin / "kdamonds/nr_kdamonds"

    @property
    def state(self) -> Path:
        return self.admin / "kdamonds/0/state"

    @property
    def context(self) -> Path:
        return self.admin / "kdamonds/0/contexts/0"

    @property
    def target(self) -> Path:
        return self.context / "targets/0"

    @property
    def scheme(self) -> Path:
        return self.context / "schemes/0"

    def is_ours(self) -> bool:
        """Whether the only kdamond is the one that :meth:`fill` wrote."""
        region = self.target / "regions/0"
        wanted = {
            self.count: "1",
            self.target / "pid_target": str(self.pid),
            region / "start": str(self.start),
            region / "end": str(self.end),
        }
        try:
            return all(_read(path) == value for path, value in wanted.items())
        except KernelError:
            return False

    def fill(self) -> None:
        """What to watch, and a scheme that does nothing but name the regions that were used."""
        _write(self.target.parent / "nr_targets", 1)
        _write(self.target / "pid_target", self.pid)
        _write(self.target / "regions/nr_regions", 1)
        _write(self.target / "regions/0/start", self.start)
        _write(self.target / "regions/0/end", self.end)
        attributes = self.context / "monitoring_attrs"
        _write(attributes / "intervals/sample_us", _SAMPLE_US)
        _write(attributes / "intervals/aggr_us", _AGGREGATION_US)
        least = min((self.end - self.start) // page_size(), _PAGE_BY_PAGE)
        _write(attributes / "nr_regions/max", _MOST_REGIONS)
        _write(attributes / "nr_regions/min", max(_LEAST_REGIONS, least))
        _write(self.scheme.parent / "nr_schemes", 1)
        _write(self.scheme / "action", "stat")
        pattern = self.scheme / "access_pattern"
        for name, least, most in (
            ("sz", 0, _ULONG_MAX),
            ("nr_accesses", 1, _UINT_MAX),
            ("age", 0, _UINT_MAX),
        ):
            _write(pattern / name / "max", most)
            _write(pattern / name / "min", least)


class Damon:
    """DAMON on [start, end) of process `pid`, whole pages, from now on.

    Raises UnsupportedError where it, its operations or the rights are lacking, or when it is taken;
    KernelError when the kernel refuses.
    """

    def __init__(self, pid: int, start: int, end: int, admin: Path = ADMIN) -> None:
        self._place = place = _Place(admin, pid, start, end)
        if not place.count.exists():
            raise UnsupportedError(f"no {place.count}: this kernel lacks CONFIG_DAMON_SYSFS")
        if not os.access(place.count, os.R_OK | os.W_OK):
            raise UnsupportedError(f"{place.count}: needs root, and sysfs writable")
        with _alone(place):
            there = _read(place.count)
            if there != "0":
                raise UnsupportedError(f"DAMON is taken: {place.count} is {there}, and that is not ours")
            _write(place.count, 1)
            try:
                self._start()
            except BaseException:
                _empty(place)
                raise
        # Also when nobody closes it, and at the end of the interpreter; not in a child that was forked.
        self._end = weakref.finalize(self, _remove, place, os.getpid())
        self._tried = 0

    def _start(self) -> None:
        place = self._place
        _write(place.context.parent / "nr_contexts", 1)
        available = _read(place.context / "avail_operations").split()
        if _OPERATIONS not in available:
            raise UnsupportedError(
                f"DAMON has no operations {_OPERATIONS} (only: {' '.join(available) or 'none'}): "
                "this kernel lacks CONFIG_DAMON_VADDR"
            )
        _write(place.context / "operations", _OPERATIONS)
        place.fill()
        if not (place.scheme / "tried_regions").is_dir():
            raise UnsupportedError("DAMON names no regions (tried_regions): needs Linux 6.2")
        _write(place.state, "on")

    def take(self) -> Sampled:
        """What was seen since the last call; waits for the end of an aggregation interval (0.1 to 0.4 s).

        Raises KernelError when the process has gone or somebody else changed the kdamond.
        """
        place = self._place
        if not place.is_ours():
            raise KernelError("DAMON", errno.EBUSY, hint="somebody else replaced our kdamond")
        if _read(place.state) != "on":
            raise KernelError("DAMON", errno.ESRCH, hint=f"the kdamond ended: has process {place.pid} gone?")
        # The regions first: this waits, so that the sums after it cover all that happened before the call.
        _write(place.state, "update_schemes_tried_regions")
        last_bytes = sum(
            int(_read(region / "end")) - int(_read(region / "start"))
            for region in (place.scheme / "tried_regions").iterdir()
            if region.name.isdigit()
        )
        _write(place.state, "update_schemes_stats")
        before, self._tried = self._tried, int(_read(place.scheme / "stats/nr_tried"))
        return Sampled(bool(last_bytes) or self._tried > before, last_bytes)

    def close(self) -> None:
        """Ends the kdamond and removes it; harmless when closed already. Raises KernelError."""
        self._end()


def _patiently(call: str, path: Path, flags: int, action: Callable[[int], _T]) -> _T:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fd = os.open(path, flags | os.O_CLOEXEC)
            try:
                return action(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise KernelError(call, error.errno or errno.EIO) from None
        time.sleep(_PAUSE_S)


def _read(path: Path) -> str:
    return (
        _patiently(f"read({path})", path, os.O_RDONLY, lambda fd: os.read(fd, page_size())).decode().strip()
    )


def _write(path: Path, value: int | str) -> None:
    flags = os.O_WRONLY | os.O_TRUNC
    _patiently(f"write({path}, {value})", path, flags, lambda fd: os.write(fd, str(value).encode()))


@contextmanager
def _alone(place: _Place) -> Iterator[None]:
    """Between looking whether there are kdamonds and making one, no other process that does it this way."""
    fd = os.open(place.count, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _empty(place: _Place) -> None:
    """Take away the kdamond that is known to be ours."""
    try:
        if _read(place.state) == "on":
            _write(place.state, "off")
    except UspaceError:
        pass  # it ended in between, with its process: what counts is the next step
    _write(place.count, 0)


def _remove(place: _Place, owner: int) -> None:
    if os.getpid() != owner:
        return
    with _alone(place):
        if place.is_ours():
            _empty(place)
