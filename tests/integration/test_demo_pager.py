"""The pager demonstration end to end on real files, and every file that it cannot page."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uspace_mm.cli import main
from uspace_mm.demo import pager_demo
from uspace_mm.pager import Region

PAGE = os.sysconf("SC_PAGESIZE")
LEAST = pager_demo.BUDGET_MIN_PAGES * PAGE


def write(path: Path, size: int, seed: int = 1) -> bytes:
    data = np.random.default_rng(seed).integers(0, 200, size, dtype=np.uint8).tobytes()
    path.write_bytes(data)
    return data


def run_json(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    status = main(["demo", "pager", *args, "--json"])
    captured = capsys.readouterr()
    assert captured.err == ""
    return status, json.loads(captured.out)


@pytest.mark.parametrize(
    ("size", "word_bytes"),
    [
        (1, 1),
        (2, 2),
        (PAGE - 1, 1),
        (PAGE, 8),
        (PAGE + 4, 4),
        (8 * LEAST, 8),
        (8 * LEAST + 12345, 1),
        (3 * LEAST + 2, 2),
    ],
)
def test_any_size_is_counted_and_sorted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int, word_bytes: int
) -> None:
    data = write(tmp_path / "data", size)
    status, result = run_json([str(tmp_path / "data")], capsys)
    assert status == 0
    assert result["file_bytes"] == size
    assert result["word_bytes"] == word_bytes
    assert result["words"] * word_bytes == size
    assert result["distinct_bytes"] == len(set(data))
    assert result["commonest_byte_count"] == max(Counter(data).values())
    assert result["histogram_matches"] and result["is_sorted"] and result["same_words"]
    if size % 2:
        assert result["distinct_pairs"] is None
    else:
        assert result["distinct_pairs"] == len(set(np.frombuffer(data, "u2").tolist()))


def test_the_budget_is_kept_by_evicting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data", 8 * LEAST)
    status, result = run_json([str(tmp_path / "data"), "--budget", str(2 * LEAST)], capsys)
    assert status == 0
    assert result["budget_bytes"] == 2 * LEAST
    assert 0 < result["peak_bytes"] <= 2 * LEAST
    counters, latency = result["stats"]["counters"], result["stats"]["latency"]["total"]
    assert counters["evicted_clean"] + counters["evicted_dirty"] > 0
    assert counters["faults"] > 0
    assert 0 < latency["p50_ns"] <= latency["p99_ns"]


def test_the_default_budget_is_a_quarter_of_the_file() -> None:
    assert pager_demo.default_budget(64 * LEAST) == 16 * LEAST
    assert pager_demo.default_budget(1) == LEAST


def test_text_tells_results_and_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data", 8 * LEAST)
    assert main(["demo", "pager", str(tmp_path / "data")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\x1b" not in captured.out
    for words in (
        "histogram equals the file's",
        "fault latency",
        "prefetched",
        "evicted",
        "within the budget",
    ):
        assert words in captured.out
    assert "NO" not in captured.out


def test_the_file_is_not_changed(tmp_path: Path) -> None:
    data = write(tmp_path / "data", 3 * LEAST + 8)
    assert main(["demo", "pager", str(tmp_path / "data"), "--json"]) == 0
    assert (tmp_path / "data").read_bytes() == data


def test_a_file_that_becomes_shorter_is_an_error_not_wrong_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data", 8 * LEAST)
    copy = pager_demo._copy

    def shrink_and_copy(source: Region, target: Region, size: int, tell: Callable[[float], None]) -> None:
        source.evict()
        os.truncate(tmp_path / "data", LEAST)
        copy(source, target, size, tell)

    monkeypatch.setattr(pager_demo, "_copy", shrink_and_copy)
    assert main(["demo", "pager", str(tmp_path / "data")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "is lost" in captured.err and len(captured.err.splitlines()) == 1


def test_a_wrong_sort_is_found_and_exits_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data", 2 * LEAST)
    monkeypatch.setattr(pager_demo, "_sort", lambda target, size, width: None)
    status, result = run_json([str(tmp_path / "data")], capsys)
    assert status == 1
    assert not result["is_sorted"]
    assert result["histogram_matches"] and result["same_words"]


def test_a_changed_word_is_found_and_exits_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data", 2 * LEAST)
    sort = pager_demo._sort

    def sort_and_damage(target: Region, size: int, width: int) -> None:
        sort(target, size, width)
        target.array(f"u{width}", shape=(size // width,))[-1] += np.uint64(1)

    monkeypatch.setattr(pager_demo, "_sort", sort_and_damage)
    status, result = run_json([str(tmp_path / "data")], capsys)
    assert status == 1
    assert result["is_sorted"]
    assert not result["same_words"] and not result["histogram_matches"]


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["demo", "pager", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return captured.err


def test_a_missing_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in refused([str(tmp_path / "none")], capsys)


def test_an_empty_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").touch()
    assert "is empty" in refused([str(tmp_path / "empty")], capsys)


def test_a_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a directory" in refused([str(tmp_path)], capsys)


def test_a_pipe_is_refused_without_waiting_for_its_writer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in refused([str(tmp_path / "pipe")], capsys)


def test_a_socket_and_a_device_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name is at most 108 bytes long
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        assert "no regular file" in refused(["socket"], capsys)
    assert "no regular file" in refused(["/dev/zero"], capsys)


def test_a_file_without_the_right_to_read_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "data", 100)
    (tmp_path / "data").chmod(0)
    if os.geteuid() == 0:
        # root may read everything: look at it as somebody else.
        os.seteuid(65534)
        try:
            message = refused([str(tmp_path / "data")], capsys)
        finally:
            os.seteuid(0)
    else:
        message = refused([str(tmp_path / "data")], capsys)
    assert "Permission denied" in message


@pytest.mark.parametrize("budget", ["0", "-1", "12 apples", "1", str(LEAST - 1)])
def test_a_budget_that_is_no_budget_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], budget: str
) -> None:
    write(tmp_path / "data", 100)
    message = refused([str(tmp_path / "data"), f"--budget={budget}"], capsys)
    assert "budget" in message or "size" in message
