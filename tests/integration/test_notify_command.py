"""``uspace-mm notify``, run as it is from a shell."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import uspace_mm.notifier  # noqa: F401 - found while there are the rights to read it
from uspace_mm import cli
from uspace_mm.cli.notify import parse_duration
from uspace_mm.errors import InputError

# SIGINT as in a foreground job: whoever runs tests in the background has it ignored.
START = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from uspace_mm.cli import main; sys.exit(main())"
)
SERVANT = """
import mmap, os, sys
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", START, "notify", *arguments]


def notify(*arguments: str, status: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL
    )
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def servant() -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", SERVANT], stdin=pipe, stdout=pipe, text=True)
    tell(child, "pass")
    yield child
    child.kill()
    child.communicate()


def tell(servant: subprocess.Popen[str], line: str, *, answers: bool = True) -> None:
    assert servant.stdin is not None
    assert servant.stdout is not None
    servant.stdin.write(line + "\n")
    servant.stdin.flush()
    if answers:
        assert servant.stdout.readline() == "done\n"


def started(*arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    child = subprocess.Popen(command(*arguments), stdout=pipe, stderr=pipe, text=True)
    assert child.stdout is not None
    if "--json" not in arguments:
        assert child.stdout.readline().split()[:3] == ["time", "event", "source"]
    return child


def test_a_process_is_watched_to_its_end(servant: subprocess.Popen[str]) -> None:
    watching = started(str(servant.pid), "--interval", "10ms", "--json")
    lines: list[dict[str, object]] = []
    assert watching.stdout is not None
    # Until it is sure that the watching has begun.
    while not lines:
        tell(servant, "m = mmap.mmap(-1, 1 << 24); m.close()")
        tell(servant, "kept = mmap.mmap(-1, 1 << 24)")
        if started_watching(watching):
            lines.append(json.loads(watching.stdout.readline()))
    tell(servant, "os.execv('/bin/sleep', ['sleep', '60'])", answers=False)
    while lines[-1]["reason"] != "exec":
        lines.append(json.loads(watching.stdout.readline()))
    time.sleep(0.1)
    servant.kill()
    out, err = watching.communicate(timeout=60)
    lines += [json.loads(line) for line in out.splitlines()]
    assert (watching.returncode, err) == (0, "")
    assert {line["pid"] for line in lines} == {servant.pid}
    assert [line["reason"] for line in lines if line["kind"] == "release"] == ["exec", "exit"]
    assert lines[-1]["source"] == "pidfd"
    assert lines[-1]["promise"] == "after"
    assert {"map", "exec", "exit"} <= {str(line["reason"]) for line in lines}
    times = [float(str(line["time_s"])) for line in lines]
    assert times == sorted(times)


def test_a_command_is_run_and_watched() -> None:
    out, err = notify("--json", "--", "/bin/sh", "-c", "echo hello; exit 7", status=7)
    assert err == "hello\n"
    lines = [json.loads(line) for line in out.splitlines()]
    assert {line["source"] for line in lines} == {"preload"}
    assert lines[-1]["kind"] == "release" and lines[-1]["reason"] == "exit"
    out, err = notify("--for", "200ms", "--", "sleep", "1000")
    assert (out.splitlines()[0].split()[0], err) == ("time", "")


def started_watching(watching: subprocess.Popen[str]) -> bool:
    assert watching.stdout is not None
    return bool(select.select([watching.stdout], [], [], 0.05)[0])


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_being_told_to_end(servant: subprocess.Popen[str], end: signal.Signals) -> None:
    watching = started(str(servant.pid))
    time.sleep(0.3)
    watching.send_signal(end)
    _, err = watching.communicate(timeout=60)
    assert (watching.returncode, err) == (0 if end is signal.SIGINT else 128 + end, "")


def test_it_ends_after_a_time_or_a_number_of_events() -> None:
    out, err = notify(str(os.getpid()), "--for", "300ms", "--interval", "50ms")
    assert out.splitlines()[0].split() == [
        "time",
        "event",
        "source",
        "promise",
        "reason",
        "pid",
        "size",
        "range",
    ]
    assert err == ""
    out, err = notify("--demo", "--count", "3", "--json")
    events = [line for line in map(json.loads, out.splitlines()) if "step" not in line]
    assert len(events) == 3


def test_the_demo_shows_each_kind_of_source_and_promise() -> None:
    out, err = notify("--demo", "--json")
    assert err == ""
    lines = [json.loads(line) for line in out.splitlines()]
    events = [line for line in lines if "step" not in line]
    assert len(lines) > len(events) > 10
    told = {(line["source"], line["promise"], line["reason"]) for line in events}
    assert told >= {
        ("pager", "ordered", "evict"),
        ("pager", "ordered", "unmap"),
        ("kernel", "before", "remove"),
        ("kernel", "after", "move"),
        ("kernel", "after", "unmap"),
        ("call", "ordered", "remove"),
        ("call", "ordered", "move"),
        ("call", "ordered", "unmap"),
        ("process", "ordered", "fork"),
        ("sample", "sampled", "map"),
        ("sample", "sampled", "unmap"),
        ("pidfd", "after", "exit"),
    }
    for first in (line for line in events if line["kind"] == "start" and line["promise"] == "ordered"):
        ends = [line for line in events if line["id"] == first["id"] and line["kind"] == "end"]
        assert [line["reason"] for line in ends] == [first["reason"]]


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m uspace_mm.cli notify --demo 2>{tmp_path}/err | head -2",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert len(done.stdout.splitlines()) == 2
    assert (tmp_path / "err").read_text() == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("2147483646",), "process 2147483646: there is none"),
        (("0",), "pid 0 is not within"),
        (("--", "-5"), "pid -5 is not within"),
        (("2",), "thread of the kernel"),
        (("nonsense",), "cannot start nonsense: No such file or directory"),
        (("1", "2"), "1 2: expected one PID, or a command"),
        (("1", "--interval", "0"), "--interval '0'"),
        (("1", "--interval", "soon"), "--interval 'soon'"),
        (("1", "--for", "1d"), "--for '1d'"),
        (("1", "--for", "99999h"), "--for '99999h'"),
        (("1", "--count", "0"), "--count 0"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    _, err = notify(*arguments, status=2)
    assert err.startswith("uspace-mm notify: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [(), ("1", "--demo"), ("--demo", "--", "true")])
def test_bad_usage(arguments: tuple[str, ...]) -> None:
    _, err = notify(*arguments, status=2)
    assert "usage: uspace-mm" in err


def test_whose_memory_may_not_be_read(capfd: pytest.CaptureFixture[str]) -> None:
    """A fork, as the interpreter itself may be in a folder that other users do not see."""
    watched = os.getpid()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.setgid(65534)
            os.setuid(65534)
            status = cli.main(["notify", str(watched)])
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"uspace-mm notify: process {watched}: its mappings may not be read")
    assert "CAP_SYS_PTRACE" in err


def test_durations() -> None:
    assert [parse_duration("x", text) for text in ("50ms", "0.2s", "3", "2m", " 1h ")] == [
        0.05,
        0.2,
        3,
        120,
        3600,
    ]
    for wrong in ("", "s", "-1s", "1e3", "nan", "0ms", "1 day"):
        with pytest.raises(InputError, match="expected a time"):
            parse_duration("x", wrong)
