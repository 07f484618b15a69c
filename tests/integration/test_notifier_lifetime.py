"""Notifiers and the life of a process: fork, exit, threads, and what is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tests.leaks import descriptors
from uspace_mm.errors import InputError
from uspace_mm.notifier import (
    Event,
    ForkedAway,
    Kind,
    Notifier,
    Process,
    Reason,
    events,
    invalidating,
    register,
    this_process,
)

COMMON = """
import os, sys, threading, time
from uspace_mm.notifier import *

class Printing(Notifier):
    def release(self, event):
        print("release", event.reason.name, event.source.name, event.promise.name, flush=True)

memory = bytearray(1 << 16)
"""


def run(code: str, *, status: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", COMMON + code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


EXIT = "release EXIT PROCESS ORDERED\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("register(Printing(), memory)", 0),
        ("register(Printing(wait_s=None), memory)", 0),
        ("register(Printing(), memory); sys.exit(3)", 3),
        ("register(Printing(), memory); raise ValueError", 1),
        ("threading.Thread(target=lambda: (time.sleep(0.1), register(Printing(), memory))).start()", 0),
        ("stream = events(); register(Printing(), memory)", 0),
        ("process = Process(os.getpid()); register(Notifier(), space=process); register(Printing())", 0),
        ("import asyncio; asyncio.run(asyncio.sleep(0)); register(Printing(), memory)", 0),
    ],
)
def test_release_comes_exactly_once_at_exit(code: str, status: int) -> None:
    out, _ = run(code, status=status)
    assert out == EXIT


def test_what_was_closed_is_not_released_again() -> None:
    out, err = run("register(Printing(), memory).close()\nregister(Printing())")
    assert (out, err) == ("release UNREGISTER LIBRARY ORDERED\n" + EXIT, "")


def test_memory_is_still_there_at_release() -> None:
    out, err = run(
        """
import mmap
mapping = mmap.mmap(-1, 1 << 16)
mapping[:5] = b"still"
class Reading(Notifier):
    def release(self, event):
        print(bytes(mapping[:5]), flush=True)
register(Reading(), mapping)
"""
    )
    assert (out, err) == ("b'still'\n", "")


def test_a_callback_that_never_returns_does_not_hold_up_the_end() -> None:
    out, err = run(
        """
class Stuck(Notifier):
    wait_s = 0.1
    def invalidate_range_start(self, event):
        threading.Event().wait()
    def release(self, event):
        print("cannot be")
register(Stuck(), memory)
register(Printing(), memory)
with invalidating(memory):
    pass
"""
    )
    assert out == EXIT
    assert "notifier Stuck: no answer for" in err


def test_ctrl_c_ends_the_waiting_for_a_callback_that_never_returns() -> None:
    out, err = run(
        """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
class Stuck(Notifier):
    wait_s = 0.1
    def invalidate_range_start(self, event):
        threading.Event().wait()
registration = register(Stuck(), memory)
with invalidating(memory):
    pass
main = threading.main_thread().ident
threading.Timer(0.2, signal.pthread_kill, [main, signal.SIGINT]).start()
try:
    registration.close()
except KeyboardInterrupt:
    print("interrupted", registration.closed)
"""
    )
    assert out == "interrupted False\n"
    assert "notifier Stuck: no answer for" in err


def test_an_exception_in_release_at_exit_is_one_line() -> None:
    out, err = run(
        """
class Faulty(Notifier):
    def release(self, event):
        raise OSError(5, "of the test")
register(Faulty(), memory)
register(Printing(), memory)
"""
    )
    assert out == EXIT
    assert err.count("\n") == 1
    assert err.startswith("notifier Faulty: release exit all of it of process ")


class Recorder(Notifier):
    def __init__(self) -> None:
        self.kinds: list[Kind] = []
        self.pids: set[int] = set()

    def _keep(self, event: Event) -> None:
        self.kinds.append(event.kind)
        self.pids.add(event.pid)

    release = invalidate_range_start = invalidate_range_end = _keep


def in_child(check: str, work: object) -> None:
    """Runs `work` in a forked child; fails when it does not say that all went well."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()  # type: ignore[operator]
            status = 0
        except BaseException as error:
            os.write(2, f"{check}: {type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, check


def test_a_forked_child_has_dead_registrations_and_can_make_its_own() -> None:
    memory = np.zeros(100, np.uint8)
    inherited = {fd for fd in descriptors() if "eventfd" in fd or "pidfd" in fd}
    recorder = Recorder()
    stream = events(memory)
    process = Process(os.getpid(), interval_s=None)
    parent = os.getpid()
    with register(recorder, memory) as registration, register(Recorder(), space=process):
        before = list(recorder.kinds)

        def work() -> None:
            recorder.kinds.clear()
            recorder.pids.clear()
            assert registration.closed
            assert len(os.listdir("/proc/self/task")) == 1
            for use in (
                lambda: registration.read_begin(1.0),
                lambda: registration.read_retry(1),
                lambda: next(stream),
                lambda: register(recorder, space=process),
            ):
                with pytest.raises(ForkedAway, match="forked"):
                    use()
            assert this_process().registrations == 0
            with invalidating(memory):
                pass
            assert recorder.kinds == []
            assert recorder.stats().calls[Kind.START] == 0
            with register(recorder, memory), invalidating(memory):
                assert recorder.kinds == [Kind.START]
            assert recorder.kinds[-1] is Kind.RELEASE
            assert recorder.pids == {os.getpid()} != {parent}
            registration.close()
            stream.close()
            process.close()
            assert {fd for fd in descriptors() if "eventfd" in fd or "pidfd" in fd} == inherited

        in_child("fork", work)
        with invalidating(memory):
            assert recorder.kinds[-1] is Kind.START
        assert before == []
    stream.close()
    process.close()


def test_a_fork_is_told() -> None:
    with events(timeout_s=0.5) as stream:
        in_child("nothing", lambda: None)
        told = [(event.kind, event.reason) for event in (next(stream), next(stream))]
    assert told == [(Kind.START, Reason.FORK), (Kind.END, Reason.FORK)]


def test_a_fork_from_a_callback() -> None:
    memory = bytearray(100)
    status: list[int] = []

    class Forking(Notifier):
        wait_s = 10.0

        def invalidate_range_start(self, event: Event) -> None:
            if event.reason is Reason.FORK:
                return
            child = os.fork()
            if child == 0:
                os._exit(7)
            status.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    with register(Forking(), memory), invalidating(memory):
        pass
    assert status == [7]


def test_forks_while_notifiers_are_at_work() -> None:
    """Locks of this room that another thread holds at a fork must not be found locked in the child."""
    memory = np.zeros(4096 * 4, np.uint8)  # no page size: only bytes
    end = threading.Event()

    def churn() -> None:
        while not end.is_set():
            recorder = Recorder()
            with register(recorder, memory), events(memory), invalidating(memory):
                recorder.stats()

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:

        def work() -> None:
            recorder = Recorder()
            with register(recorder, memory), invalidating(memory):
                assert recorder.kinds == [Kind.START]

        for _ in range(20):
            in_child("register in a child", work)
    finally:
        end.set()
        for thread in threads:
            thread.join()


def test_threads_and_descriptors_end_with_the_last_registration() -> None:
    memory = np.zeros(100, np.uint8)

    def state() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    before = state()
    first, second = register(Recorder(), memory), register(Recorder(), memory)
    assert threading.active_count() == 4  # one for each, and the one that asks for reports
    first.close()
    first.close()
    second.close()
    assert threading.active_count() == 1
    stream = events(memory)
    del stream  # a forgotten stream is closed
    deadline = time.monotonic() + 5
    while state() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state() == before
    assert this_process().registrations == 0


def test_a_closed_registration_says_so() -> None:
    registration = register(Recorder(), bytearray(8))
    registration.close()
    with pytest.raises(InputError, match="is closed"):
        registration.read_begin(0)
    with pytest.raises(InputError, match="is closed"):
        registration.read_retry(0)


class Leaving(Recorder):
    """Closes its registration in every fourth callback, maybe the first, while it is still being made."""

    def invalidate_range_start(self, event: Event) -> None:
        self.kinds.append(event.kind)
        if len(self.kinds) % 4 == 0:
            assert event.registration is not None
            event.registration.close()


def test_registrations_come_and_go_in_many_threads_while_memory_changes() -> None:
    memory = np.zeros(1000, np.uint8)
    end = time.monotonic() + 0.7
    shared = Leaving()
    faults: list[str] = []

    def churn(number: int) -> None:
        try:
            while time.monotonic() < end:
                with register(shared, memory[number * 10 :]) as registration:
                    try:
                        registration.read_retry(registration.read_begin(10.0))
                    except InputError as error:
                        assert "is closed" in str(error)
        except Exception as error:
            faults.append(repr(error))

    def change() -> None:
        while time.monotonic() < end:
            with invalidating(memory):
                pass

    threads = [threading.Thread(target=churn, args=(n,)) for n in range(6)]
    threads += [threading.Thread(target=change) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    stats = shared.stats()
    assert stats.calls[Kind.START] > 0
    assert (stats.late, stats.failed) == (0, 0)
    assert this_process().registrations == 0


def test_importing_the_room_starts_nothing() -> None:
    out, err = run("print(threading.active_count(), this_process().registrations)")
    assert (out, err) == ("1 0\n", "")
