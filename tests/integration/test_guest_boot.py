"""Guests that boot, and what commands in them may do without taking the guest with them."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.guest_boot import SMALL, booted, kernel_of, root, run
from uspace_mm.guest.boot import Guest, GuestFileError, boot
from uspace_mm.guest.outcome import Exited, Killed, NotStarted
from uspace_mm.guest.pagesize import PAGE_SIZES, PageSize


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    with booted() as guest:
        yield guest


@pytest.mark.parametrize("size", PAGE_SIZES, ids=str)
def test_a_guest_has_the_page_size_asked_for(size: PageSize) -> None:
    with boot(kernel_of(size), size, root(), SMALL) as guest:
        assert guest.hello.page_size == size.bytes
        assert guest.hello.machine == "aarch64"
        assert guest.hello.reports_panics
        assert "Linux version" in guest.console
        outcome, output = run(guest, "getconf", "PAGESIZE")
        assert (outcome, int(output.out)) == (Exited(0), size.bytes)
    assert not guest.ping(1)


def test_streams_apart(guest: Guest) -> None:
    outcome, output = run(guest, "sh", "-c", "echo out; echo err >&2; echo r >&$UMM_REPORT_FD; exit 3")
    assert outcome == Exited(3)
    assert (bytes(output.out), bytes(output.err), bytes(output.report)) == (b"out\n", b"err\n", b"r\n")


def test_what_is_mounted(guest: Guest) -> None:
    _, output = run(guest, "cat", "/proc/mounts")
    mounted = {line.split()[1]: line.split()[2] for line in output.out.decode().splitlines()}
    assert mounted["/"] == "overlay"
    for path, kind in {
        "/proc": "proc",
        "/sys": "sysfs",
        "/dev": "devtmpfs",
        "/dev/pts": "devpts",
        "/dev/shm": "tmpfs",
        "/tmp": "tmpfs",
        "/sys/fs/cgroup": "cgroup2",
        "/sys/kernel/tracing": "tracefs",
        "/sys/kernel/debug": "debugfs",
        "/dev/hugepages": "hugetlbfs",
    }.items():
        assert mounted[path] == kind, path
    outcome, output = run(
        guest, "sh", "-c", "cat /sys/class/net/lo/operstate; stat -c %a /tmp /dev/shm; hostname"
    )
    assert output.out.decode().split() == ["unknown", "1777", "1777", "guest"]


def test_the_clock_is_right(guest: Guest) -> None:
    _, output = run(guest, "date", "+%s")
    assert abs(int(output.out) - time.time()) < 60


def test_ways_to_end(guest: Guest) -> None:
    assert run(guest, "sh", "-c", "kill -SEGV $$")[0] == Killed(signal.SIGSEGV)
    outcome, _ = run(guest, "/no/such/thing")
    assert isinstance(outcome, NotStarted)
    assert outcome.exit_status == 127
    guest.put(
        "/tmp/foreign", Path("/proc/self/exe").read_bytes()[:4096], 0o755
    )  # no page size: an ELF header
    outcome, _ = run(guest, "/tmp/foreign")
    assert isinstance(outcome, NotStarted)
    assert outcome.exit_status == 126


def test_what_a_command_leaves_running_is_ended(guest: Guest) -> None:
    script = "setsid sh -c 'trap \"\" TERM HUP; sleep 1000' & (sleep 1000 &) ; echo started"
    assert run(guest, "sh", "-c", script)[0] == Exited(0)
    _, output = run(guest, "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    assert b"sleep 1000" not in output.out


def test_files_go_and_come_back(guest: Guest, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    source = tmp_path / "source"
    source.write_bytes(content)
    guest.put("/srv/a/data", source, 0o640)
    guest.put("/srv/a/empty", b"")
    assert run(guest, "sh", "-c", "ln -s data /srv/a/link; mkfifo /srv/a/pipe")[0] == Exited(0)
    back = tmp_path / "back"
    with pytest.raises(GuestFileError, match="pipe"):
        guest.copy_out(["/srv/a"], back)
    names = sorted(path.name for path in (back / "srv/a").iterdir())
    assert names == ["data", "empty", "link"]
    assert (back / "srv/a/data").read_bytes() == content
    assert stat.S_IMODE((back / "srv/a/data").stat().st_mode) == 0o640
    assert (back / "srv/a/link").read_bytes() == content
    assert not (back / "srv/a/link").is_symlink()
    assert guest.copy_out(["/nothing/*"], back) == []


@pytest.mark.slow
def test_a_full_disk_is_an_error_for_the_command_alone(guest: Guest) -> None:
    outcome, output = run(guest, "sh", "-c", "dd if=/dev/zero of=/big bs=1M; echo $?; rm /big")
    assert outcome == Exited(0)
    assert b"No space left on device" in output.err
    assert output.out == b"1\n"
    with pytest.raises(GuestFileError, match="No space left"):
        guest.put("/tmp/big", bytes(200 << 20))
    assert run(guest, "true")[0] == Exited(0)


def test_out_of_memory_takes_the_command_alone(guest: Guest) -> None:
    outcome, _ = run(guest, "tail", "/dev/zero")
    assert outcome == Killed(signal.SIGKILL, out_of_memory=True)
    assert run(guest, "true")[0] == Exited(0)


@pytest.mark.slow
def test_a_flood_arrives_as_fast_as_it_is_read(guest: Guest) -> None:
    seen = 0

    def count(data: bytes) -> None:
        nonlocal seen
        assert data.strip(b"y\n") == b""
        seen += len(data)

    outcome = guest.run(["sh", "-c", "yes | head -c 30000000"], on_stdout=count, timeout_s=60)
    assert (outcome, seen) == (Exited(0), 30_000_000)


def test_ping_while_a_command_runs(guest: Guest) -> None:
    assert guest.ping(30)
    answers: list[bool] = []
    started = threading.Event()

    def ask() -> None:
        started.wait()
        answers.append(guest.ping(30))

    asking = threading.Thread(target=ask)
    asking.start()
    guest.run(["sh", "-c", "echo; sleep 1"], on_stdout=lambda _: started.set(), timeout_s=60)
    asking.join()
    assert answers == [True]


def test_stdin_and_a_terminal(guest: Guest) -> None:
    data = os.urandom(1_000_000)
    outcome, output = run(guest, "cat", stdin=data)
    assert (outcome, bytes(output.out)) == (Exited(0), data)
    out = bytearray()
    outcome = guest.run(
        ["sh", "-c", "tty; stty size"],
        stdin=b"",
        on_stdout=out.extend,
        terminal=True,
        resized=lambda: (33, 99),
        timeout_s=60,
    )
    assert outcome == Exited(0)
    assert b"/dev/pts/0" in out
    assert b"33 99" in out
