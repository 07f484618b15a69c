"""Files that go to the agent and come back: all kinds of them, whole or with the reason, never a hang."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.guest_agent import build_agent, conversing, running
from uspace_mm.guest.boot.conversation import Conversation
from uspace_mm.guest.boot.errors import GuestError, GuestFileError
from uspace_mm.guest.channel import FrameType, put_payload, texts
from uspace_mm.guest.outcome import ChannelLost, Exited


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_agent(tmp_path_factory.mktemp("agent"))


@pytest.fixture
def conversation(agent: Path) -> Iterator[Conversation]:
    with conversing(agent) as conversation:
        yield conversation


def put(conversation: Conversation, path: Path, content: bytes, mode: int = 0o644) -> None:
    conversation.put(str(path), len(content), mode, iter([content]), 60)


def fetch(conversation: Conversation, *patterns: str) -> dict[str, bytes | int]:
    """Path to content, or to the errno why it could not be read."""
    found: dict[str, bytes | int] = {}
    for info, chunks in conversation.get(patterns, 60):
        try:
            found[info.path] = b"".join(chunks)
        except GuestFileError as error:
            found[info.path] = error.errno
    return found


@pytest.mark.parametrize("size", [0, 1, 262144, 3_000_001])
def test_what_is_put_is_got(conversation: Conversation, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    path = tmp_path / "new folder" / "é"
    put(conversation, path, content, 0o751)
    assert path.read_bytes() == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o751
    assert fetch(conversation, str(path)) == {str(path): content}


def test_what_patterns_match(conversation: Conversation, tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("a/1.xml", "a/2.xml", "a/b/3.xml", "a/4.txt"):
        (tmp_path / name).write_text(name)
    root = str(tmp_path)

    def names(*patterns: str) -> list[str]:
        found = fetch(conversation, *(f"{root}/{pattern}" for pattern in patterns))
        return [path.removeprefix(f"{root}/") for path in found]

    assert names("a/*.xml") == ["a/1.xml", "a/2.xml"]
    assert names("a/{4,9}.txt", "a/b") == ["a/4.txt", "a/b/3.xml"]
    assert names("a") == ["a/1.xml", "a/2.xml", "a/4.txt", "a/b/3.xml"]
    assert names("nothing*", "a/[") == []
    assert fetch(conversation, "") == {}


def test_links_and_special_files(conversation: Conversation, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    found = fetch(conversation, str(tmp_path), "/dev/zero", "/proc/self/status")
    relative = {os.path.relpath(path, tmp_path): content for path, content in found.items()}
    assert relative.pop("../" * (len(tmp_path.parts) - 1) + "dev/zero") == errno.EINVAL
    status = relative.pop("../" * (len(tmp_path.parts) - 1) + "proc/self/status")
    assert isinstance(status, bytes)
    assert b"Name:" in status
    assert relative == {
        "file": b"content",
        "link": b"content",
        "dangling": errno.ENOENT,
        "pipe": errno.EINVAL,
    }


def test_a_file_that_shrinks_while_it_is_read(conversation: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(20_000_000))
    for info, chunks in conversation.get([str(path)], 60):
        assert info.size == 20_000_000
        next(chunks)
        os.truncate(path, 100)
        assert sum(map(len, chunks)) < 20_000_000
    assert conversation.ping(30)


def test_a_walk_that_is_given_up_leaves_the_conversation_in_order(
    conversation: Conversation, tmp_path: Path
) -> None:
    for number in range(20):
        (tmp_path / str(number)).write_bytes(bytes(100_000))
    files = conversation.get([str(tmp_path)], 60)
    next(files)
    files.close()
    assert conversation.run(["true"], env={"PATH": os.environ["PATH"]}, timeout_s=60) == Exited(0)


def test_where_a_file_cannot_be_written(conversation: Conversation, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    cases = {
        tmp_path / "pipe": errno.ENXIO,
        tmp_path: errno.EISDIR,
        tmp_path / "file" / "below": errno.ENOTDIR,
        tmp_path / ("n" * 300): errno.ENAMETOOLONG,
        tmp_path / ("d/" * 3000): errno.ENAMETOOLONG,
    }
    for path, number in cases.items():
        with pytest.raises(GuestFileError) as caught:
            put(conversation, path, b"content")
        assert caught.value.errno == number, path
    put(conversation, tmp_path / "file", b"content")


@pytest.mark.parametrize(
    "frames",
    [
        [(FrameType.PUT_DATA, b"x")],
        [(FrameType.PUT_END, bytes(4))],
        [(FrameType.PUT, b"short")],
        [(FrameType.PUT, put_payload("{}", 1, 0o644)), (FrameType.PUT_DATA, b"too much")],
        [(FrameType.PUT, put_payload("{}", 9, 0o644)), (FrameType.PUT_END, bytes(4))],
        [(FrameType.PUT, put_payload("{}", 1, 0)), (FrameType.PUT_DATA, b"x"), (FrameType.PUT_END, bytes(4))],
        [(FrameType.HELLO, b"")],
        [(FrameType.CLOCK, b"short")],
        [(FrameType.PING, bytes(1 << 20))],
    ],
)  # fmt: skip
def test_frames_that_do_not_fit_together_end_the_conversation(
    agent: Path, tmp_path: Path, frames: list[tuple[FrameType, bytes]]
) -> None:
    with conversing(agent, status=1) as conversation:
        for kind, payload in frames:
            conversation._send(kind, payload.replace(b"{}", str(tmp_path / "x").encode()), 1)
        with pytest.raises(GuestError) as caught:
            conversation.run(["true"], timeout_s=60)
        assert isinstance(caught.value.outcome, ChannelLost)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (FrameType.GET, b""),
        (FrameType.GET, b"no end"),
        (FrameType.START, b""),
        (FrameType.START, struct.pack("<5I", 0, 0, 0, 1 << 31, 1 << 31) + texts(["/", "true"])),
        (FrameType.START, struct.pack("<5I", 0, 0, 0, 0, 0) + texts(["/"])),
        (FrameType.START, struct.pack("<5I", 0, 0, 0, 3, 0) + texts(["/", "true"])),
        (FrameType.START, struct.pack("<5I", 0, 0, 0, 1, 0) + b"/\0true"),
    ],
)
def test_a_request_that_makes_no_sense_is_a_fault_and_the_next_one_works(
    conversation: Conversation, kind: FrameType, payload: bytes
) -> None:
    id_ = conversation._new_id()
    conversation._send(kind, payload, id_)
    answer = conversation._expect(FrameType.FAULT, id_, "end", 30)
    assert struct.unpack_from("<I", answer.payload)[0] == errno.EINVAL
    assert conversation.run(["true"], env={"PATH": os.environ["PATH"]}, timeout_s=60) == Exited(0)


def test_requests_that_get_in_each_others_way(agent: Path) -> None:
    with running(agent) as (stream, _):
        conversation = Conversation(stream)
        try:
            conversation.hello(30)
            started: list[bytes] = []

            def meddle(data: bytes) -> None:
                if not started:
                    started.append(data)
                    conversation._send(FrameType.GET, texts(["/etc/passwd"]), 77)
                    conversation._send(FrameType.START, struct.pack("<5I", 0, 0, 0, 1, 0) + texts("/a"), 78)

            script = "echo x; sleep 0.3"
            env = {"PATH": os.environ["PATH"]}
            outcome = conversation.run(["sh", "-c", script], env=env, on_stdout=meddle, timeout_s=60)
            assert outcome == Exited(0)
            assert fetch(conversation, "/etc/passwd") == {"/etc/passwd": Path("/etc/passwd").read_bytes()}
        finally:
            conversation.close()
