"""A run on one page size, with processes of this machine as the guest: every way for a test to end it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stand_in import Booter
from uspace_mm.guest.pagesize import parse_page_size
from uspace_mm.guest.testing.job import Job, Limits
from uspace_mm.guest.testing.results import CaseResult, SizeResult
from uspace_mm.guest.testing.size_run import Listener, SizeRun

K16 = parse_page_size("16k")
HEAD = "import ctypes, os, pytest, signal, sys, time, warnings\n"


def run(
    folder: Path, source: str | dict[str, str], *args: str, booter: Booter | None = None, **fields: object
) -> SizeResult:
    files = source if isinstance(source, dict) else {"test_a.py": source}
    for name, text in {"pytest.ini": "[pytest]\n", **files}.items():
        (folder / name).write_text(text if name.endswith(".ini") else HEAD + text)
    limits = Limits(total_s=60, test_s=1.5, collect_s=5, grace_s=1.5, answer_s=1)
    job = Job(args=args, limits=limits)
    if fields:
        job = Job(args=args, limits=limits, **fields)  # type: ignore[arg-type]
    return SizeRun(K16, booter or Booter(folder), job, Listener()).go()


def statuses(result: SizeResult) -> dict[str, str]:
    return {name.split("::")[-1]: test.status for name, test in result.tests.items()}


def reasons(result: SizeResult) -> dict[str, str]:
    return {name.split("::")[-1]: test.reason for name, test in result.tests.items()}


def test_ordinary_outcomes(tmp_path: Path) -> None:
    result = run(
        tmp_path,
        """
def test_ok(): print("x" * 1_000_000)
def test_flood():
    print("x" * 6_000_000)
    pytest.fail("after the flood", pytrace=False)
def test_fail():
    print("é \\udcff")
    value = 1
    assert value == 2, "nope"
@pytest.mark.xfail(reason="known")
def test_xfail(): assert 0
@pytest.mark.skipif(True, reason="why")
def test_skip(): pass
def test_system_exit(): sys.exit(3)
def test_binary(): os.write(1, bytes(range(256)))
def test_warns(): warnings.warn("careful")
def test_garbage():
    for fd in range(90, 110):
        try: os.write(fd, b'garb\\xff@umm 00 {}')
        except OSError: pass
def test_fork():
    if os.fork() == 0: sys.exit(7)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
@pytest.fixture
def late():
    yield
    raise ValueError("late")
def test_teardown(late): pass
""",
    )
    assert result.problems == [] and result.not_run == [] and result.boots == 1
    assert statuses(result) == {
        "test_ok": "passed",
        "test_flood": "failed",
        "test_fail": "failed",
        "test_xfail": "xfailed",
        "test_skip": "skipped",
        "test_system_exit": "failed",
        "test_binary": "passed",
        "test_warns": "passed",
        "test_garbage": "passed",
        "test_fork": "passed",
        "test_teardown": "error",
    }
    failed = result.tests["test_a.py::test_fail"]
    assert failed.reason == "AssertionError: nope"
    assert "assert 1 == 2" in failed.details[0]
    assert dict(failed.output)["Captured stdout call"] == "é ?\n"
    assert "characters left out" in result.tests["test_a.py::test_flood"].output[0][1]
    assert result.tests["test_a.py::test_ok"].output == []
    assert [w["message"] for w in result.warnings if w["when"] == "runtest"] == ["careful"]
    assert (result.pytest_status, result.exit_status) == (1, 1)


def test_deaths_of_the_interpreter_are_named_and_the_rest_runs(tmp_path: Path) -> None:
    booter = Booter(tmp_path)
    result = run(
        tmp_path,
        {
            "test_a.py": """
def test_segv(): ctypes.string_at(0)
def test_exit(): os._exit(0)
def test_hang(): time.sleep(100)
def test_gil(): ctypes.PyDLL(None).sleep(100)
def test_closes(): os.closerange(3, 300)
def test_last(): pass
""",
            "test_b.py": "ctypes.string_at(0)\ndef test_never(): pass\n",
        },
        booter=booter,
    )
    assert booter.booted == ["16k"], "the machine lived on"
    assert reasons(result) == {
        "test_b.py": "the interpreter was killed by SIGSEGV",
        "test_segv": "the interpreter was killed by SIGSEGV",
        "test_exit": "ended the interpreter with exit status 0 (os._exit?)",
        "test_hang": "took more than 1.5 s",
        "test_gil": "took more than 1.5 s",
        "test_closes": "closed the descriptor that results are reported through",
        "test_last": "",
    }
    assert "in test_segv" in result.tests["test_a.py::test_segv"].details[0]
    assert result.tests["test_a.py::test_hang"].duration_s > 0
    assert "in test_gil" in result.tests["test_a.py::test_gil"].details[0]
    assert "pluggy" not in result.tests["test_a.py::test_gil"].details[0]
    assert result.tests["test_b.py"].status == "error"
    assert result.problems == [] and result.not_run == []


@pytest.mark.parametrize(
    ("answering", "says"), [(True, "its Python does not"), (False, "does not answer any more")]
)
def test_a_wedged_machine_is_booted_again(tmp_path: Path, answering: bool, says: str) -> None:
    booter = Booter(tmp_path, answering=answering)
    source = "def test_1(): pass\ndef test_2(): os.kill(os.getpid(), signal.SIGSTOP)\ndef test_3(): pass\n"
    result = run(tmp_path, source, booter=booter)
    assert statuses(result) == {"test_1": "passed", "test_2": "failed", "test_3": "passed"}
    assert says in reasons(result)["test_2"]
    assert (booter.booted, result.boots) == (["16k", "16k"], 2)


def test_boots_are_bounded_and_the_rest_is_named(tmp_path: Path) -> None:
    source = "@pytest.mark.parametrize('n', range(9))\ndef test(n): os.kill(os.getpid(), signal.SIGSTOP)\n"
    limits = Limits(total_s=60, test_s=0.5, grace_s=0.5, answer_s=1, boots=2)
    (tmp_path / "test_a.py").write_text(HEAD + source)
    result = SizeRun(K16, Booter(tmp_path), Job(limits=limits), Listener()).go()
    assert result.boots == 2 and list(statuses(result)) == ["test[0]", "test[1]"]
    assert result.not_run == [f"test_a.py::test[{n}]" for n in range(2, 9)]
    assert result.problems == ["gave up after 2 boots and 2 pytest processes"]


def test_a_guest_that_does_not_boot(tmp_path: Path) -> None:
    result = run(tmp_path, "def test(): pass\n", booter=Booter(tmp_path, failing=["16k"]))
    assert result.problems == ["no console output from 16k"] and result.exit_status == 1


def test_the_whole_run_has_a_limit(tmp_path: Path) -> None:
    source = "def test_1(): pass\ndef test_2(): time.sleep(100)\ndef test_3(): pass\n"
    (tmp_path / "test_a.py").write_text(HEAD + source)
    result = SizeRun(K16, Booter(tmp_path), Job(limits=Limits(total_s=2.5)), Listener()).go()
    assert reasons(result)["test_2"] == "the whole run took more than 2.5 s"
    assert result.not_run == ["test_a.py::test_3"] and result.exit_status == 1


def test_stopping_from_outside(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(HEAD + "def test_1(): time.sleep(100)\ndef test_2(): pass\n")

    class Stops(Listener):
        def started(self, size: object, test: str) -> None:
            size_run.stop()

    size_run = SizeRun(K16, Booter(tmp_path), Job(), Stops())
    assert size_run.go().not_run == ["test_a.py::test_1", "test_a.py::test_2"]


def test_first_failure_ends_it(tmp_path: Path) -> None:
    source = "def test_1(): pass\ndef test_2(): os._exit(0)\ndef test_3(): pass\n"
    result = run(tmp_path, source, "-x")
    assert statuses(result) == {"test_1": "passed", "test_2": "failed"}
    assert result.not_run == [] and result.exit_status == 1
    result = run(tmp_path, source.replace("os._exit(0)", "assert 0"), "-x")
    assert statuses(result) == {"test_1": "passed", "test_2": "failed"}
    assert result.not_run == [] and result.boots == 1


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("pytest.exit('enough')", "the run was ended by a test: pytest.exit: enough"),
        ("raise KeyboardInterrupt", "the run was ended by a test: KeyboardInterrupt"),
    ],
)
def test_a_test_that_ends_the_session(tmp_path: Path, body: str, problem: str) -> None:
    result = run(tmp_path, f"def test_1(): {body}\ndef test_2(): pass\n")
    assert result.problems == [problem]
    assert statuses(result) == {"test_1": "failed"} and result.exit_status == 1
    assert result.not_run == ["test_a.py::test_2"]


def test_collection(tmp_path: Path) -> None:
    result = run(tmp_path, "def test_1(): pass\n", "-k", "nothing")
    assert (result.tests, result.pytest_status, result.exit_status) == ({}, 5, 1)
    result = run(tmp_path, {"test_b.py": "import no_such_module\n"})
    broken = result.tests["test_b.py"]
    assert (broken.status, result.exit_status) == ("error", 1)
    assert "No module named 'no_such_module'" in broken.details[0]
    assert result.not_run == ["test_a.py::test_1"]
    result = run(tmp_path, "", "--no-such-option")
    assert (result.pytest_status, result.exit_status) == (4, 2)
    assert "--no-such-option" in result.output


def test_a_file_that_dies_when_it_is_collected_again_is_tried_twice(tmp_path: Path) -> None:
    source = """
marks = os.path.join(os.path.dirname(__file__), "processes")
with open(marks, "a") as file: file.write("x")
if len(open(marks).read()) in (2, DEAD): os._exit(3)
def test_1(): os._exit(4)
def test_2(): pass
"""
    result = run(tmp_path, source.replace("DEAD", "2"))
    assert statuses(result) == {"test_1": "failed", "test_2": "passed"} and result.problems == []
    result = run(tmp_path, source.replace("DEAD", "3"))
    assert statuses(result) == {"test_1": "failed", "test_a.py": "error", "test_2": "error"}
    assert reasons(result)["test_2"].startswith(
        "its file could not be collected again: ended the interpreter"
    )


def test_a_file_that_hangs_when_imported(tmp_path: Path) -> None:
    result = run(tmp_path, {"test_a.py": "def test_1(): pass\n", "test_b.py": "time.sleep(100)\n"})
    assert statuses(result) == {"test_b.py": "error", "test_1": "passed"}
    assert reasons(result)["test_b.py"] == "took more than 5 s to import"


def test_chosen_tests_in_their_order(tmp_path: Path) -> None:
    source = "def test_1(): pass\ndef test_2(): pass\ndef test_3(): pass\n"
    only = ("test_a.py::test_3", "test_a.py::test_4", "test_a.py::test_1")
    done: list[str] = []

    class Remembers(Listener):
        def finished(self, size: object, result: CaseResult) -> None:
            done.append(f"{result.id} {result.status}")

    (tmp_path / "test_a.py").write_text(source)
    SizeRun(K16, Booter(tmp_path), Job(only=only), Remembers()).go()
    assert done == ["test_a.py::test_4 error", "test_a.py::test_3 passed", "test_a.py::test_1 passed"]


def test_a_crash_at_exit_is_a_problem_of_the_run(tmp_path: Path) -> None:
    result = run(tmp_path, "import atexit\natexit.register(ctypes.string_at, 0)\ndef test_1(): pass\n")
    assert statuses(result) == {"test_1": "passed"}
    assert result.problems == ["after the last test: killed by SIGSEGV"] and result.exit_status == 1
