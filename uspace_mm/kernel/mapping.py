"""mmap(2), munmap(2), mprotect(2), mremap(2), mincore(2): mappings as address and length.

:class:`Mapping` is a mapping that ends with its ``with`` block; the functions are the bare calls. Python's
own :mod:`mmap` lacks addresses, MAP_FIXED_NOREPLACE, MAP_HUGETLB and its sizes, and moving a mapping.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from enum import IntFlag
from types import TracebackType
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError
from uspace_mm.kernel._check import PAGE_SIZE, as_fd, as_int, as_range, check
from uspace_mm.kernel.proc import default_hugetlb_size


class Protection(IntFlag):
    """PROT_*."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXEC = 4


class MapFlag(IntFlag):
    """MAP_*. Sizes of hugetlb pages are an argument of :func:`map_memory`."""

    SHARED = lib.UMM_MAP_SHARED
    PRIVATE = lib.UMM_MAP_PRIVATE
    FIXED = lib.UMM_MAP_FIXED
    ANONYMOUS = lib.UMM_MAP_ANONYMOUS
    GROWSDOWN = lib.UMM_MAP_GROWSDOWN
    LOCKED = lib.UMM_MAP_LOCKED
    NORESERVE = lib.UMM_MAP_NORESERVE
    POPULATE = lib.UMM_MAP_POPULATE
    NONBLOCK = lib.UMM_MAP_NONBLOCK
    STACK = lib.UMM_MAP_STACK
    HUGETLB = lib.UMM_MAP_HUGETLB
    FIXED_NOREPLACE = lib.UMM_MAP_FIXED_NOREPLACE


class RemapFlag(IntFlag):
    """MREMAP_*."""

    MAYMOVE = lib.UMM_MREMAP_MAYMOVE
    FIXED = lib.UMM_MREMAP_FIXED
    DONTUNMAP = lib.UMM_MREMAP_DONTUNMAP


READ_WRITE = Protection.READ | Protection.WRITE
PRIVATE_ANONYMOUS = MapFlag.PRIVATE | MapFlag.ANONYMOUS

_MAP_HINTS = {
    errno.EEXIST: "something is mapped there (FIXED_NOREPLACE)",
    errno.ENOMEM: "no memory, or with HUGETLB no free page in the pool (vm.nr_hugepages)",
    errno.EINVAL: "check alignment and flags; with HUGETLB, that this page size exists",
    errno.EPERM: "a seal, a file system mounted noexec, or vm.mmap_min_addr forbids it",
    errno.EACCES: "the descriptor was not opened for this access",
    errno.ENODEV: "this kind of file cannot be mapped",
    errno.EBADF: "not an open descriptor",
    errno.EAGAIN: "more locked memory than the limit allows (ulimit -l)",
}


def check_huge_page_size(call: str, size: SupportsIndex) -> int:
    """`size`, which must be a power of two of at least one base page, or 0 for the default."""
    number = as_int(call, "huge_page_size", size)
    if number and (number & (number - 1) or number < PAGE_SIZE):
        raise InputError(f"{call}: huge_page_size {number} is not a power of two of at least {PAGE_SIZE}")
    return number


def map_memory(
    length: SupportsIndex,
    *,
    address: SupportsIndex = 0,
    protection: Protection = READ_WRITE,
    flags: MapFlag = PRIVATE_ANONYMOUS,
    fd: SupportsIndex | None = None,
    offset: SupportsIndex = 0,
    huge_page_size: SupportsIndex = 0,
    call: Callable[..., int] = lib.umm_map,
) -> int:
    """Map `length` bytes and return the address. `huge_page_size` in bytes picks a hugetlb pool (0 with
    HUGETLB: the default size). `call`: the native function."""
    name = "mmap"
    where, size = as_range(name, address, length)
    bits = as_int(name, "flags", flags)
    huge = check_huge_page_size(name, huge_page_size)
    if huge and not bits & MapFlag.HUGETLB:
        raise InputError(f"{name}: huge_page_size is for mappings with MapFlag.HUGETLB")
    if fd is None and not bits & MapFlag.ANONYMOUS:
        raise InputError(f"{name}: without MapFlag.ANONYMOUS a descriptor is needed")
    result = ffi.new("uint64_t *")
    check(
        call(
            where,
            size,
            as_int(name, "protection", protection, high=0x7FFFFFFF),
            bits | lib.umm_map_huge_bits(huge),
            -1 if fd is None else as_fd(name, fd),
            as_int(name, "offset", offset, high=(1 << 63) - 1),
            result,
        ),
        name,
        address=where or None,
        length=size,
        hints=_MAP_HINTS,
    )
    return int(result[0])


def unmap(address: SupportsIndex, length: SupportsIndex) -> None:
    """munmap(2). Arrays over the range become dangling: :class:`Mapping` guards against that."""
    start, size = as_range("munmap", address, length)
    check(lib.umm_unmap(start, size), "munmap", address=start, length=size)


def protect(address: SupportsIndex, length: SupportsIndex, protection: Protection) -> None:
    """mprotect(2)."""
    start, size = as_range("mprotect", address, length)
    bits = as_int("mprotect", "protection", protection, high=0x7FFFFFFF)
    check(lib.umm_protect(start, size, bits), "mprotect", address=start, length=size)


def remap(
    address: SupportsIndex,
    old_length: SupportsIndex,
    new_length: SupportsIndex,
    *,
    flags: RemapFlag = RemapFlag.MAYMOVE,
    new_address: SupportsIndex = 0,
    call: Callable[..., int] = lib.umm_remap,
) -> int:
    """mremap(2): the new address. `new_address` counts with RemapFlag.FIXED only. `call`: the native
    function."""
    name = "mremap"
    start, old = as_range(name, address, old_length)
    _, new = as_range(name, address, new_length)
    to = as_int(name, "new_address", new_address)
    result = ffi.new("uint64_t *")
    check(
        call(start, old, new, as_int(name, "flags", flags), to, result),
        name,
        address=start,
        length=old,
        hints={
            errno.ENOMEM: "no room to grow in place (RemapFlag.MAYMOVE), or no memory",
            errno.EFAULT: "the range is not one mapping",
        },
    )
    return int(result[0])


def mincore(address: SupportsIndex, length: SupportsIndex) -> NDArray[np.bool_]:
    """Which base pages of a mapped range are resident; shape (pages,). For files: in the page cache."""
    start, size = as_range("mincore", address, length)
    pages = np.zeros(-(-size // PAGE_SIZE), np.uint8)
    vector = ffi.from_buffer("uint8_t[]", pages, require_writable=True)
    check(lib.umm_mincore(start, size, vector), "mincore", address=start, length=size)
    return (pages & 1).astype(np.bool_)


class Mapping:
    """A mapping of this process that is unmapped by :meth:`close` or the end of the ``with`` block.

    ``with Mapping(1 << 21) as m: m.array[:] = 7``. Arguments as for :func:`map_memory`, plus `align`: the
    address is a multiple of it (a power of two; for huge pages). On hugetlb `length` is rounded up to whole
    huge pages.
    """

    def __init__(self, length: SupportsIndex, *, align: SupportsIndex = PAGE_SIZE, **arguments: Any) -> None:
        self.address = 0
        _, self.length = as_range("mmap", 0, length)
        if MapFlag.HUGETLB & arguments.get("flags", 0):
            # munmap wants whole huge pages, which mmap had rounded up to.
            page = arguments.get("huge_page_size") or default_hugetlb_size()
            self.length = -(-self.length // page) * page
        alignment = as_int("mmap", "align", align, low=1)
        if alignment & (alignment - 1):
            raise InputError(f"mmap: align {alignment} is not a power of two")
        if alignment <= PAGE_SIZE or arguments.get("address"):
            self.address = map_memory(self.length, **arguments)
        else:
            self.address = self._map_aligned(alignment, arguments)

    def _map_aligned(self, alignment: int, arguments: dict[str, Any]) -> int:
        # Reserve more than needed, give the ends back, and map over the middle.
        size = -(-self.length // PAGE_SIZE) * PAGE_SIZE
        reserved = map_memory(
            size + alignment, protection=Protection.NONE, flags=PRIVATE_ANONYMOUS | MapFlag.NORESERVE
        )
        start = -(-reserved // alignment) * alignment
        if start > reserved:
            unmap(reserved, start - reserved)
        if (tail := reserved + alignment - start) > 0:
            unmap(start + size, tail)
        flags = arguments.pop("flags", PRIVATE_ANONYMOUS) | MapFlag.FIXED
        try:
            return map_memory(self.length, address=start, flags=flags, **arguments)
        except BaseException:
            unmap(start, size)
            raise

    @property
    def array(self) -> NDArray[np.uint8]:
        """The bytes, shape (length,). Not to be used after :meth:`close`."""
        if not self.address:
            raise InputError("this mapping is closed")
        buffer = ffi.buffer(ffi.cast("uint8_t *", self.address), self.length)
        return np.frombuffer(buffer, np.uint8)

    def close(self) -> None:
        """Unmap; harmless when done already."""
        if self.address:
            address, self.address = self.address, 0
            unmap(address, self.length)

    def __enter__(self) -> Mapping:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Mapping {self.address:#x}, {self.length} bytes>" if self.address else "<Mapping closed>"
