"""userfaultfd against the running kernel: outcomes, faults, events, and what is left behind.

Faults are made by system calls (os.write from the missing page), which release the GIL, so that this
process can serve them.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import resource
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from uspace_mm.errors import InputError, KernelError, UnsupportedError
from uspace_mm.kernel import proc
from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.kernel.mapping import MapFlag, Mapping, Protection, RemapFlag, protect, remap, unmap
from uspace_mm.kernel.memfd import memfd_create
from uspace_mm.kernel.pagemap import Pagemap, PagemapBit, has_bits
from uspace_mm.kernel.process import pidfd_getfd, pidfd_open
from uspace_mm.kernel.userfaultfd import (
    Event,
    FaultFlag,
    Feature,
    Fork,
    Ioctl,
    OutcomeKind,
    PageFault,
    RegisterMode,
    Remap,
    Remove,
    Source,
    Unmap,
    Userfaultfd,
    UserfaultfdBuilder,
    UserfaultfdUnavailable,
    probe_features,
)

PAGE = proc.page_size()
WAIT_S = 20.0
# Declared once: ctypes releases the GIL for CDLL functions, so a fault inside leaves Python running.
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
LIBC.memset.restype = ctypes.c_void_p


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
def memory() -> Iterator[Mapping]:
    with Mapping(16 * PAGE) as mapping:
        if proc.pmd_size() is not None:
            madvise(mapping.address, mapping.length, Advice.NOHUGEPAGE)
        yield mapping


@pytest.fixture
def worker() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def touch(address: int) -> int:
    """Read a byte with the GIL released: the kernel reads it for a write to a pipe."""
    reader, writer = os.pipe()
    try:
        view = (ctypes.c_char * 1).from_address(address)
        os.write(writer, view)
        return os.read(reader, 1)[0]
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


def test_every_way_to_open_says_which_it_was() -> None:
    for source in (Source.SYSCALL, Source.DEVICE, Source.USER_MODE):
        with UserfaultfdBuilder(source).open() as opened:
            assert opened.source is source
            assert os.readlink(f"/proc/self/fd/{opened.fileno()}") == "anon_inode:[userfaultfd]"
            assert not os.get_inheritable(opened.fileno())
            assert not os.get_blocking(opened.fileno())
            assert Ioctl.REGISTER in opened.ioctls
        assert opened.closed
    with UserfaultfdBuilder().open() as opened:
        assert opened.source is Source.SYSCALL


def test_granted_is_required_and_what_was_wanted_and_had() -> None:
    available = probe_features()
    invented = Feature(1 << 40)
    builder = UserfaultfdBuilder().require(Feature.EVENT_REMOVE).want(Feature.THREAD_ID | invented)
    with builder.open() as opened:
        assert opened.granted == (Feature.EVENT_REMOVE | Feature.THREAD_ID) & available
    with pytest.raises(UnsupportedError, match="lacks 0x10000000000"):
        UserfaultfdBuilder().require(invented).open()


def test_the_kernels_fdinfo_agrees_on_features() -> None:
    with UserfaultfdBuilder().require(Feature.EVENT_REMOVE | Feature.THREAD_ID).open() as opened:
        info = Path(f"/proc/self/fdinfo/{opened.fileno()}").read_text()
    # "API: aa:<all features>:<ioctls>": what the kernel has, which holds what was granted.
    fields = next(line for line in info.splitlines() if line.startswith("API:")).split(":")
    assert int(fields[2], 16) & int(opened.granted) == int(opened.granted)


def test_copy_and_its_outcomes(uffd: Userfaultfd, memory: Mapping) -> None:
    ioctls = uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    assert Ioctl.COPY in ioctls
    first = uffd.copy(memory.address, b"\x11" * (2 * PAGE))
    assert (first.kind, first.done, first.error) == (OutcomeKind.INSTALLED, 2 * PAGE, 0)
    assert (memory.array[: 2 * PAGE] == 0x11).all()
    again = uffd.copy(memory.address, b"\x22" * PAGE)
    assert (again.kind, again.done, again.error) == (OutcomeKind.ALREADY_THERE, 0, errno.EEXIST)
    with pytest.raises(KernelError) as caught:
        again.require()
    assert (caught.value.call, caught.value.address) == ("ioctl(UFFDIO_COPY)", memory.address)
    assert (memory.array[: 2 * PAGE] == 0x11).all()


def test_a_copy_that_meets_a_present_page_is_partial(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    uffd.copy(memory.address + 2 * PAGE, b"\x33" * PAGE).require()
    outcome = uffd.copy(memory.address, b"\x44" * (4 * PAGE))
    assert (outcome.kind, outcome.done) == (OutcomeKind.PARTIAL, 2 * PAGE)
    assert (memory.array[: 2 * PAGE] == 0x44).all()
    assert (memory.array[2 * PAGE : 3 * PAGE] == 0x33).all()


def test_an_unregistered_range_is_gone(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    uffd.unregister(memory.address, PAGE)
    assert uffd.copy(memory.address, bytes(PAGE)).kind is OutcomeKind.GONE


def test_zeropage_poison_and_healing(uffd: Userfaultfd, memory: Mapping) -> None:
    lacks(Feature.POISON)
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    assert uffd.zeropage(memory.address, PAGE).ok
    assert not memory.array[:PAGE].any()
    place = memory.address + PAGE
    assert uffd.poison(place, PAGE).ok
    assert uffd.poison(place, PAGE).kind is OutcomeKind.ALREADY_THERE
    assert uffd.zeropage(place, PAGE).kind is OutcomeKind.ALREADY_THERE
    with Pagemap() as pagemap:
        assert not pagemap.present(place, PAGE).any()
    assert uffd.copy(place, b"\x55" * PAGE).ok
    assert memory.array[PAGE] == 0x55


def test_reading_poison_is_an_error_not_a_zero(uffd: Userfaultfd, memory: Mapping) -> None:
    lacks(Feature.POISON)
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    uffd.poison(memory.address, PAGE).require()
    with pytest.raises(OSError) as caught:
        touch(memory.address)
    assert caught.value.errno == errno.EFAULT


def test_move_takes_the_page_along(uffd: Userfaultfd, memory: Mapping) -> None:
    lacks(Feature.MOVE)
    memory.array[: 2 * PAGE] = 0x66
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    to = memory.address + 8 * PAGE
    assert uffd.move(to, memory.address, 2 * PAGE).ok
    with Pagemap() as pagemap:
        assert not pagemap.present(memory.address, 2 * PAGE).any()
        assert pagemap.present(to, 2 * PAGE).all()
    assert (memory.array[8 * PAGE : 10 * PAGE] == 0x66).all()
    hole = uffd.move(to + 4 * PAGE, memory.address, PAGE)
    assert hole.kind is OutcomeKind.GONE
    assert uffd.move(to + 4 * PAGE, memory.address, PAGE, allow_holes=True).ok
    occupied = uffd.move(to, to + PAGE, PAGE)
    assert occupied.kind is OutcomeKind.ALREADY_THERE


def test_moving_a_page_shared_with_a_child_is_busy(uffd: Userfaultfd, memory: Mapping) -> None:
    lacks(Feature.MOVE)
    memory.array[:PAGE] = 1
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    wait_r, wait_w = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(wait_w)
        os.read(wait_r, 1)
        os._exit(0)
    try:
        assert uffd.move(memory.address + PAGE, memory.address, PAGE).kind is OutcomeKind.BUSY
    finally:
        os.close(wait_w)
        os.close(wait_r)
        os.waitpid(child, 0)


def test_continue_maps_what_the_page_cache_has(uffd: Userfaultfd) -> None:
    lacks(Feature.MINOR_SHMEM)
    fd = memfd_create("minor", 2 * PAGE)
    try:
        with (
            Mapping(2 * PAGE, flags=MapFlag.SHARED, fd=fd) as filled,
            Mapping(2 * PAGE, flags=MapFlag.SHARED, fd=fd) as served,
        ):
            filled.array[:PAGE] = 0x77
            uffd.register(served.address, served.length, RegisterMode.MINOR)
            assert uffd.continue_(served.address, PAGE).ok
            assert (served.array[:PAGE] == 0x77).all()
            missing = uffd.continue_(served.address + PAGE, PAGE)
            assert (missing.kind, missing.error) == (OutcomeKind.FAILED, errno.EFAULT)
            assert uffd.continue_(served.address, PAGE).kind is OutcomeKind.ALREADY_THERE
            uffd.unregister(served.address, served.length)
    finally:
        os.close(fd)


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


def test_closing_turns_what_never_arrived_into_zeros(memory: Mapping) -> None:
    with UserfaultfdBuilder().open() as uffd:
        uffd.register(memory.address, memory.length, RegisterMode.MISSING)
        uffd.copy(memory.address, b"\x12" * PAGE).require()
    assert memory.array[0] == 0x12
    assert not memory.array[PAGE:].any()


def test_user_mode_only_fails_the_system_call(memory: Mapping) -> None:
    with UserfaultfdBuilder(Source.USER_MODE).open() as uffd:
        uffd.register(memory.address, memory.length, RegisterMode.MISSING)
        with pytest.raises(OSError) as caught:
            touch(memory.address)
        assert caught.value.errno == errno.EFAULT


def test_registering_twice_with_another_descriptor_is_busy(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    with UserfaultfdBuilder().open() as second:
        with pytest.raises(KernelError, match="registered with another userfaultfd") as caught:
            second.register(memory.address, memory.length, RegisterMode.MISSING)
        assert caught.value.errno == errno.EBUSY


def test_registering_what_is_not_mapped_is_one_line(uffd: Userfaultfd) -> None:
    with Mapping(PAGE) as mapping:
        address = mapping.address
    with pytest.raises(KernelError) as caught:
        uffd.register(address, PAGE, RegisterMode.MISSING)
    assert (caught.value.errno, caught.value.address, caught.value.length) == (errno.EINVAL, address, PAGE)
    assert "\n" not in str(caught.value)


def test_smaps_shows_the_registration(uffd: Userfaultfd, memory: Mapping) -> None:
    assert not {"um", "uw"} & proc.mapping_at(memory.address).vm_flags
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    assert "um" in proc.mapping_at(memory.address).vm_flags
    uffd.unregister(memory.address, memory.length)
    assert "um" not in proc.mapping_at(memory.address).vm_flags


def test_protected_memory_is_installed_all_the_same(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    protect(memory.address, PAGE, Protection.READ)
    assert uffd.copy(memory.address, b"\x01" * PAGE).ok
    assert memory.array[0] == 1


def test_a_closed_descriptor_is_an_input_error() -> None:
    uffd = UserfaultfdBuilder().open()
    uffd.close()
    uffd.close()
    with pytest.raises(InputError, match="closed"):
        uffd.read()


def test_no_descriptor_left_says_so_and_leaks_none() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    limit = max(int(name) for name in os.listdir("/proc/self/fd")) + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with pytest.raises(OSError):
            while True:
                held.append(os.dup(0))
        with pytest.raises(UserfaultfdUnavailable, match="ulimit -n"):
            UserfaultfdBuilder().open()
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_descriptor_taken_from_a_process_works(uffd: Userfaultfd, memory: Mapping) -> None:
    uffd.register(memory.address, memory.length, RegisterMode.MISSING)
    pidfd = pidfd_open(os.getpid())
    try:
        with Userfaultfd.adopt(pidfd_getfd(pidfd, uffd.fileno())) as taken:
            assert taken.copy(memory.address, b"\x21" * PAGE).ok
    finally:
        os.close(pidfd)
    assert memory.array[0] == 0x21


def test_nothing_is_left_after_many_rounds() -> None:
    def once() -> None:
        with Mapping(4 * PAGE) as mapping, UserfaultfdBuilder().want(Feature.MOVE).open() as uffd:
            uffd.register(mapping.address, mapping.length, RegisterMode.MISSING)
            uffd.copy(mapping.address, bytes(PAGE)).require()
            with pytest.raises(KernelError):
                uffd.register(0, PAGE, RegisterMode.MISSING)

    once()
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), _mapped()
    for _ in range(200):
        once()
    assert len(os.listdir("/proc/self/fd")) == before[0]
    # One leaked mapping per round would be 200 times 4 pages.
    assert _mapped() - before[1] < 100 * 4 * PAGE


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
