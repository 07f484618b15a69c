"""Merging page sizes: matrix, JUnit, JSON, the lines on a terminal."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ElementTree

import pytest

from uspace_mm.guest.pagesize import PAGE_SIZES
from uspace_mm.guest.testing import junit
from uspace_mm.guest.testing.live import Lines, Terminal, printable
from uspace_mm.guest.testing.results import CaseResult, SizeResult, Status
from uspace_mm.guest.testing.suite import SuiteResult, side_by_side
from uspace_mm.guest.testing.text import summary

K4, K16, K64 = PAGE_SIZES


def size(name: str, **statuses: Status) -> SizeResult:
    tests = {
        f"tests/test_a.py::{test}": CaseResult(f"tests/test_a.py::{test}", status, 0.5, finished=True)
        for test, status in statuses.items()
    }
    for test in tests.values():
        if test.bad:
            test.reason, test.details = f"{test.id} broke", [f"E  {test.id} broke \x1b\x00"]
            test.output = [("Captured stdout call", "said\n"), ("Captured stderr call", "err\n")]
    return SizeResult(name, tests=tests, planned=list(tests), boots=1, page_size_bytes=1)


@pytest.fixture
def three() -> SuiteResult:
    result = SuiteResult(
        [
            size("4k", one="passed", two="passed", three="failed", four="skipped"),
            size("16k", one="passed", two="failed", three="failed", four="skipped"),
            size("64k", one="passed"),
        ],
        12.5,
    )
    result.sizes[2].planned = list(result.sizes[0].planned)
    result.sizes[2].not_run = result.sizes[2].planned[1:]
    result.sizes[2].problems = ["the guest's kernel panicked: Kernel panic"]
    return result


def test_rows_that_differ(three: SuiteResult) -> None:
    rows = {row.test.rpartition("::")[2]: row.cells for row in three.rows()}
    assert rows == {
        "one": ("passed", "passed", "passed"),
        "two": ("passed", "failed", "not run"),
        "three": ("failed", "failed", "not run"),
        "four": ("skipped", "skipped", "not run"),
    }
    text = summary(three, failures=False)
    assert "test_a.py::two    passed   failed   not run" in text
    assert "test_a.py::one" not in text
    assert "1 test alike on all page sizes: 1 passed" in text
    assert "64k: the guest's kernel panicked" in text and "64k: 3 not run:" in text
    assert text.endswith("64k: 1 passed, 3 not run; 12.5 s")
    assert "test_a.py::one    passed   passed   passed" in summary(three, all_rows=True, failures=False)


def test_what_fails_alike_is_shown_once(three: SuiteResult) -> None:
    text = summary(three)
    assert text.count("test_a.py::three broke") == 1
    assert "test_a.py::three [4k, 16k]" in text and "test_a.py::two [16k]" in text
    assert "Captured stderr call" in text


def test_a_name_that_depends_on_the_page_size_is_no_difference() -> None:
    result = SuiteResult([size("4k", a="passed", b4="passed"), size("16k", a="passed", b16="skipped")])
    assert [row.differs for row in result.rows()] == [False, False, False]
    assert "2 tests that only some page sizes have" in summary(result)
    assert "b16" not in summary(result) and "b16" in summary(result, all_rows=True)
    result = SuiteResult([size("4k", a="passed"), size("16k", a="passed", b16="failed")])
    assert [row.differs for row in result.rows()] == [False, True]


def test_what_fails_everywhere_is_named_though_no_row_differs() -> None:
    result = SuiteResult([size("4k", a="failed"), size("16k", a="failed")])
    assert "failed on 4k, 16k: tests/test_a.py::a" in summary(result)
    assert result.exit_status == 1


def test_exit_status() -> None:
    passed, failed = size("4k", a="passed"), size("16k", a="failed")
    refused = SizeResult("64k", pytest_status=4)
    assert SuiteResult([passed]).exit_status == 0
    assert SuiteResult([passed, failed]).exit_status == 1
    assert SuiteResult([refused, refused]).exit_status == 2
    assert SuiteResult([passed, refused]).exit_status == 1
    assert SuiteResult([SizeResult("4k", pytest_status=5)]).exit_status == 1


def test_nothing_collected_is_said() -> None:
    assert "4k: pytest collected no tests" in summary(SuiteResult([SizeResult("4k", pytest_status=5)]))
    refused = SizeResult("4k", pytest_status=4, output="ERROR: unrecognized arguments: --x\n")
    assert "4k: ERROR: unrecognized arguments: --x" in summary(SuiteResult([refused]))


def test_junit_has_a_suite_per_size_and_the_size_of_each_case(three: SuiteResult) -> None:
    root = ElementTree.fromstring(junit.document(three))
    assert [suite.get("name") for suite in root] == ["guest 4k", "guest 16k", "guest 64k"]
    for suite, name in zip(root, ("4k", "16k", "64k"), strict=True):
        cases = list(suite.iter("testcase"))
        assert suite.get("tests") == str(len(cases))
        assert suite.get("failures") == str(len(list(suite.iter("failure"))))
        assert suite.get("errors") == str(len(list(suite.iter("error"))))
        assert suite.get("skipped") == str(len(list(suite.iter("skipped"))))
        for case in cases:
            properties = {p.get("name"): p.get("value") for p in case.iter("property")}
            assert properties == {"page_size": name}
            assert str(case.get("name")).endswith(f"[{name}]")
    failed = next(c for c in root[1].iter("testcase") if c.get("name") == "two[16k]")
    assert failed.get("classname") == "tests.test_a" and failed.get("time") == "0.500"
    failure = failed.find("failure")
    assert failure is not None and failure.get("message") == "tests/test_a.py::two broke"
    assert "broke #x1B#x00" in str(failure.text)
    assert failed.findtext("system-out") == "Captured stdout call\nsaid\n"
    assert [c.get("name") for c in root[2].iter("testcase")][-1] == "harness 1[64k]"
    assert root.get("tests") == str(len(list(root.iter("testcase"))))


@pytest.mark.parametrize(
    ("test", "names"),
    [
        ("tests/test_a.py::test_x", ("tests.test_a", "test_x[16k]")),
        ("tests/test_a.py::C::test_x[1-a::b]", ("tests.test_a.C", "test_x[1-a::b-16k]")),
        ("tests/test_a.py", ("tests.test_a", "tests.test_a[16k]")),
    ],
)
def test_names_of_cases(test: str, names: tuple[str, str]) -> None:
    assert junit.case_names(test, "16k") == names


def test_json_holds_what_differs_and_every_test(three: SuiteResult) -> None:
    data = json.loads(json.dumps(three.as_json()))
    assert data["exit_status"] == 1
    assert [entry["id"].rpartition("::")[2] for entry in data["differ"]] == ["two", "three", "four"]
    assert data["differ"][0]["status"] == {"4k": "passed", "16k": "failed", "64k": "not run"}
    assert data["page_sizes"][1]["counts"] == {"failed": 2, "skipped": 1, "passed": 1}
    assert len(data["page_sizes"][0]["tests"]) == 4


def test_lines_in_a_pipe() -> None:
    out = io.StringIO()
    Lines(out).finished(K16, CaseResult("t.py::a[\x1b]", "skipped", 0.123, reason="no\ndevice"))
    assert out.getvalue() == "16k  skipped  t.py::a[\\x1b]  0.12 s  (no\\ndevice)\n"
    assert printable("ü\udcff") == "ü\\udcff"


def test_a_terminal_has_one_line_per_test_in_all_sizes() -> None:
    out = io.StringIO()
    terminal = Terminal([K4, K16], out)
    for k in (K4, K16):
        terminal.phase(k, "running")
    terminal.planned(K4, ["t.py::a", "t.py::only"])
    terminal.planned(K16, ["t.py::a", "t.py::lost"])
    terminal.started(K4, "t.py::a")
    terminal.finished(K4, CaseResult("t.py::a", "passed"))
    assert "t.py::a  " not in out.getvalue(), "16k has not said"
    terminal.finished(K4, CaseResult("t.py::only", "passed"))
    assert "t.py::only  \x1b[32m4k passed\x1b[0m  \x1b[31m16k -" in out.getvalue()
    terminal.finished(K16, CaseResult("t.py::a", "failed"))
    assert "t.py::a  \x1b[32m4k passed\x1b[0m  \x1b[31m16k failed" in out.getvalue()
    terminal.phase(K4, "done")
    terminal.phase(K16, "done")
    assert out.getvalue().endswith("\r\x1b[K")


def test_guests_side_by_side() -> None:
    gib = 1 << 30
    assert side_by_side(3, memory_bytes=gib, cpus=2, available_bytes=20 * gib) == 3
    assert side_by_side(3, memory_bytes=gib, cpus=1, available_bytes=20 * gib) == 2
    assert side_by_side(3, memory_bytes=3 * gib, cpus=2, available_bytes=8 * gib) == 1
    assert side_by_side(3, memory_bytes=3 * gib, cpus=2, available_bytes=gib) == 1
