"""Address spaces of other processes, watched from outside."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from tests.leaks import descriptors
from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.notifier import (
    Event,
    Kind,
    NoProcess,
    Notifier,
    NotifierError,
    Process,
    Promise,
    Reason,
    Released,
    Source,
    WouldDeadlock,
    events,
    register,
)

PAGE = mmap.PAGESIZE
SIZE = 1 << 20

# Does what it is told to, line by line, and says where its mapping is.
SERVANT = f"""
import ctypes, mmap, os, sys, time
mapping = mmap.mmap(-1, {SIZE})
view = ctypes.c_char.from_buffer(mapping)
print(ctypes.addressof(view), flush=True)
del view
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Servant:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVANT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid
        assert self.process.stdout is not None
        self.address = int(self.process.stdout.readline())

    def do(self, line: str, *, answers: bool = True) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        if answers:
            assert self.process.stdout.readline() == "done\n"


@contextmanager
def servants() -> Iterator[Servant]:
    servant = Servant()
    try:
        yield servant
    finally:
        servant.process.kill()
        servant.process.communicate()


@pytest.fixture
def servant() -> Iterator[Servant]:
    with servants() as one:
        yield one


class Recorder(Notifier):
    wait_s = None

    def __init__(self) -> None:
        self.events: list[Event] = []

    def _keep(self, event: Event) -> None:
        self.events.append(event)

    release = invalidate_range_start = invalidate_range_end = _keep

    def of(self, reason: Reason) -> list[Event]:
        return [event for event in self.events if event.reason is reason and event.kind is not Kind.END]


def until(condition: Callable[[], object]) -> None:
    # The watchdog of the tests ends one that waits for ever.
    while not condition():
        time.sleep(0.005)


@pytest.mark.parametrize("scan", [True, False], ids=["PAGEMAP_SCAN", "pagemap entries"])
def test_mappings_and_pages_are_seen_to_come_and_go(servant: Servant, scan: bool) -> None:
    recorder = Recorder()
    area = (servant.address, servant.address + SIZE)
    touched = (servant.address + 2 * PAGE, servant.address + 5 * PAGE)
    with Process(servant.pid, interval_s=0.01, scan=scan) as process:
        assert process.sees == ("end", "layout", "presence")
        assert process.limits == ()
        with register(recorder, *area, space=process):
            servant.do(f"mapping[{2 * PAGE}:{5 * PAGE}] = bytes(range(1, 2)) * {3 * PAGE}")
            until(lambda: recorder.of(Reason.PRESENCE))
            assert [(event.start, event.end) for event in recorder.of(Reason.PRESENCE)] == [touched]
            servant.do("mapping.madvise(mmap.MADV_DONTNEED)")
            until(lambda: len(recorder.of(Reason.PRESENCE)) == 2)
            servant.do("mapping.close()")
            until(lambda: recorder.of(Reason.UNMAP))
        told = {(event.start, event.end) for event in recorder.of(Reason.PRESENCE)}
        assert told == {touched}
        unmapped = recorder.of(Reason.UNMAP)[0]
        assert (unmapped.start, unmapped.end) == area
        for event in recorder.events[:-1]:
            assert (event.source, event.promise) == (Source.SAMPLE, Promise.SAMPLED)
            assert not event.ordered
            assert event.pid == servant.pid
        assert recorder.events[-1].reason is Reason.UNREGISTER
        starts = [event.id for event in recorder.events if event.kind is Kind.START]
        assert starts == [event.id for event in recorder.events if event.kind is Kind.END]


def test_protections_and_new_mappings_are_seen(servant: Servant) -> None:
    recorder = Recorder()
    with Process(servant.pid, interval_s=0.01, presence=False) as process:
        assert process.sees == ("end", "layout")
        with register(recorder, space=process):
            servant.do("other = mmap.mmap(-1, 1 << 24)")
            until(lambda: any(event.length >= 1 << 24 for event in recorder.of(Reason.MAP)))
            call = f"ctypes.CDLL(None).mprotect(ctypes.c_void_p({servant.address}), {PAGE}, 1)"
            servant.do(call)
            until(lambda: recorder.of(Reason.PROTECT))
    protected = recorder.of(Reason.PROTECT)[0]
    assert (protected.start, protected.end) == (servant.address, servant.address + PAGE)
    assert recorder.of(Reason.PRESENCE) == []


@pytest.mark.parametrize("interval_s", [None, 0.01])
def test_a_killed_process_is_released_once(servant: Servant, interval_s: float | None) -> None:
    first, second = Recorder(), Recorder()
    with (
        Process(servant.pid, interval_s=interval_s) as process,
        register(first, space=process) as one,
        register(second, 0, PAGE, space=process),
    ):
        servant.process.kill()
        until(lambda: process.ended and first.events and second.events)
        until(lambda: one.released)
        assert process.ended is Reason.EXIT
        with pytest.raises(Released, match="is gone already"):
            register(first, space=process)
        with pytest.raises(Released, match="is gone"):
            one.read_begin(1.0)
    for recorder in (first, second):
        released = [event for event in recorder.events if event.kind is Kind.RELEASE]
        assert [(event.reason, event.source, event.promise) for event in released] == [
            (Reason.EXIT, Source.PIDFD, Promise.AFTER)
        ]


@pytest.mark.parametrize("reaped", [False, True])
def test_a_process_that_ends_before_the_first_registration(servant: Servant, reaped: bool) -> None:
    recorder = Recorder()
    with Process(servant.pid, interval_s=0.01) as process:
        servant.process.kill()
        if reaped:
            servant.process.wait()
        else:
            os.waitid(os.P_PID, servant.pid, os.WEXITED | os.WNOWAIT)
            with Process(servant.pid) as zombie, register(recorder, space=zombie) as registration:
                until(lambda: registration.released)
        with register(recorder, space=process) as registration:
            until(lambda: registration.released)
    assert {event.reason for event in recorder.events} == {Reason.EXIT}
    servant.process.wait()
    with pytest.raises(NoProcess):
        Process(servant.pid)


@pytest.mark.parametrize("program", ["/bin/sleep", sys.executable])
def test_another_program_is_another_address_space(servant: Servant, program: str) -> None:
    recorder = Recorder()
    arguments = ["sleep", "60"] if "sleep" in program else [program, "-c", SERVANT]
    with Process(servant.pid, interval_s=0.01) as process, register(recorder, space=process) as registration:
        servant.do(f"os.execv({program!r}, {arguments!r})", answers=False)
        until(lambda: registration.released)
        assert process.ended is Reason.EXEC
    assert [event.reason for event in recorder.events if event.kind is Kind.RELEASE] == [Reason.EXEC]
    # The new one can be watched.
    with Process(servant.pid, interval_s=0.01) as process, register(recorder, space=process) as registration:
        servant.process.kill()
        until(lambda: registration.released)
        assert process.ended is Reason.EXIT


def test_own_memory_that_nobody_registered_elsewhere() -> None:
    with Process(os.getpid(), interval_s=0.01) as own, mmap.mmap(-1, SIZE) as mapping:
        array = np.frombuffer(mapping, np.uint8)
        start = array.ctypes.data
        recorder = Recorder()
        with register(recorder, array, space=own):
            mapping[: 4 * PAGE] = b"x" * (4 * PAGE)
            until(lambda: recorder.of(Reason.PRESENCE))
        del array
        seen = recorder.of(Reason.PRESENCE)[0]
        assert (seen.start, seen.end, seen.pid) == (start, start + 4 * PAGE, os.getpid())


def test_without_the_right_to_look(monkeypatch: pytest.MonkeyPatch, servant: Servant) -> None:
    from uspace_mm.errors import KernelError
    from uspace_mm.notifier import _looks

    def refuse(pid: int) -> object:
        raise KernelError(f"open(/proc/{pid}/pagemap)", 13, hint="of the test")

    monkeypatch.setattr(_looks, "Pagemap", refuse)
    with Process(servant.pid, interval_s=0.01) as process:
        assert process.sees == ("end", "layout")
        assert process.limits == (
            f"pages that come and go are not seen: open(/proc/{servant.pid}/pagemap): "
            "Permission denied [EACCES]; of the test",
        )
        with events(servant.address, servant.address + SIZE, space=process) as stream:
            servant.do("mapping.close()")
            assert next(stream).reason is Reason.UNMAP


def test_whose_mappings_may_not_be_read(servant: Servant) -> None:
    """As a user without rights: the end alone can be seen, and only when that was asked for."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            with pytest.raises(UnsupportedError, match="CAP_SYS_PTRACE"):
                Process(servant.pid)
            with Process(servant.pid, interval_s=None) as process:
                assert process.sees == ("end",)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_are_no_processes() -> None:
    with pytest.raises(NoProcess, match="thread of the kernel"):
        Process(2)
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        with pytest.raises(NoProcess, match="thread of one"):
            Process(thread.native_id)
    finally:
        done.set()
        thread.join()


def test_closing_ends_what_hangs_on_it(servant: Servant) -> None:
    before = descriptors()
    recorder = Recorder()
    process = Process(servant.pid, interval_s=0.01)
    registration = register(recorder, space=process)
    stream = events(space=process)
    process.close()
    process.close()
    assert registration.closed
    assert stream.closed
    assert [event.reason for event in recorder.events if event.kind is Kind.RELEASE] == [Reason.UNREGISTER]
    assert threading.active_count() == 1
    assert descriptors() == before
    with pytest.raises(InputError, match="is closed"):
        register(recorder, space=process)


def test_it_cannot_be_closed_in_a_callback(servant: Servant) -> None:
    refused: list[NotifierError] = []

    class Closing(Notifier):
        def release(self, event: Event) -> None:
            try:
                process.close()
            except WouldDeadlock as error:
                refused.append(error)

    with Process(servant.pid, interval_s=None) as process, register(Closing(), space=process) as registration:
        servant.process.kill()
        until(lambda: registration.released)
    assert len(refused) == 1
    assert "in a callback" in str(refused[0])


def test_many_holes_are_told_as_a_few_ranges(servant: Servant) -> None:
    recorder = Recorder()
    recorder.queue = 1 << 12
    with Process(servant.pid, interval_s=0.05) as process:
        servant.do(f"big = mmap.mmap(-1, {3000 * PAGE}); big.madvise(mmap.MADV_NOHUGEPAGE)")
        servant.do(
            "view = ctypes.c_char.from_buffer(big); print(ctypes.addressof(view), flush=True); del view",
            answers=False,
        )
        assert servant.process.stdout is not None
        start = int(servant.process.stdout.readline())
        assert servant.process.stdout.readline() == "done\n"

        def covered() -> np.ndarray:
            told = np.zeros(3000, bool)
            for event in recorder.of(Reason.PRESENCE):
                told[(event.start - start) // PAGE : (event.end - start) // PAGE] = True
            return told

        with register(recorder, start, start + 3000 * PAGE, space=process):
            servant.do(f"big[::{2 * PAGE}] = b'x' * 1500")
            until(lambda: covered()[::2].all())
            assert recorder.of(Reason.LOST) == []
