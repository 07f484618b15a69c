"""The preloaded library: changes of memory made by code that does not know us, told before and after.

Two uses. In a process that was started with LD_PRELOAD naming :func:`path`, this package finds the library
when it is loaded, and notifiers of the process hear of mmap, munmap, mremap, madvise, mprotect, exec and
_exit of all its code, with source PRELOAD and ORDERED. And :class:`Command` runs any program under it and
yields its events, and those of the programs it starts.

Not caught: what libc does inside of itself (memory that free() gives back), raw system calls, programs that
are linked statically or run with more rights than their caller's (ld.so(8)), and the bare calls of
:mod:`uspace_mm.kernel` (:mod:`uspace_mm.notifier.calls` tells of itself).
"""

from __future__ import annotations

import errno
import importlib.resources
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from uspace_mm._native import ffi, lib
from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.kernel._check import as_int, check
from uspace_mm.notifier.event import Event, event_of

__all__ = ["Command", "is_there", "path"]

_AT_A_TIME = 256
_PAUSE_S = 0.005


def path() -> Path:
    """The library, for LD_PRELOAD. Raises UnsupportedError when it was not installed with this package."""
    found = importlib.resources.files("uspace_mm") / "_preload" / "libumm_notify.so"
    if not found.is_file():
        raise UnsupportedError(
            "preload: libumm_notify.so is not part of this installation; install uspace-mm"
        )
    return Path(str(found))


def is_there() -> bool:
    """Whether this process was started under the library, and it calls us."""
    return bool(lib.umm_preload_is_there())


class Command:
    """A program under the preloaded library. Iterating yields its events, and those of its children, in the
    order in which they were written; ends when the program has ended.

    The program never waits for who reads: with `capacity` events unread (a power of two), more are counted in
    :attr:`lost`. It keeps standard input, output and error of this process unless `popen` says otherwise
    (arguments of :class:`subprocess.Popen`). :meth:`close` kills what still runs.

    Raises InputError for a command that cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        capacity: int = 1 << 16,
        popen: Mapping[str, Any] | None = None,
    ) -> None:
        self._ring: Any = None
        if isinstance(command, str) or not command:
            raise InputError("preload: expected a program and its arguments, one string each")
        library = str(path())
        if set(library) & set(" :"):
            raise UnsupportedError(
                f"preload: ld.so takes no library with a blank or colon in its path: {library}"
            )
        size = as_int("preload", "capacity", capacity, low=1, high=1 << 24)
        ring, fd = ffi.new("struct umm_event_ring **"), ffi.new("int *")
        error = lib.umm_event_ring_create(size, ring, fd)
        if error == -errno.EINVAL:
            raise InputError(f"preload: capacity {size} is not a power of two")
        check(error, "umm_event_ring_create", length=size)
        self._ring, self._fd = ring[0], fd[0]
        self._room = ffi.new("struct umm_notify_event[]", _AT_A_TIME)
        environment = dict(os.environ if env is None else env)
        others = environment.get("LD_PRELOAD", "")
        environment["LD_PRELOAD"] = f"{library}:{others}" if others else library
        environment["UMM_NOTIFY_SHM"] = f"/proc/{os.getpid()}/fd/{self._fd}"
        try:
            self._process = subprocess.Popen(list(command), env=environment, **(popen or {}))
        except (OSError, ValueError, TypeError) as failure:
            self._free()
            why = failure.strerror if isinstance(failure, OSError) else str(failure)
            raise InputError(f"preload: cannot start {command[0]}: {why}") from None

    @property
    def pid(self) -> int:
        """The program's process."""
        return self._process.pid

    @property
    def process(self) -> subprocess.Popen[Any]:
        """For its pipes and its exit status."""
        return self._process

    @property
    def lost(self) -> int:
        """Events that found no room, or whose writer was killed half way."""
        return int(lib.umm_event_ring_lost(self._alive()))

    @property
    def processes(self) -> int:
        """Processes that loaded the library. 0 after the end: the program is static or privileged, and
        nothing of it was caught."""
        return int(lib.umm_event_ring_processes(self._alive()))

    def poll(self) -> list[Event]:
        """What came since; does not wait."""
        count = lib.umm_event_ring_take(self._alive(), self._room, _AT_A_TIME)
        return [event_of(self._room[i]) for i in range(count)]

    def __iter__(self) -> Iterator[Event]:
        while True:
            # Asked first: what it wrote before its end is in the ring then.
            ended = self._process.poll() is not None
            if events := self.poll():
                yield from events
            elif ended:
                return
            else:
                time.sleep(_PAUSE_S)

    def close(self) -> None:
        """Kill the program if it runs, and let go of its events. Harmless when done already."""
        if self._ring is None:
            return
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        self._free()

    def _free(self) -> None:
        ring, self._ring = self._ring, None
        lib.umm_event_ring_destroy(ring, self._fd)

    def _alive(self) -> Any:
        if self._ring is None:
            raise InputError("preload: this command is closed")
        return self._ring

    def __enter__(self) -> Command:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
