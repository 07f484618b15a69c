"""Faults and events of userfaultfd, made by one thread and served by another.

Faults are made by C functions, which release the GIL, so that this process can serve them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from uspace_mm.errors import KernelError
from uspace_mm.kernel import proc
from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.kernel.mapping import Mapping, RemapFlag, remap, unmap
from uspace_mm.kernel.pagemap import Pagemap, PagemapBit, has_bits
from uspace_mm.kernel.process import pidfd_getfd, pidfd_open
from uspace_mm.kernel.userfaultfd import (
    Event,
    FaultFlag,
    Feature,
    Fork,
    OutcomeKind,
    PageFault,
    RegisterMode,
    Remap,
    Remove,
    Source,
    Unmap,
    Userfaultfd,
    UserfaultfdBuilder,
    probe_features,
)

PAGE = proc.page_size()
WAIT_S = 20.0
# Declared once: ctypes releases the GIL for CDLL functions, so a fault inside leaves Python running.
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
LIBC.memset.restype = ctypes.c_void_p
LIBC.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
LIBC.memcpy.restype = ctypes.c_void_p


def lacks(feature: Feature) -> None:
    if feature not in probe_features():
        pytest.skip(f"lacks: {feature!r}")


@pytest.fixture
def uffd() -> Iterator[Userfaultfd]:
    everything = ~Feature.SIGBUS & ~Feature.WP_ASYNC & Feature(sum(Feature))
    wanted = everything & ~(
        Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP
    )
    with UserfaultfdBuilder().want(wanted).open() as opened:
        yield opened


@pytest.fixture
def worker() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def touch(address: int) -> int:
    """Read a byte with the GIL released."""
    into = ctypes.create_string_buffer(1)
    LIBC.memcpy(into, address, 1)
    return into.raw[0]


def touch_in_the_kernel(address: int) -> None:
    """Let the kernel read a byte: it answers EFAULT where a thread would get SIGBUS."""
    reader, writer = os.pipe()
    try:
        os.write(writer, (ctypes.c_char * 1).from_address(address))
    finally:
        os.close(reader)
        os.close(writer)


def next_event(uffd: Userfaultfd) -> Event:
    event = uffd.read(WAIT_S)
    assert event is not None, "no event arrived"
    return event


def during(
    uffd: Userfaultfd, worker: ThreadPoolExecutor, action: Callable[[], object]
) -> tuple[Event, Future[object]]:
    """Run `action`, which waits until its event was read; the event and the action's future."""
    future = worker.submit(action)
    return next_event(uffd), future


def test_a_fault_is_reported_served_and_woken(
    uffd: Userfaultfd, memory: Mapping, worker: ThreadPoolExecutor
) -> None:
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    tid = worker.submit(threading.get_native_id).result(WAIT_S)
    fault, future = during(uffd, worker, lambda: touch(memory.address + PAGE + 5))
    assert isinstance(fault, PageFault)
    assert fault.address & ~(PAGE - 1) == memory.address + PAGE
    assert not fault.flags & (FaultFlag.WRITE | FaultFlag.WP | FaultFlag.MINOR)
    assert fault.thread_id == (tid if Feature.THREAD_ID in uffd.granted else 0)
    if Feature.EXACT_ADDRESS in uffd.granted:
        assert fault.address == memory.address + PAGE + 5
    assert uffd.copy(memory.address + PAGE, b"\x88" * PAGE, wake=False).ok
    assert not future.done()
    uffd.wake(memory.address + PAGE, PAGE)
    assert future.result(WAIT_S) == 0x88
    assert uffd.read() is None


def test_a_write_says_so(uffd: Userfaultfd, memory: Mapping, worker: ThreadPoolExecutor) -> None:
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    fault, future = during(uffd, worker, lambda: LIBC.memset(memory.address, 9, 1))
    assert isinstance(fault, PageFault) and FaultFlag.WRITE in fault.flags
    uffd.zeropage(memory.address, PAGE).require()
    future.result(WAIT_S)
    assert memory.array[0] == 9


def test_write_protect_fault_and_release(
    uffd: Userfaultfd, memory: Mapping, worker: ThreadPoolExecutor
) -> None:
    lacks(Feature.PAGEFAULT_FLAG_WP)
    memory.array[:] = 1
    uffd.register(memory.address, memory.length, RegisterMode.WP)
    uffd.writeprotect(memory.address, memory.length).require()
    with Pagemap() as pagemap:
        entries = pagemap.entries(memory.address, memory.length)
        assert has_bits(entries, PagemapBit.UFFD_WP).all()
    assert memory.array[0] == 1, "reading goes on"
    fault, future = during(uffd, worker, lambda: LIBC.memset(memory.address, 7, 1))
    assert isinstance(fault, PageFault)
    assert fault.flags & (FaultFlag.WP | FaultFlag.WRITE) == FaultFlag.WP | FaultFlag.WRITE
    uffd.writeprotect(memory.address, PAGE, protect=False).require()
    future.result(WAIT_S)
    assert memory.array[0] == 7


def test_a_protected_copy_faults_on_write(
    uffd: Userfaultfd, memory: Mapping, worker: ThreadPoolExecutor
) -> None:
    lacks(Feature.PAGEFAULT_FLAG_WP)
    uffd.register(memory.address, memory.length, RegisterMode.MISSING | RegisterMode.WP)
    uffd.copy(memory.address, bytes(PAGE), write_protect=True).require()
    fault, future = during(uffd, worker, lambda: LIBC.memset(memory.address, 7, 1))
    assert isinstance(fault, PageFault) and FaultFlag.WP in fault.flags
    uffd.writeprotect(memory.address, PAGE, protect=False).require()
    future.result(WAIT_S)


def test_remove_remap_and_unmap_are_told(worker: ThreadPoolExecutor) -> None:
    events = Feature.EVENT_REMOVE | Feature.EVENT_REMAP | Feature.EVENT_UNMAP
    # The userfaultfd is closed first, which lets go whoever still waits for an event to be read.
    with (
        Mapping(4 * PAGE) as place,
        Mapping(4 * PAGE) as target,
        UserfaultfdBuilder().require(events).open() as uffd,
    ):
        old, new, length = place.address, target.address, place.length
        uffd.register(old, length, RegisterMode.MISSING)
        uffd.copy(old, b"x" * PAGE).require()

        event, future = during(uffd, worker, lambda: madvise(old + PAGE, 2 * PAGE, Advice.DONTNEED))
        assert event == Remove(old + PAGE, old + 3 * PAGE)
        future.result(WAIT_S)

        place.address = 0  # mremap takes it away
        flags = RemapFlag.MAYMOVE | RemapFlag.FIXED
        event, future = during(uffd, worker, lambda: remap(old, length, length, flags=flags, new_address=new))
        assert event == Remap(old, new, length)
        assert next_event(uffd) == Unmap(old, old + length)
        assert future.result(WAIT_S) == new
        assert target.array[0] == ord("x")

        event, future = during(uffd, worker, lambda: unmap(new, PAGE))
        assert event == Unmap(new, new + PAGE)
        future.result(WAIT_S)
        assert uffd.read() is None


@pytest.mark.parametrize("advice", [Advice.DONTNEED, Advice.DONTNEED_LOCKED, Advice.FREE])
def test_advice_that_drops_pages_waits_for_its_event(
    memory: Mapping, worker: ThreadPoolExecutor, advice: Advice
) -> None:
    with UserfaultfdBuilder().require(Feature.EVENT_REMOVE).open() as uffd:
        uffd.register(memory.address, memory.length, RegisterMode.MISSING)
        event, future = during(uffd, worker, lambda: madvise(memory.address, PAGE, advice))
        assert event == Remove(memory.address, memory.address + PAGE)
        future.result(WAIT_S)


@pytest.mark.parametrize("advice", [Advice.COLD, Advice.PAGEOUT, Advice.GUARD_INSTALL])
def test_other_advice_raises_no_event(memory: Mapping, worker: ThreadPoolExecutor, advice: Advice) -> None:
    with UserfaultfdBuilder().require(Feature.EVENT_REMOVE).open() as uffd:
        uffd.register(memory.address, memory.length, RegisterMode.MISSING)
        uffd.zeropage(memory.address, PAGE).require()
        try:
            worker.submit(lambda: madvise(memory.address, PAGE, advice)).result(WAIT_S)
        except KernelError as error:
            assert error.errno == errno.EINVAL
            pytest.skip(f"lacks: madvise({advice.name})")
        assert uffd.read() is None


def test_an_unread_event_defers_installs(memory: Mapping, worker: ThreadPoolExecutor) -> None:
    with UserfaultfdBuilder().require(Feature.EVENT_REMOVE).open() as uffd:
        uffd.register(memory.address, memory.length, RegisterMode.MISSING)
        future = worker.submit(lambda: madvise(memory.address, PAGE, Advice.DONTNEED))
        # Poll until the event is there without reading it.
        poll = select.poll()
        poll.register(uffd.fileno(), select.POLLIN)
        assert poll.poll(WAIT_S * 1000)
        assert uffd.copy(memory.address + PAGE, bytes(PAGE)).kind is OutcomeKind.DEFERRED
        assert uffd.read() == Remove(memory.address, memory.address + PAGE)
        future.result(WAIT_S)
        assert uffd.copy(memory.address + PAGE, bytes(PAGE)).ok


FORKING_PROCESS = """
import ctypes, os, sys
from uspace_mm.kernel.mapping import Mapping
from uspace_mm.kernel.userfaultfd import Feature, RegisterMode, UserfaultfdBuilder
memory = Mapping(int(sys.argv[1]))
uffd = UserfaultfdBuilder().require(Feature.EVENT_FORK).open()
uffd.register(memory.address, memory.length, RegisterMode.MISSING)
print(uffd.fileno(), memory.address, flush=True)
sys.stdin.readline()
if os.fork() == 0:
    os.write(1, (ctypes.c_char * 1).from_address(memory.address))
    os._exit(0)
os.wait()
sys.stdin.readline()
"""


def test_a_fork_hands_over_a_descriptor_of_the_childs_memory() -> None:
    """From another process: os.fork holds the GIL while it waits for the event to be read."""
    lacks(Feature.EVENT_FORK)
    with subprocess.Popen(
        [sys.executable, "-c", FORKING_PROCESS, str(4 * PAGE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdin and process.stdout
        pidfd = pidfd_open(process.pid)
        try:
            remote, address = map(int, process.stdout.readline().split())
            with (
                Userfaultfd.adopt(pidfd_getfd(pidfd, remote), Feature.EVENT_FORK) as parent,
                Pagemap(process.pid) as pagemap,
            ):
                process.stdin.write(b"\n")
                event = next_event(parent)
                assert isinstance(event, Fork)
                with Userfaultfd.adopt(event.uffd, parent.granted) as child:
                    fault = next_event(child)
                    assert isinstance(fault, PageFault) and fault.address == address
                    child.copy(address, b"\x99" * PAGE).require()
                    assert process.stdout.read(1) == b"\x99"
                    assert not pagemap.present(address, PAGE).any(), "the parent's page is still missing"
                    parent.copy(address, b"\x77" * PAGE).require()
                process.stdin.write(b"\n")
            assert process.wait(WAIT_S) == 0
        finally:
            os.close(pidfd)
            process.kill()


def test_user_mode_only_fails_the_system_call(memory: Mapping) -> None:
    with UserfaultfdBuilder(Source.USER_MODE).open() as uffd:
        uffd.register(memory.address, memory.length, RegisterMode.MISSING)
        with pytest.raises(OSError) as caught:
            touch_in_the_kernel(memory.address)
        assert caught.value.errno == errno.EFAULT


def test_reading_poison_is_an_error_not_a_zero(uffd: Userfaultfd, memory: Mapping) -> None:
    lacks(Feature.POISON)
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    uffd.poison(memory.address, PAGE).require()
    with pytest.raises(OSError) as caught:
        touch_in_the_kernel(memory.address)
    assert caught.value.errno == errno.EFAULT
