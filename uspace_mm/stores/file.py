"""A store in a file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from uspace_mm._native import lib
from uspace_mm.errors import InputError, KernelError
from uspace_mm.sizes import parse_size
from uspace_mm.stores.base import Mode, Store, as_mode, new_handle

_DIRECT_BLOCK = 4096  # no page size: the largest logical block of common disks


class FileStore(Store):
    """`size` bytes of the file at `path` from byte `offset` on (default: all up to its end now).

    `mode` WRITEBACK writes modified units when they are evicted and on flush and close, with fdatasync(2).
    A file that becomes shorter loses the pages past its end: they raise, they never read as zero.
    `direct` reads and writes past the page cache (O_DIRECT; `offset` must be a multiple of 4096).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        offset: int = 0,
        size: int | str | None = None,
        mode: Mode | str = Mode.READONLY,
        *,
        direct: bool = False,
        retries: int = 0,
    ) -> None:
        mode = as_mode(mode)
        self.path = Path(path)
        if offset < 0 or (direct and offset % _DIRECT_BLOCK):
            raise InputError(
                f"{self.path}: offset {offset} must not be negative, and a multiple of 4096 if direct"
            )
        flags = os.O_RDWR if mode is Mode.WRITEBACK else os.O_RDONLY
        # O_NONBLOCK: opening a pipe must not wait for a writer.
        try:
            fd = os.open(self.path, flags | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_DIRECT if direct else 0))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise InputError(f"{self.path}: cannot open it: {reason}") from None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{self.path}: not a regular file")
            if status.st_size <= offset:
                raise InputError(f"{self.path}: has {status.st_size} bytes, nothing from offset {offset} on")
            wanted = status.st_size - offset if size is None else parse_size(size)
            if offset + wanted > status.st_size:
                raise InputError(
                    f"{self.path}: has {status.st_size} bytes, fewer than offset {offset} + size {wanted}"
                )
            super().__init__(wanted, mode, retries)
            handle = new_handle()
            error_number = lib.umm_store_file_create(fd, offset, wanted, mode, int(direct), handle)
            if error_number:
                raise KernelError(f"use {self.path} as a store", error_number, length=wanted)
            self._created(0, handle, f"use {self.path} as a store")
        finally:
            os.close(fd)
