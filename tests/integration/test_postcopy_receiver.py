"""A receiver and a peer that is no sender: every broken arrow of the protocol."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import pytest
from uspace_mm._native import lib

from tests.integration.postcopy_frames import (
    CONTENT,
    DIGESTS,
    HELLO,
    PAGE,
    PAGES_FRAME,
    ROUND,
    STATE,
    STREAMED,
    SWITCH,
    WELCOME,
    frame,
    page_payload,
)
from uspace_mm.postcopy.errors import (
    ConnectionLost,
    PeerFailed,
    PeerTimeout,
    ProtocolError,
    Stopped,
)
from uspace_mm.postcopy.receiver import PagesLost, Receiver


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
    # Counted after the error is told: a page that is asked for in between fails at once.
    deadline = time.monotonic() + 30
    while fake_source.receiver.stats()["lost_pages"] != 2:
        assert time.monotonic() < deadline, fake_source.receiver.stats()
        time.sleep(0.01)


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
