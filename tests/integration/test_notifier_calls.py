"""Calls made through us and the kernel's own events, as Python's notifiers hear of them."""

from __future__ import annotations

import ctypes
import errno
import mmap as python_mmap
import os
import queue
import threading

import pytest

from uspace_mm.errors import InputError, KernelError
from uspace_mm.kernel.madvise import Advice
from uspace_mm.kernel.mapping import PRIVATE_ANONYMOUS, MapFlag, Mapping, Protection, RemapFlag
from uspace_mm.notifier import Event, Kind, Notifier, Promise, Reason, Source, calls, register
from uspace_mm.notifier.watch import Watch

PAGE = python_mmap.PAGESIZE


class Recorder(Notifier):
    def __init__(self) -> None:
        super().__init__()
        self.events: queue.Queue[Event] = queue.Queue()

    def _take(self, event: Event) -> None:
        self.events.put(event)

    def invalidate_range_start(self, event: Event) -> None:
        self._take(event)

    def invalidate_range_end(self, event: Event) -> None:
        self._take(event)

    def change(self, event: Event) -> None:
        self._take(event)


def told(recorder: Recorder) -> list[tuple[Kind, Reason, int, int, int]]:
    """One change, whose end comes a moment after the call has returned."""
    events = [recorder.events.get(timeout=30) for _ in range(2)]
    assert all(event.source is Source.CALL and event.promise is Promise.ORDERED for event in events)
    return [(event.kind, event.reason, event.start, event.end, event.error) for event in events]


def pair(reason: Reason, start: int, end: int, error: int = 0) -> list[tuple[Kind, Reason, int, int, int]]:
    return [(Kind.START, reason, start, end, 0), (Kind.END, reason, start, end, error)]


def test_calls_tell_what_changes() -> None:
    at = calls.mmap(8 * PAGE)
    there = calls.mmap(4 * PAGE)
    recorder = Recorder()
    with register(recorder, at, at + 8 * PAGE):
        calls.madvise(at, PAGE + 1, Advice.DONTNEED)
        assert told(recorder) == pair(Reason.REMOVE, at, at + 2 * PAGE)
        calls.madvise(at, PAGE, Advice.WILLNEED)
        assert recorder.events.empty()
        calls.mprotect(at, PAGE, Protection.READ)
        assert told(recorder) == pair(Reason.PROTECT, at, at + PAGE)
        moved = RemapFlag.MAYMOVE | RemapFlag.FIXED
        assert calls.mremap(at + 2 * PAGE, PAGE, PAGE, flags=moved, new_address=there) == there
        assert recorder.events.get(timeout=30).reason is Reason.MOVE
        assert recorder.events.get(timeout=30).to == there
        assert calls.mmap(PAGE, address=at + 3 * PAGE, flags=PRIVATE_ANONYMOUS | MapFlag.FIXED)
        assert told(recorder) == pair(Reason.UNMAP, at + 3 * PAGE, at + 4 * PAGE)
        with pytest.raises(KernelError, match="mapped") as caught:
            calls.madvise(at, 4 * PAGE, Advice.DONTNEED)
        assert caught.value.errno == errno.ENOMEM
        assert told(recorder) == pair(Reason.REMOVE, at, at + 4 * PAGE, errno.ENOMEM)
        with pytest.raises(InputError):
            calls.munmap(at, 0)
        with pytest.raises(KernelError):
            calls.munmap(at + 1, PAGE)
        assert recorder.events.empty()
        calls.munmap(at, 8 * PAGE)
        assert told(recorder) == pair(Reason.UNMAP, at, at + 8 * PAGE)
    calls.munmap(there, 4 * PAGE)


def test_a_watch_sees_what_others_do() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    memory = libc.malloc(64 << 20)
    at = -(-memory // PAGE) * PAGE
    recorder = Recorder()
    with Watch() as watch, register(recorder, at, at + PAGE):
        watch.add(at, at + 2 * PAGE)
        assert watch.stats().bytes == 2 * PAGE
        thread = threading.Thread(target=libc.free, args=(memory,))
        thread.start()
        thread.join()
        first, last = (recorder.events.get(timeout=30) for _ in range(2))
        assert (first.kind, last.kind, first.id) == (Kind.START, Kind.END, last.id)
        assert (first.source, first.promise, first.reason) == (Source.KERNEL, Promise.AFTER, Reason.UNMAP)
        assert first.start <= at and at + 2 * PAGE <= first.end and not first.ordered
        watch.remove(at, at + 2 * PAGE)
        assert watch.stats().pieces == 0 and watch.stats().unmaps == 1


def test_a_watch_refuses_in_one_line() -> None:
    with Mapping(2 * PAGE) as memory, Watch() as watch:
        for start, end, number in (
            (memory.address + 1, memory.address + PAGE, errno.EINVAL),
            (0, PAGE, errno.ENOMEM),
        ):
            with pytest.raises(KernelError) as caught:
                watch.add(start, end)
            assert caught.value.errno == number and "\n" not in str(caught.value)
        with pytest.raises(KernelError, match="not all of it was added"):
            watch.remove(memory)
        watch.add(memory)
        if (pid := os.fork()) == 0:
            try:
                watch.add(memory)
            except KernelError as error:
                os._exit(0 if error.errno == errno.ESRCH else 1)
            os._exit(2)
        assert os.waitpid(pid, 0)[1] == 0
        watch.remove(memory)
        assert watch.changing is False
        watch.close()
        with pytest.raises(InputError, match="closed"):
            watch.stats()
