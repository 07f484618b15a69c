"""The parts of the postcopy demo that need no kernel feature: the work, the reports, the picture's data."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uspace_mm.demo import report, texts
from uspace_mm.demo.options import Options, parse_address
from uspace_mm.demo.view import View, microseconds
from uspace_mm.demo.work import MINIMUM_BYTES, Index, Layout
from uspace_mm.errors import InputError
from uspace_mm.postcopy.errors import ProtocolError
from uspace_mm.postcopy.receiver import FaultReport

WORD = re.compile(rb"[0-9A-Za-z_\x80-\xff]+")


def index_of(text: bytes, size: int = MINIMUM_BYTES) -> Index:
    memory = np.zeros(size, np.uint8)
    index = Index(memory)
    index.text[:] = np.frombuffer(
        (text * (index.text.nbytes // len(text) + 1))[: index.text.nbytes], np.uint8
    )
    return index


def words_of(rng: np.random.Generator, different: int, count: int) -> bytes:
    vocabulary = np.array([b"w%x" % n for n in rng.integers(0, 1 << 40, different)], object)
    chosen = vocabulary[rng.integers(0, different, count)]
    return b"\n".join(b" ".join(chosen[at : at + 12]) for at in range(0, count, 12))


def test_the_index_agrees_with_a_simple_count() -> None:
    index = index_of(words_of(np.random.default_rng(3), 400, 40_000), 4 * MINIMUM_BYTES)
    steps = 8
    for _ in range(steps):
        index.step()
    read = index.text[: int(index.header[1])].tobytes()
    expected = Counter(WORD.findall(read))
    assert index.steps == steps
    assert index.totals() == {
        "words": expected.total(),
        "lines": read.count(b"\n"),
        "passes": 0,
        "overflow": 0,
    }
    found = {word.encode(): count for word, count in index.most_frequent(1000)}
    assert found == dict(expected)
    for word in list(expected)[:20]:
        places = [match.start() for match in WORD.finditer(read) if match[0] == word]
        # the ring of postings holds all of them: fewer words than its room were read
        assert index.occurrences(word) == places[::-1]
    assert index.occurrences(b"never_seen") == []


def test_the_same_steps_give_the_same_bytes_wherever_they_are_done() -> None:
    text = words_of(np.random.default_rng(4), 2000, 60_000)
    whole, moved = index_of(text), index_of(text)
    for _ in range(20):
        whole.step()
    for _ in range(9):
        moved.step()
    elsewhere = Index(moved.memory.copy())
    for _ in range(11):
        elsewhere.step()
    assert elsewhere.digest() == whole.digest()
    elsewhere.memory[-1] ^= 1
    assert elsewhere.digest() != whole.digest()


def test_the_text_starts_again_and_a_full_table_loses_no_count() -> None:
    # more different words than the table of the smallest memory has slots
    index = index_of(words_of(np.random.default_rng(5), 6000, 120_000))
    while index.totals()["passes"] < 2:
        index.step()
    totals = index.totals()
    assert totals["overflow"] > 0
    assert int(index.counts.sum()) + totals["overflow"] == totals["words"]
    assert int(index.header[1]) == 0
    newest = index.occurrences(index.most_frequent(1)[0][0].encode())
    assert 0 < len(newest) <= index.layout.postings


@pytest.mark.parametrize("text", [b"\n", b"x" * 70_000 + b" ", bytes([0x80])])
def test_texts_without_ordinary_words(text: bytes) -> None:
    index = index_of(text)
    for _ in range(30):
        index.step()
    read = index.totals()
    assert read["words"] >= (0 if text == b"\n" else 30)


def test_garbage_in_the_tables_does_not_hang_the_work() -> None:
    """Inside a guard, pages that never arrived read as a fill byte; the step has to end."""
    index = Index(np.full(MINIMUM_BYTES, 0xBD, np.uint8))
    with suppress(IndexError, ValueError, OverflowError):
        index.step()
    index = index_of(b"some words ")
    index.keys[:] = 0xBDBDBDBDBDBDBDBD
    index.step()
    assert index.totals()["overflow"] > 0


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + (1 << 16), 3 << 20, 32 << 20, 512 << 20, 5 << 30])
def test_the_layout_fits(size: int) -> None:
    layout = Layout.of(size)
    assert layout.slots & (layout.slots - 1) == 0
    assert layout.text_bytes > size // 3
    assert layout.text_offset % (1 << 16) == 0
    assert layout.text_offset >= 32 * layout.slots + 16 * layout.postings + (1 << 16)


def test_too_small_a_memory_is_refused() -> None:
    with pytest.raises(InputError, match="at least"):
        Layout.of(MINIMUM_BYTES - 1)


def filled(size: int, files: list[Path], seed: int = 1) -> npt.NDArray[np.uint8]:
    text = np.zeros(size, np.uint8)
    texts.fill(text, files, seed)
    return text


def test_input_is_repeated_to_fill(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"de")
    files = [tmp_path / "a", tmp_path / "b"]
    assert filled(13, files).tobytes() == b"abcdeabcdeabc"
    assert filled(4, files).tobytes() == b"abcd"
    with pytest.raises(InputError, match="readable"):
        filled(4, [tmp_path / "c"])
    (tmp_path / "b").write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        filled(4, [tmp_path / "b"])


def test_the_seed_chooses_the_order_of_the_library() -> None:
    assert filled(50_000, [], 1).tobytes() == filled(50_000, [], 1).tobytes()
    assert filled(50_000, [], 1).tobytes() != filled(50_000, [], 2).tobytes()
    assert not any("site-packages" in path.parts for path in texts.standard_library())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:0", ("::1", 0)), (":7000", ("", 7000))],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", "host", "host:", "host:x", "host:65536", "host:-1"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="HOST:PORT"):
        parse_address(text)


def test_options_cross_to_the_other_process() -> None:
    options = Options(size=5, input=["a b"], host="::1", port=9, pause_at="source:switch", timeout_s=0.5)
    assert Options.from_json(options.to_json()) == options


@given(st.lists(st.integers(0, 5), min_size=1, max_size=700))
def test_a_map_shows_what_matters_of_each_group(states: list[int]) -> None:
    shown = report.map_states(report.page_map(np.array(states, np.uint8), bins=64))
    assert shown.size == min(len(states), 64)
    assert set(shown.tolist()) <= set(states)
    for state in (5, 2):  # lost, then missing: never hidden by another one, but missing by lost
        if state in states and (state == 5 or 5 not in states):
            assert state in shown
    if len(states) <= 64:
        assert shown.tolist() == states


FAULTS = FaultReport(10, 1, 2, 3, 4, "fetch", 5, ((1, 2, 10),))
RECEIVED = dict.fromkeys(("urgent_pages", "bulk_pages", "duplicate_pages", "last_page_ns", "switch_ns"), 7)
SENT = dict.fromkeys(
    ("pages_total", "page_size", "verified", "mismatched", "zero_pages", "rounds", "precopy_pages",
     "missing_pages", "downtime_ns", "bytes_sent", "requests"), 8,
)  # fmt: skip


def finish(**changes: Any) -> bytes:
    message = json.loads(report.finish_message(20, "ab" * 16, RECEIVED, FAULTS, {"words": 1, "lines": 2}))
    message |= changes
    return json.dumps({name: value for name, value in message.items() if value is not None}).encode()


def test_the_report_comes_back() -> None:
    message = report.parse_finish(finish())
    assert message["steps"] == 20 and message["digest"] == "ab" * 16
    result = report.combine(
        SENT | {"mismatched": 0, "downtime_ns": 8_000_000}, message, work_matches=True, total_s=1.5
    )
    assert result["ok"] is True and result["fault_p50_ns"] == 1 and result["downtime_ms"] == 8.0
    assert report.parse_verdict(json.dumps(result).encode()) == result


@pytest.mark.parametrize(
    ("stats", "matches"), [({"mismatched": 1}, True), ({"mismatched": 0, "verified": 7}, True), ({}, False)]
)
def test_what_is_not_all_right_is_not_ok(stats: dict[str, int], matches: bool) -> None:
    message = report.parse_finish(finish())
    result = report.combine(SENT | {"mismatched": 0} | stats, message, work_matches=matches, total_s=1.5)
    assert result["ok"] is False


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"[" * 100_000,
        finish(steps=-1),
        finish(steps=True),
        finish(steps=10**7),
        finish(steps=1.5),
        finish(faults=None),
        finish(digest=5),
        finish(digest="x" * 65),
        finish(slowest_fault_stage="\x1b[2J"),
    ],
)
def test_a_peer_that_reports_nonsense(text: bytes) -> None:
    with pytest.raises(ProtocolError, match="peer's FINISH|destination claims"):
        report.parse_finish(text)


@given(st.binary(max_size=200))
def test_texts_of_a_peer_never_crash(text: bytes) -> None:
    for parse in (report.parse_finish, report.parse_state, report.parse_verdict):
        with pytest.raises(ProtocolError):
            parse(text)


def test_the_state_has_a_version() -> None:
    assert report.parse_state(b'{"version": 1, "steps": 3, "steps_after": 4}') == {
        "steps": 3,
        "steps_after": 4,
    }
    for text in (b'{"version": 2, "steps": 3, "steps_after": 4}', b'{"version": 1, "steps": -3}'):
        with pytest.raises(ProtocolError):
            report.parse_state(text)


def test_the_view_draws_both_sides() -> None:
    view = View(live=False)
    states = report.page_map(np.array([0, 1, 2, 3, 4, 5] * 50, np.uint8))
    stats = {"bytes_sent": 1 << 20, "bytes_received": 1 << 20, "missing_pages": 50, "arrived_pages": 20}
    view.show({"event": "round", "side": "source", "number": 1, "pages": 1000, "rest": 50})
    view.show({"event": "progress", "side": "source", "steps": 5, "stats": stats, "map": states})
    view.show(
        {
            "event": "progress", "side": "destination", "steps": 6, "stats": stats, "map": states,
            "faults": 30, "p50_ns": 20_000, "p99_ns": 2_000_000,
        }
    )  # fmt: skip
    view.show({"event": "running", "side": "destination", "steps": 6})
    with view.console.capture() as captured:
        view.console.print(view.render())
    text = captured.get()
    for expected in (
        "round 1",
        "1,000 pages",
        "step 6",
        "20 of 50",
        "30 faults",
        "20.0 us",
        "2.00 ms",
        "streamed",
    ):
        assert expected in re.sub(r"\s*│\s*", " ", text)


def test_latencies_for_people() -> None:
    assert [microseconds(ns) for ns in (0, 1500, 999_999, 2_500_000)] == [
        "0.0 us",
        "1.5 us",
        "1000.0 us",
        "2.50 ms",
    ]
