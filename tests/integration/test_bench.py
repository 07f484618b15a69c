"""Benchmarks at tiny sizes on the real kernel: they run, report what they promise, and notice wrong bytes."""

from __future__ import annotations

import json
import mmap
from typing import Any

import numpy as np
import pytest

from uspace_mm.bench import contenders, load, memory
from uspace_mm.cli import main
from uspace_mm.errors import UnsupportedError

PAGE = mmap.PAGESIZE


def run_quick(name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["bench", name, "--quick", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    record: dict[str, Any] = json.loads(captured.out)
    return record


def check_shape(record: dict[str, Any], name: str) -> None:
    assert list(record) == ["bench", "machine", "results", "ratios"]
    assert record["bench"] == name
    assert set(load(name).TARGETS) <= set(record["ratios"])
    assert all(value > 0 for value in record["ratios"].values())
    assert all(value > 0 for value in record["results"].values())


def test_fault_reports_both_thread_counts(capsys: pytest.CaptureFixture[str]) -> None:
    record = run_quick("fault", capsys)
    check_shape(record, "fault")
    for suffix in ("", "_64"):
        for name in ("floor", "ours", "unpinned", "inline_floor", "inline"):
            quantiles = [record["results"][f"{name}_{q}_ns{suffix}"] for q in ("p50", "p99", "p999")]
            assert quantiles == sorted(quantiles)
        assert f"ours_vs_floor_p99{suffix}" in record["ratios"]
    results, ratios = record["results"], record["ratios"]
    assert ratios["ours_vs_floor_p50"] == pytest.approx(results["ours_p50_ns"] / results["floor_p50_ns"])


def test_populate_ends_up_huge(capsys: pytest.CaptureFixture[str]) -> None:
    if memory.huge_page_bytes() != 2 << 20:
        pytest.skip("lacks: transparent huge pages of 2 MiB")
    record = run_quick("populate", capsys)
    check_shape(record, "populate")
    assert record["ratios"]["huge_bytes_vs_filled"] == 1.0


def test_populate_without_huge_pages_measures_base_pages_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uspace_mm.bench.populate.huge_page_bytes", lambda: None)
    record = run_quick("populate", capsys)
    assert record["ratios"]["ours_vs_copy_floor"] > 0
    assert "huge_vs_copy_floor" not in record["ratios"]


def test_regions_reports_each_count(capsys: pytest.CaptureFixture[str]) -> None:
    record = run_quick("regions", capsys)
    check_shape(record, "regions")
    assert {f"regions_{count}_p50_ns" for count in (1, 6, 60)} <= set(record["results"])


def test_notifier_reports_what_each_subscriber_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "notifier", "--quick", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    # Tiny runs: a difference of two of them may be negative.
    assert set(load("notifier").TARGETS) <= set(record["ratios"])
    results, ratios = record["results"], record["ratios"]
    assert all(value > 0 for value in results.values())
    assert ratios["added_ns_none"] == results["pair_none_ns"]
    assert ratios["added_ns_one"] == pytest.approx(results["pair_one_ns"] - results["pair_none_ns"])
    assert ratios["lookup_ns_10k"] == results["pair_10k_intervals_ns"]


@pytest.mark.parametrize(
    "kind",
    [contenders.PINNED, contenders.POLLING, contenders.IN_THREAD],
    ids=["pinned", "polling", "in_thread"],
)
@pytest.mark.parametrize("threads", [1, 8])
def test_floor_delivers_the_source(kind: int, threads: int) -> None:
    source = memory.numbered_words(64 * PAGE)
    order = np.random.default_rng(1).permutation(64).astype(np.uint64)
    expected = source[order * (PAGE // 8)]
    with contenders.floor(kind, source) as base:
        touches = contenders.touch(order * PAGE + base, expected, threads)
        assert len(touches.latency_ns) == 64
        assert touches.latency_ns.min() > 0
        assert touches.per_s > 0
        with pytest.raises(contenders.WrongContent, match="1 of 64"):
            contenders.touch(
                order * PAGE + base, np.where(order == 5, 0, expected).astype(np.uint64), threads
            )


def test_touch_refuses_no_threads() -> None:
    words = memory.numbered_words(PAGE)
    with pytest.raises(OSError, match="EINVAL"):
        contenders.touch(words[:1], words[:1], threads=0)


def test_huge_bytes_are_counted_within_the_range_only() -> None:
    huge = memory.huge_page_bytes()
    if huge is None:
        pytest.skip("lacks: transparent huge pages for madvise")
    area = memory.private_memory(4 * huge)
    area.madvise(mmap.MADV_HUGEPAGE)
    words = np.frombuffer(area, dtype=np.uint64)
    words[:] = 1
    start = words.ctypes.data
    found = memory.huge_bytes_in(start, start + 4 * huge)
    assert found % huge == 0
    assert 2 * huge <= found <= 4 * huge
    assert memory.huge_bytes_in(start, start + PAGE) <= PAGE


def test_too_little_memory_is_said() -> None:
    with pytest.raises(UnsupportedError, match="this benchmark needs"):
        memory.require_memory(1 << 60)


def test_too_few_mappings_are_said() -> None:
    from uspace_mm.bench import regions

    with pytest.raises(UnsupportedError, match=r"vm\.max_map_count"):
        regions._require_mappings(1 << 40)
