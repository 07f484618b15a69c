"""Sender and receiver in one process over socket pairs: every byte, every broken arrow of the protocol."""

from __future__ import annotations

import mmap
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import pytest

from tests.integration.postcopy_frames import (
    CONTENT,
    HELLO,
    IDLE_S,
    PAGE,
    PAGES,
    PAGES_FRAME,
    frame,
    page_payload,
)
from uspace_mm.errors import KernelError
from uspace_mm.postcopy.errors import (
    ConnectionLost,
    PeerTimeout,
    PostcopyError,
    ProtocolError,
)
from uspace_mm.postcopy.receiver import PagesLost, Receiver
from uspace_mm.postcopy.sender import Sender


def source_memory(pages: int = PAGES) -> npt.NDArray[np.uint8]:
    memory = np.frombuffer(mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    # a third is never touched, and every seventh page of the rest is zero though it was written
    table = memory.reshape(pages, PAGE)
    written = pages * 2 // 3
    table[:written] = np.random.default_rng(1).integers(0, 256, (written, PAGE), np.uint8)
    table[:written:7] = 0
    return memory


class Migration:
    """Both sides, connected; the source serves in a thread of its own."""

    def __init__(self) -> None:
        self.memory = source_memory()
        self.sender = Sender(self.memory, IDLE_S)
        self.receiver = Receiver(IDLE_S)
        self.serving: threading.Thread | None = None
        self.serve_error: Exception | None = None
        self.sockets: list[int] = []

    def connect(self) -> None:
        for _ in range(2):
            ours, theirs = socket.socketpair()
            accepting = threading.Thread(target=self.sender.accept, args=(ours,))
            accepting.start()
            self.receiver.connect(theirs, 1 << 30)
            accepting.join()

    def precopy(self, before_switch: Callable[[], None] = lambda: None, rounds: int = 1) -> bytes:
        """Rounds and the switch; `before_switch` runs between the two."""
        states: list[bytes] = []
        receiving = threading.Thread(target=lambda: states.append(self.receiver.precopy()))
        receiving.start()
        for _ in range(rounds):
            self.sender.round()
        before_switch()
        self.sender.switch(1, b"state")
        receiving.join()
        return states[0]

    def serve(self, rate: int = 0) -> None:
        def run() -> None:
            try:
                self.sender.serve(rate)
            except Exception as error:
                self.serve_error = error

        self.serving = threading.Thread(target=run)
        self.serving.start()

    def close(self) -> None:
        self.receiver.close()
        self.sender.stop()
        if self.serving is not None:
            self.serving.join()
        self.sender.close()


@pytest.fixture
def migration() -> Iterator[Migration]:
    migration = Migration()
    try:
        yield migration
    finally:
        migration.close()


def scribble(memory: npt.NDArray[np.uint8]) -> None:
    """Write to pages that were sent, to one that was never touched, and zero one."""
    table = memory.reshape(PAGES, PAGE)
    table[100:200:3, 5] += 1
    table[1] = 0
    table[PAGES - 1, PAGE - 1] = 77


def test_every_byte_arrives(migration: Migration) -> None:
    migration.connect()
    assert migration.precopy(lambda: scribble(migration.memory)) == b"state"
    content = migration.memory.tobytes()
    arrived = migration.receiver.enter()
    migration.receiver.running()
    migration.serve()
    assert arrived.tobytes() == content
    assert migration.receiver.await_complete(10)
    stats = migration.receiver.stats()
    assert (stats["verified"], stats["mismatched"], stats["lost_pages"]) == (PAGES, 0, 0)
    assert stats["missing_pages"] == 34 + 1 + 1 == stats["arrived_pages"]
    assert migration.serving is not None
    migration.serving.join()
    sent = migration.sender.stats()
    assert sent["zero_pages"] == np.count_nonzero(~migration.memory.reshape(PAGES, PAGE).any(axis=1))
    # zeros and what was never touched are not on the wire; a page that is asked for while it is in the
    # stream is sent twice
    carried = PAGES - sent["zero_pages"] + stats["missing_pages"] + sent["urgent_pages"]
    assert sent["bytes_sent"] < carried * (PAGE + 40) + 64 * 1024


def test_faults_are_served_while_the_stream_waits(migration: Migration) -> None:
    migration.connect()
    migration.precopy(lambda: scribble(migration.memory))
    arrived = migration.receiver.enter().reshape(PAGES, PAGE)
    migration.receiver.running()
    migration.serve(rate=1)  # a page takes an hour: what comes, comes because it was asked for
    wanted = [100 + 3 * n for n in range(34)]
    for page in reversed(wanted[5:]):
        assert bytes(arrived[page]) == bytes(migration.memory.reshape(PAGES, PAGE)[page])
    faults = migration.receiver.faults()
    assert faults.faults + faults.overtaken >= len(wanted) - 5 - 32  # the stream's first run may be faster
    assert faults.faults > 0
    assert 0 < faults.p50_ns <= faults.p99_ns <= faults.p999_ns <= faults.slowest_ns
    assert faults.slowest_stage in ("queue", "fetch", "install")
    assert sum(count for _, _, count in faults.histogram) == faults.faults


def test_writes_during_the_rounds_are_not_lost(migration: Migration) -> None:
    """A writer that never pauses between scan, copy and send: the switch has to find all it wrote."""
    migration.connect()
    stop = threading.Event()
    table = migration.memory.view(np.uint64).reshape(PAGES, PAGE // 8)

    def write() -> None:
        random = np.random.default_rng(2)
        while not stop.is_set():
            table[random.integers(0, PAGES, 50), random.integers(0, PAGE // 8, 50)] += np.uint64(1)

    writer = threading.Thread(target=write)
    writer.start()

    def halt() -> None:
        stop.set()
        writer.join()

    try:
        migration.precopy(halt, rounds=30)
    finally:
        halt()
    arrived = migration.receiver.enter()
    migration.receiver.running()
    migration.serve()
    assert migration.receiver.await_complete(10)
    assert arrived.tobytes() == migration.memory.tobytes()
    assert migration.receiver.stats()["mismatched"] == 0


def test_a_write_that_is_not_sent_is_counted_as_a_mismatch(migration: Migration) -> None:
    """The comparison is a real one: the source breaks its promise and writes after the switch."""
    migration.connect()
    migration.precopy(lambda: scribble(migration.memory))
    migration.receiver.enter()
    migration.memory[50 * PAGE] ^= 1
    migration.memory[(PAGES - 5) * PAGE] ^= 1
    migration.receiver.running()
    migration.serve()
    assert migration.receiver.await_complete(10)
    stats = migration.receiver.stats()
    assert (stats["verified"], stats["mismatched"]) == (PAGES - 2, 2)


def test_the_destination_may_write_at_once(migration: Migration) -> None:
    migration.connect()
    migration.precopy(lambda: scribble(migration.memory))
    arrived = migration.receiver.enter()
    before = migration.memory.tobytes()
    migration.receiver.running()
    migration.serve()
    arrived[::PAGE] += 1  # some of these pages are missing: the write waits for the page, then changes it
    assert migration.receiver.await_complete(10)
    expected = np.frombuffer(before, np.uint8).copy()
    expected[::PAGE] += 1
    assert arrived.tobytes() == expected.tobytes()
    assert migration.receiver.stats()["verified"] == PAGES


def test_report_and_verdict_cross(migration: Migration) -> None:
    migration.connect()
    migration.precopy()
    migration.receiver.enter()
    migration.receiver.running()
    migration.serve()
    assert migration.receiver.await_complete(10)
    assert migration.serving is not None
    migration.serving.join()
    answer: list[bytes] = []
    finishing = threading.Thread(target=lambda: answer.append(migration.receiver.finish(b"report")))
    finishing.start()
    assert migration.sender.await_finish() == b"report"
    migration.sender.alive()
    migration.sender.verdict(b"verdict")
    finishing.join()
    assert answer == [b"verdict"]


def test_calls_out_of_order_are_refused(migration: Migration) -> None:
    for call in (migration.sender.round, lambda: migration.sender.switch(1, b""), migration.sender.serve):
        with pytest.raises(KernelError):
            call()
    for receive in (migration.receiver.precopy, migration.receiver.enter, migration.receiver.running):
        with pytest.raises(KernelError):
            receive()


def test_memory_that_is_not_page_aligned_is_refused() -> None:
    memory = source_memory(4)
    for bad in (memory[1:], memory[: PAGE + 1], memory[:0]):
        with pytest.raises(KernelError):
            Sender(bad)


def test_lost_pages_are_an_error_and_never_zeros(migration: Migration) -> None:
    """The source dies while a thread waits for a page: the thread goes on at once, and learns it."""
    migration.connect()
    migration.precopy(lambda: scribble(migration.memory))
    arrived = migration.receiver.enter()
    migration.receiver.running()
    touched = threading.Event()
    seen: list[BaseException] = []

    def use() -> None:
        try:
            with migration.receiver.guard():
                touched.set()
                arrived[100 * PAGE : 101 * PAGE].copy()
        except PostcopyError as error:
            seen.append(error)

    using = threading.Thread(target=use)
    using.start()
    # The touching thread holds the GIL while it waits for the page; only C code may run, and the close of the
    # sender happens when the idle timeout of the receiver has failed the page.
    touched.wait()
    using.join()
    assert len(seen) == 1 and isinstance(seen[0], PagesLost)
    stats = migration.receiver.stats()
    assert stats["lost_pages"] == 36
    with pytest.raises(PeerTimeout, match="moved nothing for"):
        migration.receiver.await_complete(1)
    # what had arrived is still right, and what had not is never taken for zeros
    assert bytes(arrived[PAGE * 4 : PAGE * 5]) == bytes(migration.memory[PAGE * 4 : PAGE * 5])
    with pytest.raises(PagesLost), migration.receiver.guard():
        assert set(arrived[PAGE : 2 * PAGE].tolist()) == {0xBD}


@pytest.mark.parametrize(
    ("hello", "kind"),
    [
        (b"GET / HTTP/1.1\r\nHost: example\r\n\r\n", ProtocolError),
        (bytes(100), ProtocolError),
        (frame(HELLO, payload=struct.pack("<QII", 0, 0, PAGE * 4)), ProtocolError),
        (frame(HELLO, payload=struct.pack("<QII", 0, 1, PAGE)), ProtocolError),
        (frame(HELLO, payload=bytes(16), length=1 << 31), ProtocolError),
        (frame(PAGES_FRAME, 0, 1, page_payload(CONTENT)), ProtocolError),
        (None, ConnectionLost),
    ],
)
def test_the_source_refuses_and_goes_on_listening(hello: bytes | None, kind: type[Exception]) -> None:
    with Sender(source_memory(16), IDLE_S) as sender:
        ours, theirs = socket.socketpair()
        if hello is None:
            theirs.close()
        else:
            theirs.sendall(hello)
        with theirs, pytest.raises(kind):
            sender.accept(ours)
        assert sender.connections == 0
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(frame(HELLO, payload=struct.pack("<QII", 0, 0, PAGE)))
            sender.accept(ours)
            assert sender.connections == 1


@pytest.mark.slow
@pytest.mark.parametrize("drip", [False, True])
def test_a_silent_peer_does_not_hold_the_source(drip: bool) -> None:
    """Neither silence nor a byte now and then outlasts the handshake's deadline."""
    with Sender(source_memory(16), IDLE_S) as sender:
        ours, theirs = socket.socketpair()
        stop = threading.Event()

        def send() -> None:
            hello = frame(HELLO, payload=struct.pack("<QII", 0, 0, PAGE))
            at = 0
            while drip and not stop.wait(0.3):
                with suppress(OSError):
                    theirs.send(hello[at : at + 1])
                at += 1

        dripping = threading.Thread(target=send)
        dripping.start()
        try:
            with theirs, pytest.raises(PeerTimeout):
                sender.accept(ours)
        finally:
            stop.set()
            dripping.join()


def test_a_destination_that_leaves_during_precopy(migration: Migration) -> None:
    migration.connect()
    migration.receiver.close()
    with pytest.raises(ConnectionLost):
        for _ in range(3):
            migration.sender.round()
            scribble(migration.memory)
    # the data is the source's still: it can be read and written
    migration.memory[:] += 1


def test_a_destination_that_leaves_after_the_switch(migration: Migration) -> None:
    migration.connect()
    migration.precopy(lambda: scribble(migration.memory))
    migration.serve()
    migration.receiver.close()
    assert migration.serving is not None
    migration.serving.join()
    assert isinstance(migration.serve_error, ConnectionLost)
    assert "in phase postcopy" in str(migration.serve_error)
