"""The agent as a program of the host, built with sanitizers, and a conversation with it."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from uspace_mm.guest.boot.conversation import Conversation

NATIVE = Path(__file__).resolve().parents[2] / "native"


def build_agent(folder: Path) -> Path:
    """The agent for this machine, under the address and the undefined behaviour sanitizer."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("lacks: cc (Debian: gcc)")
    agent = folder / "agent"
    sources = sorted((NATIVE / "guest").glob("*.c"))
    flags = ["-O1", "-g", "-std=gnu11", "-D_GNU_SOURCE", "-fsanitize=address,undefined"]
    subprocess.run(
        [compiler, *flags, "-fno-sanitize-recover=all", "-I", NATIVE, *sources, "-o", agent], check=True
    )
    return agent


@contextmanager
def running(agent: Path, status: int = 0) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """The agent's process, and the other end of its channel; it has to end well when that is closed."""
    ours, its = socket.socketpair()
    with ours, its:
        process = subprocess.Popen([agent, "--fd", str(its.fileno())], pass_fds=[its.fileno()])
        its.close()
        try:
            yield ours, process
            ours.close()
            assert process.wait(20) == status, "the agent (or a sanitizer in it) found a fault"
        finally:
            process.kill()
            process.wait()


@contextmanager
def conversing(agent: Path, status: int = 0) -> Iterator[Conversation]:
    """A conversation with it, after HELLO."""
    with running(agent, status) as (stream, _), closing(Conversation(stream)) as conversation:
        conversation.hello(30)
        yield conversation
