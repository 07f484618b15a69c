"""A show of events: this process changes memory of its own in every way that has a source of events.

Each :class:`Step` is something a program does; its ``run`` is followed by the events of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.kernel.mapping import RemapFlag, map_memory, remap, unmap
from uspace_mm.kernel.proc import page_size
from uspace_mm.notifier import Event, Process, calls, events
from uspace_mm.pager import Pager
from uspace_mm.stores import ZeroStore

_PAGES = 64
_QUIET_S = 0.1
_SAMPLED_S = 0.02

# Maps memory, writes half of it, gives it back, and ends when it is told to.
_OTHER = """
import mmap, sys, time
half = bytes(1 << 21)
print("ready", flush=True)
sys.stdin.readline()
memory = mmap.mmap(-1, 1 << 22)
time.sleep(0.1)
memory.write(half)
time.sleep(0.1)
memory.close()
time.sleep(0.1)
"""


@dataclass(frozen=True, slots=True)
class Step:
    """What is done, in words, and the events that it had."""

    text: str
    events: Iterator[Event]


def run() -> Iterator[Step]:
    """The steps of the show, one after the other; takes two seconds or so."""
    with ExitStack() as stack:
        pager = stack.enter_context(Pager())
        stream = stack.enter_context(events(timeout_s=_QUIET_S))

        def step(text: str, action: Callable[[], object]) -> Step:
            return Step(text, _after(action, stream))

        size = page_size()
        region = stack.enter_context(pager.map(ZeroStore(_PAGES * size)))
        array = region.array()
        array[:] = 1
        del array
        start = region.address
        yield step("the pager evicts 16 pages of a region", lambda: region.evict(0, 16 * size))
        yield step(
            "the program drops 8 pages of it: the kernel says so before, but not when it is done",
            lambda: madvise(start + 16 * size, 8 * size, Advice.DONTNEED),
        )
        place = map_memory(8 * size)
        flags = RemapFlag.MAYMOVE | RemapFlag.FIXED
        yield step(
            "it moves 8 pages away: the kernel says so afterwards",
            lambda: remap(start + 32 * size, 8 * size, 8 * size, flags=flags, new_address=place),
        )
        yield step("and unmaps them", lambda: unmap(place, 8 * size))
        own = map_memory(_PAGES * size)
        yield step("madvise, mremap and munmap of ordinary memory, made through us", lambda: _through_us(own))
        yield step("the process forks", _fork)
        yield step("the region is closed", region.close)
        yield from _another_process(stack)


def _after(action: Callable[[], object], stream: Iterator[Event]) -> Iterator[Event]:
    action()
    yield from stream


def _through_us(address: int) -> None:
    size = page_size()
    calls.madvise(address, 4 * size, Advice.DONTNEED)
    elsewhere = calls.mremap(address, _PAGES * size, 4 * _PAGES * size)
    calls.munmap(elsewhere, 4 * _PAGES * size)


def _fork() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _another_process(stack: ExitStack) -> Iterator[Step]:
    child = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    )
    stack.callback(_end, child)
    assert child.stdout is not None
    child.stdout.readline()
    process = stack.enter_context(Process(child.pid, interval_s=_SAMPLED_S))

    def start() -> None:
        assert child.stdin is not None
        child.stdin.write(b"go\n")
        child.stdin.flush()

    stream = stack.enter_context(events(space=process))
    yield Step("another process maps, writes and unmaps 4 MiB, and ends: sampled", _after(start, stream))


def _end(child: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        child.send_signal(signal.SIGKILL)
