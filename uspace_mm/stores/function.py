"""A store whose bytes a Python function computes, in a process of its own.

A thread that touches a missing page holds the GIL while the kernel blocks it, so the function cannot run in
the process that uses the region: it would wait for ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError, KernelError
from uspace_mm.kernel.proc import page_size
from uspace_mm.kernel.process import pidfd_open
from uspace_mm.sizes import parse_size
from uspace_mm.stores.base import Mode, Store, as_mode, as_store_size, new_handle

_END_WAIT_S = 5.0


class FunctionStore(Store):
    """`size` bytes that ``function(offset, length)`` returns piece by piece, as a bytes-like object.

    The function must be importable by name (``module.function``); it runs in a spawned worker process, one
    call at a time. `unit`: the largest unit of a region on this store. An answer of another length, an
    exception, or no answer within `timeout_s` is a failed try; after `retries` more the unit is lost
    (:class:`PageLost`). When the worker dies, everything that was not fetched yet is lost. Regions on it are
    not in forked children.
    """

    def __init__(
        self,
        function: Callable[[int, int], Any],
        size: int | str,
        *,
        unit: int | str | None = None,
        mode: Mode | str = Mode.PRIVATE,
        retries: int = 0,
        timeout_s: float = 10.0,
    ) -> None:
        mode = as_mode(mode)
        if mode is Mode.WRITEBACK:
            raise InputError("function store: there is nothing to write back to; use private or readonly")
        if not 0.001 <= timeout_s <= 86400:
            raise InputError(f"timeout_s {timeout_s}: expected 0.001 to 86400 seconds")
        module, name = self._importable(function)
        super().__init__(as_store_size(size), mode, retries)
        self.unit = page_size() if unit is None else parse_size(unit)
        handle, ring_fd = new_handle(), ffi.new("int *")
        error = lib.umm_store_function_create(self.size, self.unit, mode, ring_fd, handle)
        if error:
            raise KernelError("create a function store", error, length=self.size)
        self._created(0, handle, "create a function store", int(timeout_s * 1000))
        self._worker: subprocess.Popen[bytes] | None = None
        try:
            self._start(ring_fd[0], module, name)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _importable(function: Callable[[int, int], Any]) -> tuple[str, str]:
        module = getattr(function, "__module__", None)
        name = getattr(function, "__qualname__", None)
        if not callable(function) or not module or not name or "<" in name:
            raise InputError(
                f"function store: {function!r} must be a function of a module, not a lambda or a local one: "
                "it runs in another process, which imports it by name"
            )
        if module == "__main__":
            raise InputError(
                f"function store: {name} is defined in the script that is running; "
                "move it to a module that can be imported"
            )
        return module, name

    def _start(self, ring_fd: int, module: str, name: str) -> None:
        job = json.dumps(
            {"fd": ring_fd, "module": module, "name": name, "path": sys.path, "parent": os.getpid()}
        )
        worker = subprocess.Popen(
            [sys.executable, "-c", "from uspace_mm.stores.worker import main; main()", job],
            pass_fds=(ring_fd,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self._worker = worker
        assert worker.stdout is not None
        # The worker says "ready", or why it cannot be.
        said = worker.stdout.readline().decode(errors="replace").strip()
        if said != "ready":
            raise InputError(f"function store: {module}.{name}: {said or 'the worker died at its start'}")
        pidfd = pidfd_open(worker.pid)
        try:
            error = lib.umm_store_function_start(self.handle, pidfd)
        finally:
            os.close(pidfd)
        if error:
            raise KernelError("start the thread of a function store", error)

    @property
    def worker_pid(self) -> int:
        """The process in which the function runs."""
        assert self._worker is not None
        return self._worker.pid

    def close(self) -> None:
        """Give up this reference; with the last region on it gone, the worker ends."""
        super().close()
        if self.users == 0:
            self.released()

    def released(self) -> None:
        self._end_worker()

    def _end_worker(self) -> None:
        """Wait for the worker, which ends by itself once the ring is closed; kill it when it hangs."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        if worker.stdout is not None:
            worker.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(0.2)
            return
        worker.terminate()
        try:
            worker.wait(_END_WAIT_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
