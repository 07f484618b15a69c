"""The process in which the function of a :class:`FunctionStore` runs."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

from uspace_mm._native import ffi, lib

_LOOK_MS = 500


def _find(module: str, name: str) -> Callable[[int, int], Any]:
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{name} is not callable")
    return found  # type: ignore[no-any-return]


def _answer(ring: Any, slot: int, function: Callable[[int, int], Any], offset: int, length: int) -> None:
    try:
        data = ffi.from_buffer("uint8_t[]", function(offset, length))
    except Exception:
        # The reader of the page gets EIO; why, it can only be told here.
        print(f"uspace_mm: function store, offset {offset}, {length} bytes:", file=sys.stderr)
        traceback.print_exc()
        lib.umm_ring_answer(ring, slot, ffi.NULL, 0, errno.EIO)
        return
    lib.umm_ring_answer(ring, slot, data, len(data), 0)


def _serve(ring: Any, function: Callable[[int, int], Any], parent: int) -> None:
    offset, length = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    while os.getppid() == parent:
        slot = lib.umm_ring_take(ring, _LOOK_MS, offset, length)
        if slot == -errno.ECANCELED:
            return
        if slot >= 0:
            _answer(ring, slot, function, int(offset[0]), int(length[0]))


def main() -> None:
    """Entry of the worker: one JSON argument, "ready" or one line of trouble on stdout."""
    job = json.loads(sys.argv[1])
    report = sys.stdout
    sys.stdout = sys.stderr  # what the function prints must not be taken for a report
    try:
        sys.path[:] = job["path"]
        function = _find(job["module"], job["name"])
        ring = ffi.new("struct umm_ring **")
        error = lib.umm_ring_attach(job["fd"], ring)
        if error:
            raise OSError(-error, os.strerror(-error))
    except Exception as trouble:
        print(f"{type(trouble).__name__}: {trouble}".splitlines()[0], file=report, flush=True)
        sys.exit(1)
    print("ready", file=report, flush=True)
    try:
        _serve(ring[0], function, job["parent"])
    except KeyboardInterrupt:
        pass  # Ctrl-C goes to the whole group; the parent decides
    finally:
        lib.umm_ring_detach(ring[0])
