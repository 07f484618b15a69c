"""The agent and the host's side of the conversation with it, without a guest: commands and their ends."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.guest_agent import build_agent, conversing, running
from uspace_mm.guest.boot.conversation import Conversation
from uspace_mm.guest.boot.errors import GuestError
from uspace_mm.guest.channel import HEADER, MAGIC, STDIN_WINDOW, Encoder, FrameType
from uspace_mm.guest.outcome import ChannelLost, Exited, Killed, NotStarted, Outcome, TimedOut

PATH = {"PATH": os.environ["PATH"]}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_agent(tmp_path_factory.mktemp("agent"))


@pytest.fixture
def conversation(agent: Path) -> Iterator[Conversation]:
    with conversing(agent) as conversation:
        yield conversation


class Output:
    """Collects what a command wrote, each stream apart."""

    def __init__(self) -> None:
        self.out, self.err, self.report = bytearray(), bytearray(), bytearray()


def run(
    conversation: Conversation,
    *argv: str,
    stdin: bytes | None = None,
    env: dict[str, str] | None = None,
    cwd: str = "/",
    terminal: tuple[int, int] | None = None,
    timeout_s: float = 60,
) -> tuple[Outcome, Output]:
    output = Output()
    outcome = conversation.run(
        argv,
        cwd=cwd,
        env=PATH | (env or {}),
        stdin=stdin,
        on_stdout=output.out.extend,
        on_stderr=output.err.extend,
        on_report=output.report.extend,
        terminal=terminal,
        timeout_s=timeout_s,
    )
    return outcome, output


def test_it_says_hello_with_the_page_size(agent: Path) -> None:
    with running(agent) as (stream, _), closing(Conversation(stream)) as conversation:
        hello = conversation.hello(30)
    assert int(hello["page_size"]) == resource.getpagesize()
    assert hello["machine"] == os.uname().machine
    assert hello["release"] == os.uname().release


def test_commands_in_turn_with_their_streams_apart(conversation: Conversation) -> None:
    outcome, output = run(
        conversation,
        "sh",
        "-c",
        'pwd; echo err >&2; echo "$A" >&$UMM_REPORT_FD; exit 7',
        env={"A": "é"},
        cwd="/usr",
    )
    assert outcome == Exited(7)
    assert (bytes(output.out), bytes(output.err)) == (b"/usr\n", b"err\n")
    assert output.report.decode() == "é\n"
    assert run(conversation, "true")[0] == Exited(0)


def test_the_ways_to_end(conversation: Conversation) -> None:
    assert run(conversation, "sh", "-c", "kill -SEGV $$")[0] == Killed(signal.SIGSEGV)
    assert run(conversation, "sh", "-c", "kill -KILL $$")[0] == Killed(signal.SIGKILL)
    outcome, _ = run(conversation, "no-such-command")
    assert isinstance(outcome, NotStarted)
    assert (outcome.errno, outcome.exit_status) == (errno.ENOENT, 127)
    outcome, _ = run(conversation, "/etc/passwd")
    assert isinstance(outcome, NotStarted)
    assert (outcome.errno, outcome.exit_status) == (errno.EACCES, 126)
    outcome, _ = run(conversation, "true", cwd="/no/such/folder")
    assert isinstance(outcome, NotStarted)
    assert "chdir" in outcome.reason


def test_a_program_for_another_architecture_is_not_given_to_a_shell(
    conversation: Conversation, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    elf = bytearray(Path("/bin/true").read_bytes())
    elf[18:20] = b"\xf7\0"  # EM_BPF
    program.write_bytes(elf)
    program.chmod(0o755)
    outcome, _ = run(conversation, str(program))
    assert isinstance(outcome, NotStarted)
    assert (outcome.errno, outcome.exit_status) == (errno.ENOEXEC, 126)


def test_all_output_arrives_before_the_end(conversation: Conversation) -> None:
    script = "head -c 3000000 /dev/zero; head -c 2000000 /dev/zero >&2"
    outcome, output = run(conversation, "sh", "-c", script)
    assert outcome == Exited(0)
    assert (len(output.out), len(output.err)) == (3000000, 2000000)


def test_a_background_child_that_holds_the_pipes_does_not_hold_up_the_end(
    conversation: Conversation,
) -> None:
    outcome, output = run(conversation, "sh", "-c", "sleep 1000 & echo $!")
    assert outcome == Exited(0)
    pid = int(output.out)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        if "Z" in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]:
            break
        time.sleep(0.01)
    else:
        assert not Path(f"/proc/{pid}").exists(), "it was left running"


def test_stdin_arrives_whole_and_ends(conversation: Conversation) -> None:
    data = os.urandom(3 * STDIN_WINDOW + 17)
    outcome, output = run(conversation, "cat", stdin=data)
    assert outcome == Exited(0)
    assert bytes(output.out) == data
    assert run(conversation, "cat", stdin=b"")[0] == Exited(0)
    assert run(conversation, "cat")[0] == Exited(0)  # /dev/null


def test_stdin_of_a_command_that_does_not_read_it(conversation: Conversation) -> None:
    data = bytes(4 * STDIN_WINDOW)
    assert run(conversation, "true", stdin=data)[0] == Exited(0)
    assert run(conversation, "sh", "-c", "exec <&-; sleep 0.2; exit 3", stdin=data)[0] == Exited(3)


def test_stdin_from_a_pipe_that_stays_open(conversation: Conversation) -> None:
    read, write = os.pipe()
    try:
        os.write(write, b"one line\n")
        output = bytearray()
        outcome = conversation.run(
            ["head", "-n", "1"], env=PATH, stdin=read, on_stdout=output.extend, timeout_s=60
        )
    finally:
        os.close(read)
        os.close(write)
    assert outcome == Exited(0)
    assert output == b"one line\n"


def test_a_ping_is_answered_while_the_command_neither_reads_nor_stops_writing(agent: Path) -> None:
    with conversing(agent) as conversation:
        started = threading.Event()
        answers: list[bool] = []

        def ask() -> None:
            started.wait()
            answers.extend(conversation.answers(30) for _ in range(3))

        asking = threading.Thread(target=ask)
        asking.start()
        with pytest.raises(GuestError) as caught:
            conversation.run(
                ["yes"],
                env=PATH,
                stdin=bytes(2 * STDIN_WINDOW),
                on_stdout=lambda data: started.set(),
                timeout_s=1,
            )
        assert caught.value.outcome == TimedOut("command", 1)
        asking.join()
        assert answers == [True] * 3
        conversation._received.clear()
        assert conversation.ping(30)


def test_a_terminal(conversation: Conversation) -> None:
    script = "test -t 0 && test -t 1 && test -t 2 && stty size && read line && echo got $line"
    outcome, output = run(conversation, "sh", "-c", script, terminal=(31, 97), stdin=b"text\n")
    assert outcome == Exited(0)
    assert b"31 97" in output.out
    assert b"got text" in output.out
    assert run(conversation, "cat", terminal=(24, 80), stdin=b"")[0] == Exited(0)  # its end is a ^D


def test_what_is_no_frame_ends_the_conversation(agent: Path) -> None:
    good = Encoder().encode(FrameType.PING, b"x")
    damaged = bytearray(good)
    damaged[-1] ^= 1
    for data in (b"garbage" * 10, bytes(damaged), HEADER.pack(MAGIC, 40, 1 << 30, 0, 0, 0), good + good):
        ours, its = socket.socketpair()
        with ours, its:
            pid = os.posix_spawn(agent, [str(agent), "--fd", str(dup := os.dup(its.fileno()))], os.environ,
                                 file_actions=[(os.POSIX_SPAWN_DUP2, its.fileno(), dup)])  # fmt: skip
            os.close(dup)
            its.close()
            ours.sendall(data)
            ours.settimeout(20)
            while ours.recv(1 << 16):
                pass
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == 1


def test_an_agent_that_dies_is_a_lost_channel() -> None:
    ours, its = socket.socketpair()
    with ours, closing(Conversation(ours)) as conversation:
        with its:
            its.sendall(Encoder().encode(FrameType.HELLO, b"protocol=1\n")[:-3])
        with pytest.raises(GuestError) as caught:
            conversation.hello(30)
    assert isinstance(caught.value.outcome, ChannelLost)
    assert "into a frame" in str(caught.value)


def test_a_silent_agent_is_noticed() -> None:
    ours, its = socket.socketpair()
    with ours, its, closing(Conversation(ours)) as conversation:
        with pytest.raises(GuestError) as caught:
            conversation.hello(0.2)
        assert caught.value.outcome == TimedOut("init", 0.2)
        assert not conversation.ping(0.2)
        assert not conversation.answers(0.2)
