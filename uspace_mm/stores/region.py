"""A store on another region."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from uspace_mm._native import lib
from uspace_mm.errors import InputError, KernelError
from uspace_mm.sizes import parse_size
from uspace_mm.stores.base import Mode, Store, as_mode, new_handle

if TYPE_CHECKING:
    from uspace_mm.pager.region import Region


class RegionStore(Store):
    """`size` bytes of `region` from byte `offset` on, as they are at the moment each unit is fetched.

    PRIVATE or READONLY. The region cannot be closed before the regions on it are; the store closes with the
    last of those. Regions of a pager in
    in-thread mode cannot be used. There are no cycles: a region's store is fixed when it is made.
    """

    def __init__(
        self,
        region: Region,
        offset: int = 0,
        size: int | str | None = None,
        mode: Mode | str = Mode.PRIVATE,
        *,
        retries: int = 0,
    ) -> None:
        mode = as_mode(mode)
        if mode is Mode.WRITEBACK:
            raise InputError("region store: write to the region itself; this store is private or readonly")
        wanted = region.size - offset if size is None else parse_size(size)
        if offset < 0 or wanted <= 0 or offset + wanted > region.size:
            raise InputError(
                f"region store: offset {offset} + size {wanted}: the region has {region.size} bytes"
            )
        super().__init__(wanted, mode, retries)
        handle = new_handle()
        error = lib.umm_store_region_create(region.handle, offset, wanted, mode, handle)
        if error == -errno.EOPNOTSUPP:
            raise InputError("region store: a region of a pager in in-thread mode cannot be a store")
        if error:
            raise KernelError("create a region store", error, length=wanted)
        self._created(0, handle, "create a region store")

    def region_closed(self) -> None:
        """The last region on this store gives the region underneath free."""
        super().region_closed()
        if self.users == 0:
            self.close()
