"""Sender and receiver in one process over socket pairs: every byte, every broken arrow of the protocol."""

from __future__ import annotations

import mmap
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from uspace_mm._native import ffi, lib

from uspace_mm.errors import KernelError
from uspace_mm.postcopy.errors import (
    ConnectionLost,
    PeerFailed,
    PeerTimeout,
    PostcopyError,
    ProtocolError,
    Stopped,
)
from uspace_mm.postcopy.receiver import PagesLost, Receiver
from uspace_mm.postcopy.sender import Sender

PAGE = mmap.PAGESIZE
PAGES = 600
IDLE_S = 3.0
PAGES_FRAME, STATE, SWITCH, ROUND, STREAMED, DIGESTS, HELLO, WELCOME = 3, 5, 6, 4, 9, 10, 1, 2


def frame(type_: int, first: int = 0, count: int = 0, payload: bytes = b"", **wrong: Any) -> bytes:
    """A frame as the C core writes it; `wrong` replaces fields, or the checked part of the payload."""
    checked = payload[: 8 * count] if type_ == PAGES_FRAME else payload
    fields = {
        "type": type_,
        "first": first,
        "count": count,
        "length": len(payload),
        "payload_check": lib.umm_frame_payload_check(checked, len(checked)),
    }
    fields |= wrong
    header = ffi.new("uint8_t[32]")
    lib.umm_frame_encode(ffi.new("struct umm_frame *", fields), header)
    return bytes(header) + payload


def page_payload(content: bytes, digest: int | None = None) -> bytes:
    own = lib.umm_page_digest(content, PAGE)
    return struct.pack("<Q", own if digest is None else digest) + content


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


# --- a receiver and a peer that is no sender ---


class FakeSource:
    """The source's end of both connections, in the hands of a test."""

    def __init__(self, pages: int = 8) -> None:
        self.receiver = Receiver(0.5)
        self.pages = pages
        self.data, self._data_theirs = socket.socketpair()
        self.urgent, self._urgent_theirs = socket.socketpair()
        self.session = 0x1234

    def welcome(self, **wrong: int) -> bytes:
        fields = {"session": self.session, "pages": self.pages, "page_size": PAGE, "idle_ms": 500} | wrong
        payload = struct.pack(
            "<QQII", fields["session"], fields["pages"], fields["page_size"], fields["idle_ms"]
        )
        return frame(WELCOME, payload=payload)

    def connect(self, data: bytes | None = None, urgent: bytes | None = None) -> None:
        self.data.sendall(self.welcome() if data is None else data)
        self.receiver.connect(self._data_theirs, 1 << 20 | PAGE * 8)
        self.urgent.sendall(self.welcome() if urgent is None else urgent)
        self.receiver.connect(self._urgent_theirs, 1 << 20 | PAGE * 8)

    def close(self) -> None:
        self.receiver.close()
        for end in (self.data, self.urgent, self._data_theirs, self._urgent_theirs):
            end.close()


@pytest.fixture
def fake_source() -> Iterator[FakeSource]:
    fake = FakeSource()
    try:
        yield fake
    finally:
        fake.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n" * 4,
        bytes(1000),
        frame(ROUND, 1),
        frame(WELCOME, payload=bytes(23)),
        frame(WELCOME, payload=bytes(25)),
        frame(WELCOME, payload=bytes(24), payload_check=1),
        frame(WELCOME, payload=bytes(24), length=0xFFFFFFFF),
    ],
    ids=["http", "zeros", "another frame", "short", "long", "wrong check", "huge"],
)
def test_rubbish_for_a_welcome(fake_source: FakeSource, answer: bytes) -> None:
    with pytest.raises(ProtocolError, match="the source"):
        fake_source.connect(data=answer)


@pytest.mark.parametrize("pages", [0, 1 << 20, 1 << 33, (1 << 64) - 1])
def test_more_than_fits_is_refused_before_it_is_allocated(fake_source: FakeSource, pages: int) -> None:
    with pytest.raises(ProtocolError, match="at most"):
        fake_source.connect(data=fake_source.welcome(pages=pages))


def test_another_page_size_is_refused(fake_source: FakeSource) -> None:
    with pytest.raises(ProtocolError, match=f"{PAGE} bytes here and of {PAGE * 2} bytes"):
        fake_source.connect(data=fake_source.welcome(page_size=PAGE * 2))


def test_an_urgent_connection_of_another_migration_is_refused(fake_source: FakeSource) -> None:
    with pytest.raises(ProtocolError, match="another migration"):
        fake_source.connect(urgent=fake_source.welcome(session=1))


CONTENT = bytes(range(256)) * (PAGE // 256)
ONE_PAGE = frame(PAGES_FRAME, 0, 1, page_payload(CONTENT))
GOOD_STATE = frame(STATE, payload=b"{}")


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (bytes(64), "no frame of this protocol"),
        (frame(PAGES_FRAME, 8, 1, page_payload(CONTENT)), "may not come"),
        (frame(PAGES_FRAME, 7, 2, bytes(2 * (8 + PAGE))), "may not come"),
        (frame(PAGES_FRAME, 0, 1, page_payload(CONTENT, digest=1)), "wrong checksum of page 0"),
        (frame(PAGES_FRAME, 0, 1, page_payload(CONTENT), payload_check=1), "wrong checksum of a PAGES"),
        (frame(PAGES_FRAME, 0, 1, page_payload(CONTENT) + b"x"), "too long"),
        (ONE_PAGE + frame(STREAMED), "STREAMED"),
        (ONE_PAGE + frame(DIGESTS, 0, 1, bytes(8)), "DIGESTS"),
        (ONE_PAGE + frame(ROUND, 2), "round 2 after round 0"),
        (frame(SWITCH, 0, 0, b"\0"), "without a state"),
        (GOOD_STATE + frame(SWITCH, 2, 0, b"\1"), "1 missing pages, not 2"),
        (GOOD_STATE + frame(SWITCH, 1, 0, b"\1\0"), "too long"),
        (frame(STATE, payload=bytes(65537)), "too long"),
        (frame(HELLO, payload=bytes(16)), "HELLO"),
        (frame(99), "unknown"),
    ],
)
def test_what_may_not_come_in_precopy(fake_source: FakeSource, stream: bytes, words: str) -> None:
    fake_source.connect()
    fake_source.data.sendall(stream)
    with pytest.raises(ProtocolError, match=words):
        fake_source.receiver.precopy()
    fake_source.data.settimeout(2)
    answer = b""
    with suppress(TimeoutError):
        while len(answer) < 48 + 48:
            answer += fake_source.data.recv(4096)
    assert words.encode() in answer or words.split()[-1].encode() in answer, "the source is told why"


def test_silence_ends_precopy(fake_source: FakeSource) -> None:
    fake_source.connect()
    fake_source.data.sendall(ONE_PAGE[:-1])
    with pytest.raises(PeerTimeout, match="500 ms on the data connection in phase precopy"):
        fake_source.receiver.precopy()


def test_an_end_of_stream_ends_precopy(fake_source: FakeSource) -> None:
    fake_source.connect()
    fake_source.data.sendall(ONE_PAGE)
    fake_source.data.close()
    with pytest.raises(ConnectionLost, match="closed the data connection in phase precopy"):
        fake_source.receiver.precopy()


def test_the_words_of_the_peer_are_passed_on(fake_source: FakeSource) -> None:
    fake_source.connect()
    fake_source.data.sendall(frame(15, payload=b"out of \x1b[31m tea\n"))
    with pytest.raises(PeerFailed, match=r"the source says: out of \?\[31m tea\?"):
        fake_source.receiver.precopy()


def test_stop_ends_a_wait(fake_source: FakeSource) -> None:
    fake_source.connect()
    threading.Timer(0.05, fake_source.receiver.stop).start()
    with pytest.raises(Stopped):
        fake_source.receiver.precopy()


def enter(fake: FakeSource, missing: int = 0b11) -> npt.NDArray[np.uint8]:
    fake.connect()
    count = missing.bit_count()
    fake.data.sendall(ONE_PAGE + frame(ROUND, 1) + GOOD_STATE + frame(SWITCH, count, 0, bytes([missing])))
    fake.receiver.precopy()
    memory = fake.receiver.enter()
    fake.receiver.running()
    return memory


@pytest.mark.parametrize(
    ("connection", "stream", "kind"),
    [
        ("data", b"rubbish" * 10, ProtocolError),
        ("urgent", b"rubbish" * 10, ProtocolError),
        ("data", frame(PAGES_FRAME, 0, 1, page_payload(CONTENT, digest=5)), ProtocolError),
        ("urgent", frame(PAGES_FRAME, 0, 1, page_payload(CONTENT, digest=5)), ProtocolError),
        ("data", frame(STREAMED), ProtocolError),  # nothing came
        ("data", frame(DIGESTS, 0, 8, bytes(64)), ProtocolError),
        ("data", frame(SWITCH, 0, 0, b"\0"), ProtocolError),
        ("urgent", frame(STREAMED), ProtocolError),
        ("data", frame(15, payload=b"sorry"), PeerFailed),
        ("data", b"", PeerTimeout),
        ("data", None, ConnectionLost),
        ("urgent", None, ConnectionLost),
    ],
)
def test_what_breaks_postcopy_fails_the_missing_pages(
    fake_source: FakeSource, connection: str, stream: bytes | None, kind: type[Exception]
) -> None:
    memory = enter(fake_source)
    end = getattr(fake_source, connection)
    if stream is None:
        end.close()
    else:
        end.sendall(stream)
    with pytest.raises(kind):
        while not fake_source.receiver.await_complete(2):
            pass
    for page in (0, 1):
        with pytest.raises(PagesLost), fake_source.receiver.guard():
            assert memory[page * PAGE] == 0xBD
    assert not memory[2 * PAGE :].any()  # not missing: zero, as the source said
    assert fake_source.receiver.stats()["lost_pages"] == 2


def test_pages_that_come_twice_are_counted_once(fake_source: FakeSource) -> None:
    memory = enter(fake_source)
    other = bytes(reversed(CONTENT))
    zeros = frame(PAGES_FRAME, 1, 1, flags=1)
    fake_source.urgent.sendall(ONE_PAGE)
    assert memory[:PAGE].tobytes() == CONTENT
    # a duplicate, with other content at that: the first one counts, and no page that was written is replaced
    fake_source.data.sendall(frame(PAGES_FRAME, 0, 1, page_payload(other)) + zeros + frame(STREAMED))
    digests = [lib.umm_page_digest(CONTENT, PAGE)] + [lib.umm_page_digest(bytes(PAGE), PAGE)] * 7
    fake_source.data.sendall(frame(DIGESTS, 0, 8, struct.pack("<8Q", *digests)))
    assert fake_source.receiver.await_complete(5)
    stats = fake_source.receiver.stats()
    assert (stats["verified"], stats["mismatched"], stats["duplicate_pages"]) == (8, 0, 1)
    assert (stats["urgent_pages"], stats["bulk_pages"]) == (1, 1)
    assert memory[:PAGE].tobytes() == CONTENT


def test_a_wrong_digest_is_a_mismatch(fake_source: FakeSource) -> None:
    enter(fake_source, missing=0)
    fake_source.data.sendall(frame(STREAMED) + frame(DIGESTS, 0, 8, bytes(64)))
    assert fake_source.receiver.await_complete(5)
    stats = fake_source.receiver.stats()
    assert (stats["verified"], stats["mismatched"]) == (0, 8)


# --- a sender and a peer that is no receiver ---


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
