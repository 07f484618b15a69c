"""A test's result out of the reports of its phases."""

from __future__ import annotations

from typing import Any

from uspace_mm.guest.pagesize import parse_page_size
from uspace_mm.guest.testing.results import CaseResult, SizeResult
from uspace_mm.guest.testing.session import Session
from uspace_mm.guest.testing.size_run import Listener


def report(
    when: str, category: str, outcome: str = "passed", text: str = "", **fields: Any
) -> dict[str, Any]:
    data = {"$report_type": "TestReport", "when": when, "outcome": outcome, "duration": 0.25, **fields}
    return {"kind": "report", "category": category, "text": text, "report": data}


def result_of(*records: dict[str, Any]) -> CaseResult:
    result = CaseResult("t.py::test")
    for record in records:
        result.add(record)
    return result


def test_phases_add_up() -> None:
    result = result_of(report("setup", ""), report("call", "passed"), report("teardown", ""))
    assert (result.status, result.duration_s, result.reason) == ("passed", 0.75, "")


def test_a_failing_call_outranks_a_failing_teardown_and_keeps_both_texts() -> None:
    crash = {"reprcrash": {"message": "AssertionError: nope\nmore"}}
    result = result_of(
        report("setup", ""),
        report("call", "failed", "failed", "E  nope", longrepr=crash),
        report("teardown", "error", "failed", "E  late"),
    )
    assert (result.status, result.reason, result.details) == (
        "failed",
        "AssertionError: nope",
        ["E  nope", "E  late"],
    )


def test_skip_and_xfail_keep_their_reasons() -> None:
    skipped = result_of(report("setup", "skipped", "skipped", longrepr=["t.py", 3, "Skipped: no device"]))
    assert (skipped.status, skipped.reason) == ("skipped", "no device")
    expected = result_of(report("call", "xfailed", "skipped", wasxfail="reason: known"))
    assert (expected.status, expected.reason) == ("xfailed", "known")
    unexpected = result_of(report("call", "xpassed", "passed", wasxfail="known"))
    assert (unexpected.status, unexpected.reason) == ("xpassed", "known")


def test_categories_of_plugins() -> None:
    assert result_of(report("call", "rerun", "failed"), report("call", "passed")).status == "passed"
    assert result_of(report("call", "subtests failed", "failed"), report("call", "passed")).status == "failed"
    assert result_of(report("call", "subtests passed"), report("call", "passed")).status == "passed"


def test_a_strict_xpass_fails_with_its_text() -> None:
    result = result_of(
        report("call", "failed", "failed", "[XPASS(strict)] known", longrepr="[XPASS(strict)] known")
    )
    assert (result.status, result.reason) == ("failed", "[XPASS(strict)] known")


def test_exit_status_of_a_size() -> None:
    assert SizeResult("4k").exit_status == 1, "no test ran"
    assert SizeResult("4k", pytest_status=4).exit_status == 2
    passed = {"a": CaseResult("a", finished=True), "b": CaseResult("b", "skipped", finished=True)}
    assert SizeResult("4k", tests=passed).exit_status == 0
    assert SizeResult("4k", tests=passed, not_run=["c"]).exit_status == 1
    assert SizeResult("4k", tests=passed, problems=["the guest's kernel panicked"]).exit_status == 1
    assert SizeResult("4k", tests=passed | {"c": CaseResult("c", "failed")}).exit_status == 1
    assert SizeResult("4k", tests=passed | {"c": CaseResult("c", "error")}).counts == {
        "error": 1,
        "skipped": 1,
        "passed": 1,
    }


def test_records_that_make_no_sense_are_a_problem_of_the_run() -> None:
    result = SizeResult("16k")
    session = Session(parse_page_size("16k"), result, Listener())
    session.take({"kind": "unheard of"})
    assert result.problems == []
    for record in ({"kind": "start"}, {"kind": "report", "report": 3}, {"kind": "items", "ids": None}):
        session.take(record)
    assert len(result.problems) == 3 and "'start' makes no sense" in result.problems[0]
    assert result.exit_status == 1
