"""``uspace-mm demo postcopy`` as people run it: two real processes, killed, cut off and lied to."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from uspace_mm import cli

COMMAND = [sys.executable, "-m", "uspace_mm.cli", "demo", "postcopy"]
SMALL = ["--size", "8M", "--steps", "20", "--timeout", "20"]
ANSWER_S = 60.0


class Run:
    """The command in a process of its own; `stderr` grows while it runs."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.stderr = ""
        self.family: set[int] = set()

    def await_line(self, pattern: str) -> re.Match[str]:
        """The first line on stderr that matches."""
        assert self.process.stderr is not None
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            ready, _, _ = select.select([self.process.stderr], [], [], 0.2)
            self.note_family()
            if not ready:
                continue
            line = self.process.stderr.readline()
            self.stderr += line
            if found := re.search(pattern, line):
                return found
            assert line, f"it ended without {pattern!r}: {self.stderr}"
        raise AssertionError(f"no {pattern!r} in time: {self.stderr}")

    def note_family(self) -> None:
        with suppress(psutil.NoSuchProcess):
            self.family |= {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}

    def end(self) -> tuple[int, str, str]:
        """Status, stdout, stderr; and no process of it is left."""
        self.note_family()
        out, more = self.process.communicate(timeout=ANSWER_S)
        self.stderr += more
        for pid in self.family:
            assert not psutil.pid_exists(pid), f"process {pid} was left behind"
        return self.process.returncode, out, self.stderr

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    started: list[Run] = []
    yield started
    for run in started:
        run.close()


def start(runs: list[Run], *arguments: str) -> Run:
    runs.append(Run(*arguments))
    return runs[-1]


def check(result: dict[str, Any], size: int) -> None:
    """What every good result says."""
    pages = result["pages_total"]
    assert pages * result["page_size"] == size
    assert (result["pages_verified"], result["pages_mismatched"]) == (pages, 0)
    assert 0 < result["zero_pages"] < pages
    assert result["rounds"] >= 1
    assert result["faults"] > 0
    assert 0 < result["fault_p50_ns"] <= result["fault_p99_ns"] <= result["fault_p999_ns"]
    assert result["fault_p999_ns"] <= result["slowest_fault_ns"]
    assert result["slowest_fault_stage"] in ("queue", "fetch", "install")
    assert 0 < result["downtime_ms"] <= result["last_page_ms"]
    assert result["last_page_ms"] / 1e3 <= result["total_s"]
    assert result["urgent_pages"] + result["bulk_pages"] == result["missing_pages"] > 0
    assert result["precopy_pages"] * result["page_size"] * 0.5 < result["bytes_sent"]
    assert result["work_matches"] is True
    assert result["work_steps_after_switch"] >= 20
    assert result["ok"] is True


@pytest.mark.slow
def test_32_mebibytes_from_end_to_end(runs: list[Run], tmp_path: Path) -> None:
    picture = tmp_path / "states.png"
    run = start(runs, "--size", "32M", "--bulk-rate", "8M", "--json", "--plot", str(picture))
    status, out, err = run.end()
    assert (status, err) == (0, ""), err
    result = json.loads(out)
    check(result, 32 << 20)
    assert result["faults"] >= 10, "with a slow stream the work asks for what it needs"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


def test_the_summary_says_what_happened(runs: list[Run], tmp_path: Path) -> None:
    text = tmp_path / "own text"
    text.write_bytes(b"memory moves while it is used " * 100)
    run = start(runs, *SMALL, "--input", str(text))
    status, out, err = run.end()
    assert (status, err) == (0, ""), err
    for word in ("downtime", "last page", "rounds", "zero", "faults", "p99.9", "slowest fault", "memory"):
        assert word in out
    assert re.search(r"every page arrived +yes: 128|2,048 of", out)
    assert re.search(r"same result +yes", out)


def test_two_commands_make_one_migration(runs: list[Run]) -> None:
    source = start(runs, *SMALL, "--listen", "127.0.0.1:0", "--json")
    port = source.await_line(r"listening on 127\.0\.0\.1:(\d+)")[1]
    destination = start(runs, *SMALL, "--connect", f"127.0.0.1:{port}", "--json")
    results = []
    for run in (source, destination):
        status, out, err = run.end()
        assert status == 0, err
        results.append(json.loads(out))
        check(results[-1], 8 << 20)
    assert results[0] == results[1]


PHASES = ("connect", "precopy", "switch", "postcopy", "verify")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_side_that_is_killed(runs: list[Run], side: str, phase: str) -> None:
    run = start(runs, *SMALL, "--pause-at", f"{side}:{phase}", "--json", "--bulk-rate", "4M")
    os.kill(int(run.await_line(rf"{side} paused at {phase}, pid (\d+)")[1]), signal.SIGKILL)
    status, out, err = run.end()
    assert (status, out) == (1, "")
    last = err.splitlines()[-1]
    assert f"{side}: killed by SIGKILL" in last
    other = "destination" if side == "source" else "source"
    assert f"{other}: " in last, "both sides are heard"
    if side == "destination":
        before_switch = phase in ("connect", "precopy")
        # paused at "switch", the destination has been sent the switch
        assert ("the work went on" in last) == before_switch
        assert ("the switch had been sent" in last) == (not before_switch)
    else:
        assert ("it is the source's still" in last) == (phase in ("connect", "precopy", "switch"))
        assert ("pages never arrived and are lost" in last) == (phase == "postcopy")
        assert ("with every page" in last) == (phase == "verify")


def test_the_parent_takes_both_sides_with_it(runs: list[Run]) -> None:
    run = start(runs, *SMALL, "--pause-at", "destination:postcopy", "--bulk-rate", "1M")
    run.await_line("destination paused")
    run.family.clear()  # importing an editable package starts ninja for a moment
    run.note_family()
    assert len(run.family) == 2
    run.process.kill()
    run.process.wait()
    deadline = time.monotonic() + ANSWER_S
    while any(psutil.pid_exists(pid) for pid in run.family) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in run.family if psutil.pid_exists(pid)]


def test_an_interrupt_ends_both_sides(runs: list[Run]) -> None:
    run = start(runs, *SMALL, "--pause-at", "source:precopy")
    run.await_line("source paused")
    run.process.send_signal(signal.SIGINT)
    status, _, err = run.end()
    assert status == 130
    assert err.splitlines()[-1] == "uspace-mm demo: interrupted"


class Proxy:
    """Passes connections on to a port, until it is told to cut all of them."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.to_destination = 0
        self.to_source = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._done.is_set():
            readable = [self._listener, *(end for pair in self._pairs for end in pair)]
            for end in select.select(readable, [], [], 0.02)[0]:
                if end is self._listener:
                    near, _ = self._listener.accept()
                    self._pairs.append((near, socket.create_connection(("127.0.0.1", self._target))))
                    continue
                pair = next(pair for pair in self._pairs if end in pair)
                with suppress(OSError):
                    data = end.recv(1 << 16)
                    if not data:
                        self._pairs.remove(pair)
                        for both in pair:
                            both.close()
                        break
                    pair[1 - pair.index(end)].sendall(data)
                    if end is pair[0]:
                        self.to_source += len(data)
                    else:
                        self.to_destination += len(data)
        for pair in self._pairs:
            for end in pair:
                end.close()
        self._listener.close()

    def cut(self) -> None:
        self._done.set()
        self._thread.join()


@pytest.mark.parametrize("when", ["precopy", "postcopy"])
def test_a_connection_that_is_cut(runs: list[Run], when: str) -> None:
    arguments = [*SMALL, "--size", "16M", "--json"]
    source = start(
        runs, *arguments, "--listen", "127.0.0.1:0", "--rounds", "1000", "--bulk-rate", "64k",
        "--downtime-goal", "0" if when == "precopy" else "1000",
    )  # fmt: skip
    proxy = Proxy(int(source.await_line(r"listening on 127\.0\.0\.1:(\d+)")[1]))
    try:
        destination = start(runs, *arguments, "--connect", f"127.0.0.1:{proxy.port}")
        deadline = time.monotonic() + ANSWER_S
        # the two HELLOs are 96 bytes; what comes after them is RUNNING, requests and signs of life
        while time.monotonic() < deadline and (
            proxy.to_destination < 1 << 20 if when == "precopy" else proxy.to_source < 96 + 32 * 4
        ):
            time.sleep(0.005)
    finally:
        proxy.cut()
    endings = {}
    for name, run in (("source", source), ("destination", destination)):
        status, out, err = run.end()
        assert (status, out) == (1, ""), err
        endings[name] = err.splitlines()[-1]
        assert "closed the" in endings[name] or "says:" in endings[name]
    if when == "precopy":
        assert (
            "the switch had not happened: the data is still here, and the work went on" in endings["source"]
        )
        assert "it is the source's still" in endings["destination"]
    else:
        assert "the switch had been sent" in endings["source"]
        assert "pages never arrived and are lost" in endings["destination"]


def test_strangers_do_not_stop_a_source(runs: list[Run]) -> None:
    source = start(runs, *SMALL, "--listen", "127.0.0.1:0", "--json")
    port = int(source.await_line(r"listening on 127\.0\.0\.1:(\d+)")[1])
    for rubbish in (b"GET / HTTP/1.0\r\n\r\n" * 10, b"", b"\0" * 100_000):
        with socket.create_connection(("127.0.0.1", port)) as stranger, suppress(OSError):
            stranger.sendall(rubbish)
            stranger.shutdown(socket.SHUT_WR)
        assert "127.0.0.1" in source.await_line("refused a connection from (.*)")[1]
    destination = start(runs, *SMALL, "--connect", f"127.0.0.1:{port}", "--json")
    for run in (source, destination):
        status, out, err = run.end()
        assert status == 0, err
        check(json.loads(out), 8 << 20)


def test_a_source_that_is_no_source(runs: list[Run]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        run = start(runs, *SMALL, "--connect", f"127.0.0.1:{listener.getsockname()[1]}")
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"220 mail.example ESMTP ready\r\n" * 5)
            status, _, err = run.end()
    assert status == 1
    assert "no frame of this protocol" in err


def test_nobody_listens(runs: list[Run]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    status, _, err = start(runs, *SMALL, "--connect", f"127.0.0.1:{port}").end()
    assert status == 1
    assert f"cannot connect to 127.0.0.1:{port}" in err and "start the source first" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "0"], "greater than zero"),
        (["--size", "-5M"], "expected a number"),
        (["--size", "100k"], "at least"),
        (["--size", "100000000T"], "cannot map"),
        (["--input", "/nonexistent/text"], "give readable files"),
        (["--input", "/dev/null"], "nothing to index"),
        (["--rounds", "0"], "--rounds"),
        (["--timeout", "0"], "--timeout"),
        (["--downtime-goal", "-1"], "--downtime-goal"),
        (["--steps", "0"], "--steps"),
        (["--listen", "nowhere"], "HOST:PORT"),
        (["--connect", "host:99999"], "port"),
        (["--connect", "127.0.0.1:0"], "give the port"),
        (["--plot", "/nonexistent/x.png"], "no directory"),
        (["--plot", "x.doc"], ".png"),
        (["--pause-at", "nowhere"], "SIDE:PHASE"),
        (["--bulk-rate", "much"], "expected a number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    # argparse takes "-5M" for an option unless it is joined on
    joined = [f"{arguments[0]}={arguments[1]}"]
    defaults = [] if arguments[0] == "--size" else ["--size", "1M"]
    status = cli.main(["demo", "postcopy", *defaults, *joined])
    out, err = capfd.readouterr()
    assert (status, out) == (2, "")
    assert words in err and len(err.splitlines()) == 1, err


def test_a_port_that_is_taken(runs: list[Run]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        status, _, err = start(runs, *SMALL, "--listen", f"127.0.0.1:{port}").end()
    assert status == 2
    assert "cannot listen" in err


def test_the_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from uspace_mm.demo.plot import check_plot
    from uspace_mm.errors import UnsupportedError

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match="needs matplotlib"):
        check_plot(tmp_path / "x.png")
