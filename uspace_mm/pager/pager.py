"""A pager: handler threads, a budget, and the regions that it serves."""

from __future__ import annotations

import atexit
import errno
import os
import sys
import weakref
from typing import Any, Literal

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError, KernelError
from uspace_mm.kernel.proc import page_size
from uspace_mm.kernel.userfaultfd import Source, UserfaultfdUnavailable
from uspace_mm.pager.errors import RegionBusy
from uspace_mm.pager.region import Region
from uspace_mm.pager.statistics import Statistics, statistics_of
from uspace_mm.sizes import format_size, parse_size
from uspace_mm.stores.base import Mode, Store

_FORK = {"snapshot": 0, "exclude": 1}
_UNITS_IN_BUDGET = 8
_OPENING_ERRORS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOENT, errno.EMFILE, errno.ENFILE)


class Pager:
    """Serves the faults of its regions in native threads pinned to the CPUs this process may use.

    `budget`: resident bytes over all regions (``"64M"`` or an int; None: no limit). Above it the units that
    came in first are evicted. It must hold 8 units of every region.
    `in_thread`: each faulting thread serves itself by a SIGBUS handler (UFFD_FEATURE_SIGBUS): quicker, but
    a system call that touches a missing page fails with EFAULT.
    `handlers`: threads per userfaultfd, at most 4; 0: as many as CPUs, up to 4.
    `source`: how the userfaultfd is opened. `move`, `poison`: use UFFDIO_MOVE and
    UFFDIO_POISON where the kernel has them (6.8 and 6.6); without, the pager does as on older kernels.

    Raises UnsupportedError, naming the remedy, when no userfaultfd can be had. Source: userfaultfd(2).
    """

    def __init__(
        self,
        budget: int | str | None = None,
        *,
        in_thread: bool = False,
        handlers: int = 0,
        source: Source = Source.ANY,
        move: bool = True,
        poison: bool = True,
    ) -> None:
        self._handle: Any = None
        self._regions: dict[int, Region] = {}  # by id, oldest first
        if not 0 <= handlers <= 4:
            raise InputError(f"handlers {handlers}: expected 0 (one per CPU) to 4")
        options = ffi.new("struct umm_pager_options *")
        options.budget_bytes = self._budget_bytes(budget)
        options.handlers = handlers
        options.uffd_source = int(source)
        options.in_thread = in_thread
        options.no_move = not move
        options.no_poison = not poison
        result = ffi.new("struct umm_pager **")
        error = lib.umm_pager_create(options, result)
        if -error in _OPENING_ERRORS:
            raise UserfaultfdUnavailable(source, -error)
        if error:
            raise KernelError("start a pager", error)
        self._handle = result[0]
        self._owner = os.getpid()
        _living.add(self)

    @staticmethod
    def _budget_bytes(budget: int | str | None) -> int:
        if budget is None:
            return 0
        size = parse_size(budget)
        if size < _UNITS_IN_BUDGET * page_size():
            raise InputError(
                f"budget {budget!r}: must hold at least {_UNITS_IN_BUDGET} pages of {page_size()} bytes"
            )
        return size

    @property
    def handle(self) -> Any:
        """The ``struct umm_pager *`` for native code; raises InputError once the pager is closed."""
        if self._handle is None:
            raise InputError("this pager is closed")
        return self._handle

    @property
    def regions(self) -> tuple[Region, ...]:
        """The open regions."""
        return tuple(self._regions.values())

    def map(
        self,
        store: Store,
        size: int | str | None = None,
        unit: int | str | None = None,
        *,
        hugetlb: int | str | None = None,
        fork: Literal["snapshot", "exclude"] = "snapshot",
    ) -> Region:
        """A new region over `store`.

        `size`: bytes, default the store's. `unit`: what is brought in and evicted at a time, a power of two
        from the base page (default) to 2 MiB, or to a PMD's size where that is more (32 and 512 MiB with
        pages of 16 and 64 KiB); units of a PMD's size come as huge pages. `hugetlb`: the size of the huge
        pages to use, which is then the unit; the pool must have enough of them. `fork`: a child gets a
        private snapshot, or (exclude, and for stores in other processes) does not have the memory.
        """
        if fork not in _FORK:
            raise InputError(f"fork {fork!r}: expected one of {', '.join(_FORK)}")
        wanted = store.size if size is None else parse_size(size)
        if wanted > store.size:
            raise InputError(f"size {wanted}: the store has {store.size} bytes")
        options = ffi.new("struct umm_region_options *")
        options.size = wanted
        options.hugetlb = 0 if hugetlb is None else parse_size(hugetlb)
        options.unit = options.hugetlb or (page_size() if unit is None else parse_size(unit))
        options.fork_policy = _FORK[fork]
        self._check_unit(options.unit, bool(options.hugetlb))
        result = ffi.new("struct umm_region **")
        error = lib.umm_region_create(self.handle, store.handle, options, result)
        self._raise_for(error, wanted, options)
        region = Region(self, store, result[0], wanted)
        self._regions[id(region)] = region
        return region

    def _check_unit(self, unit: int, hugetlb: bool) -> None:
        largest = int(lib.umm_unit_max(self.handle))
        if unit & (unit - 1) or unit < page_size() or (unit > largest and not hugetlb):
            raise InputError(f"unit {unit}: expected a power of two from {page_size()} to {largest}")

    def _raise_for(self, error: int, size: int, options: Any) -> None:
        if not error:
            return
        if error == -errno.ENOBUFS:
            raise InputError(
                f"unit {options.unit}: the budget must hold {_UNITS_IN_BUDGET} units, "
                f"at least {format_size(_UNITS_IN_BUDGET * options.unit)}"
            )
        if error == -errno.ENOMEM and options.hugetlb:
            raise KernelError(
                "mmap(MAP_HUGETLB)", error, length=size, hint="is the huge page pool large enough?"
            )
        if error == -errno.EOPNOTSUPP:
            raise InputError("a store of this kind cannot be used by a pager in in-thread mode")
        raise KernelError("map a region", error, length=size)

    def set_budget(self, budget: int | str | None) -> None:
        """A new limit, or None for none; units above it are evicted in the background."""
        size = self._budget_bytes(budget)
        error = lib.umm_pager_set_budget(self.handle, size)
        if error == -errno.ENOBUFS:
            raise InputError(f"budget {budget!r}: must hold {_UNITS_IN_BUDGET} units of every region")
        if error:
            raise KernelError("set the budget", error, length=size)

    def stats(self) -> Statistics:
        """A snapshot over all regions, the closed ones included."""
        native = ffi.new("struct umm_pager_stats *")
        error = lib.umm_pager_stats(self.handle, native)
        if error:
            raise KernelError("read statistics", error)
        return statistics_of(native)

    def _forget(self, region: Region) -> None:
        self._regions.pop(id(region), None)

    def close(self) -> None:
        """Close every region, newest first, then stop the threads. RegionBusy while an array is held."""
        if self._handle is None:
            return
        for region in reversed(self.regions):
            region.close()
        error = lib.umm_pager_destroy(self._handle)
        if error == -errno.EBUSY:
            raise RegionBusy("the pager has regions that native code opened; close them first")
        if error:
            raise KernelError("stop a pager", error)
        self._handle = None
        _living.discard(self)

    def __enter__(self) -> Pager:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except RegionBusy:
            # Arrays that the exception's traceback keeps alive must not hide it.
            if kind is None:
                raise


_living: weakref.WeakSet[Pager] = weakref.WeakSet()


def _flush_at_exit() -> None:
    """What a program forgot to close is still written back; the memory itself goes with the process."""
    for pager in list(_living):
        if pager._owner != os.getpid():
            continue
        for region in pager.regions:
            if region.store.mode is Mode.WRITEBACK:
                try:
                    region.flush()
                except KernelError as error:
                    print(f"uspace_mm: at exit: {error}", file=sys.stderr)


atexit.register(_flush_at_exit)
