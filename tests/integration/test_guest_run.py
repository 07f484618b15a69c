"""``uspace-mm guest run``: streams, status, files and every other end, as the shell sees them."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.integration.guest_boot import any_kernel, is_running

COMMAND = [sys.executable, "-m", "uspace_mm.cli", "guest", "run"]


@pytest.fixture(scope="module")
def small() -> list[str]:
    """The command for a small guest with a kernel that is there."""
    _, size = any_kernel()
    return [*COMMAND, "--page-size", str(size), "--memory", "256M"]


def run(command: Sequence[str], stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    if stdin is None:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=110, check=False
        )
    return subprocess.run(command, input=stdin, capture_output=True, timeout=110, check=False)


def test_streams_status_environment_and_files(small: list[str], tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    (overlay / "srv").mkdir(parents=True)
    (overlay / "srv/in.txt").write_text("from the host\n")
    script = 'cat; cat /srv/in.txt; echo "$A $PWD" >&2; echo result > /tmp/out.xml; getconf PAGESIZE; exit 7'
    out = tmp_path / "back"
    done = run(
        [*small, "--overlay", str(overlay), "--env", "A=b c", "--cwd", "/usr", "--copy-out", "/tmp/*.xml",
         "--copy-to", str(out), "--", "sh", "-c", script],
        stdin=b"from stdin\n",
    )  # fmt: skip
    _, size = any_kernel()
    assert done.returncode == 7
    assert done.stdout.decode() == f"from stdin\nfrom the host\n{size.bytes}\n"
    assert done.stderr.decode() == "b c /usr\n"
    assert (out / "tmp/out.xml").read_text() == "result\n"


def test_json(small: list[str]) -> None:
    done = run([*small, "--json", "--", "sh", "-c", "echo out; echo err >&2; kill -SEGV $$"])
    record = json.loads(done.stdout)
    assert done.returncode == record["exit_status"] == 128 + signal.SIGSEGV
    assert (record["outcome"], record["detail"]) == ("killed", "killed by SIGSEGV")
    assert (record["stdout"], record["stderr"]) == ("out\n", "err\n")
    assert record["page_size"] == any_kernel()[1].bytes
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--", "/no/such"], 127, "/no/such: No such file or directory"),
        (["--", "/etc/passwd"], 126, "Permission denied"),
        (["--timeout", "1s", "--", "sleep", "100"], 124, "timed out: command took more than 1 s"),
        (["--copy-out", "/nothing*", "--", "true"], 2, "nothing in the guest matches"),
        (["--copy-out", "/etc/passwd", "--copy-to", "/dev/null", "--", "true"], 2, "Not a directory"),
        (["--copy-out", "/dev/null", "--", "false"], 1, "Invalid argument"),
        (["--", "sh", "-c", "echo b > /proc/sysrq-trigger; sleep 100"], 125, "reset from inside"),
    ],
)
def test_other_ends_are_one_line(small: list[str], arguments: list[str], status: int, said: str) -> None:
    done = run([*small, *arguments])
    assert (done.returncode, done.stdout) == (status, b"")
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--page-size", "8k", "--", "true"], 2, "arm64 has 4k, 16k and 64k"),
        (["--page-size", "64k"], 2, "no command given"),
        (["--page-size", "64k", "--memory", "1M", "--", "true"], 2, "--memory 1M"),
        (["--page-size", "64k", "--cpus", "0", "--", "true"], 2, "--cpus 0"),
        (["--page-size", "64k", "--timeout", "soon", "--", "true"], 2, "soon"),
        (["--page-size", "64k", "--env", "A", "--", "true"], 2, "NAME=VALUE"),
        (["--page-size", "64k", "--interactive"], 2, "terminal"),
        (["--page-size", "64k", "--kernel", "/bin/true", "--", "true"], 2, "/bin/true"),
        (["--page-size", "64k", "--kernel", "/missing", "--", "true"], 2, "/missing"),
        (["--page-size", "64k", "--overlay", "/missing", "--", "true"], 2, "/missing"),
        (["--page-size", "64k", "--wheel", "/missing.whl", "--", "true"], 2, "/missing.whl"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], status: int, said: str) -> None:
    any_kernel()
    done = run([*COMMAND, *arguments])
    assert (done.returncode, done.stdout) == (status, b"")
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    assert said in lines[0]


@contextmanager
def in_background(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command, and the process number of its QEMU."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"started\n"
            (qemu,) = [
                child.pid for child in psutil.Process(process.pid).children() if "qemu" in child.name()
            ]
            yield process, qemu
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_guest(small: list[str], number: int, status: int) -> None:
    with in_background([*small, "--", "sh", "-c", "echo started; sleep 1000"]) as (process, qemu):
        process.send_signal(number)
        assert process.wait(20) == status
        assert not is_running(qemu)


@pytest.mark.slow
def test_a_reader_that_stops_reading_does_not_hold_up_the_deadline(small: list[str]) -> None:
    with in_background([*small, "--timeout", "2s", "--", "sh", "-c", "echo started; yes"]) as (process, qemu):
        assert process.wait(60) == 124
        assert not is_running(qemu)


def test_a_reader_that_goes_away_ends_the_guest(small: list[str]) -> None:
    with in_background([*small, "--", "sh", "-c", "echo started; yes"]) as (process, qemu):
        assert process.stdout is not None
        process.stdout.close()
        process.wait(60)
        assert not is_running(qemu)


def test_interactive(small: list[str]) -> None:
    ours, its = pty.openpty()
    before = termios.tcgetattr(its)
    try:
        with subprocess.Popen([*small, "--interactive"], stdin=its, stdout=its, stderr=its) as process:
            try:
                said = read_until(ours, b"# ")
                os.write(ours, b"echo $((6 * 7)); tty; exit 9\n")
                said = read_until(ours, b"/dev/pts/")
                assert b"42" in said
                deadline = time.monotonic() + 60
                while process.poll() is None and time.monotonic() < deadline:
                    if select.select([ours], [], [], 0.1)[0]:
                        os.read(ours, 1 << 16)
                assert process.returncode == 9
            finally:
                process.kill()
        assert termios.tcgetattr(its) == before
    finally:
        os.close(ours)
        os.close(its)


def read_until(descriptor: int, wanted: bytes) -> bytes:
    said = b""
    deadline = time.monotonic() + 100
    while wanted not in said and time.monotonic() < deadline:
        if select.select([descriptor], [], [], 1)[0]:
            said += os.read(descriptor, 1 << 16)
    assert wanted in said, said[-2000:]
    return said
