"""Benchmarks without measuring: targets, renderings, the registry and the command's exit statuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest

import uspace_mm.cli.bench as bench_command
from uspace_mm.bench import BENCHMARKS, BenchOptions, BenchReport, load
from uspace_mm.bench.report import Target, at_least, at_most
from uspace_mm.cli import main
from uspace_mm.errors import UnsupportedError

TARGETS = {"ours_vs_floor_p50": at_most(1.15), "unpinned_vs_ours_p50": at_least(4)}


def report(**ratios: float) -> BenchReport:
    return BenchReport("fault", {"ours_p50_ns": 4500.0, "ours_faults_per_s_64": 123456.0}, ratios, TARGETS)


@pytest.mark.parametrize(
    ("target", "ratio", "met"),
    [
        (at_most(1.15), 1.15, True),
        (at_most(1.15), 1.1501, False),
        (at_least(4), 4.0, True),
        (at_least(4), 3.99, False),
    ],
)
def test_target_includes_its_bound(target: Target, ratio: float, met: bool) -> None:
    assert target.met_by(ratio) is met


def test_missed_names_misses_and_what_was_not_measured() -> None:
    assert report(ours_vs_floor_p50=1.0, unpinned_vs_ours_p50=9.0).missed() == []
    assert report(ours_vs_floor_p50=2.0, unpinned_vs_ours_p50=9.0).missed() == ["ours_vs_floor_p50"]
    assert report(ours_vs_floor_p50=1.0).missed() == ["unpinned_vs_ours_p50"]


def test_json_has_the_agreed_keys() -> None:
    record = json.loads(json.dumps(report(ours_vs_floor_p50=1.0).to_dict()))
    assert list(record) == ["bench", "machine", "results", "ratios"]
    assert record["ratios"] == {"ours_vs_floor_p50": 1.0}
    assert {"kernel", "cpus", "page_bytes", "memory_bytes"} <= set(record["machine"])


def test_text_shows_each_ratio_with_target_and_verdict() -> None:
    text = report(ours_vs_floor_p50=1.25, plain_ratio=7.0).to_text()
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}
    assert lines["ours_vs_floor_p50"].split()[1:] == ["1.25", "target", "<=", "1.15", "missed"]
    assert lines["unpinned_vs_ours_p50"].split()[1:] == ["-", "target", ">=", "4", "not", "measured"]
    assert lines["plain_ratio"].split()[1:] == ["7.00"]
    assert lines["ours_p50_ns"].split()[1:] == ["4.50", "us"]
    assert lines["ours_faults_per_s_64"].split()[1:] == ["123456", "/s"]


def test_every_registered_benchmark_has_targets_and_a_help_line() -> None:
    for name in BENCHMARKS:
        bench = load(name)
        assert bench.TARGETS
        assert bench.HELP and "\n" not in bench.HELP


def test_quick_means_one_round_unless_rounds_are_given() -> None:
    assert BenchOptions().rounds_or(5) == 5
    assert BenchOptions(quick=True).rounds_or(5) == 1
    assert BenchOptions(quick=True, rounds=3).rounds_or(5) == 3


def test_command_lists_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(BENCHMARKS)
    assert main(["bench", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(BENCHMARKS)


@pytest.mark.parametrize("args", [["nonesuch"], ["fault", "--rounds", "0"], ["all", "--rounds", "-1"]])
def test_command_refuses_bad_usage(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert args[0] in captured.err or "--rounds" in captured.err


def fake(monkeypatch: pytest.MonkeyPatch, **runs: BenchReport | Exception) -> None:
    """Replace the registry by benchmarks that only return or raise."""

    def run(outcome: BenchReport | Exception) -> Callable[[BenchOptions], BenchReport]:
        def runner(options: BenchOptions) -> BenchReport:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return runner

    monkeypatch.setattr(bench_command, "BENCHMARKS", tuple(runs))
    benches = {name: SimpleNamespace(HELP=name, TARGETS={}, run=run(it)) for name, it in runs.items()}
    monkeypatch.setattr(bench_command, "load", benches.__getitem__)


@pytest.mark.parametrize(
    ("ratio", "flags", "status"), [(1.0, ["--check"], 0), (2.0, [], 0), (2.0, ["--check"], 1)]
)
def test_a_missed_target_is_a_failure_only_when_checked(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ratio: float,
    flags: list[str],
    status: int,
) -> None:
    fake(monkeypatch, one=report(ours_vs_floor_p50=ratio, unpinned_vs_ours_p50=5.0))
    assert main(["bench", "one", *flags]) == status
    assert ("missed" in capsys.readouterr().out) == (ratio == 2.0)


def test_a_benchmark_that_cannot_run_says_why_and_exits_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, one=UnsupportedError("memory: too little"))
    assert main(["bench", "one", "--json"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "memory: too little" in captured.err


def test_all_runs_the_rest_after_one_that_cannot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = report(ours_vs_floor_p50=1.0, unpinned_vs_ours_p50=5.0)
    fake(monkeypatch, first=UnsupportedError("memory: too little"), second=good)
    assert main(["bench", "all", "--json"]) == 3
    captured = capsys.readouterr()
    assert [record["bench"] for record in json.loads(captured.out)] == ["fault"]
    assert "bench first: memory: too little" in captured.err
