"""The runner behind scripts/test counts what happened, a crash and a hang of pytest included."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from scripts.lib import checks
from scripts.lib.running import Tally, run


def run_tests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, *arguments: str, quick: bool = False
) -> Tally:
    """Let the runner run a file of tests, and return its tally with bare test names."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_it.py").write_text(textwrap.dedent(source))
    (tests / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    monkeypatch.setattr(checks, "BUILD", tmp_path)
    # Neither another test's nor the outer run's options are these tests' business.
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    tally = Tally()
    checks.python_tests(
        tally, quick, ["-p", "no:cacheprovider", f"--rootdir={tests}", str(tests), *arguments]
    )
    return Tally(
        [name.rpartition("::")[2] for name in tally.passed],
        [name.rpartition("::")[2] for name in tally.failed],
        [(name.rpartition("::")[2], reason) for name, reason in tally.skipped],
    )


def test_outcomes_are_counted_once_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tally = run_tests(
        monkeypatch,
        tmp_path,
        """
        import pytest

        @pytest.fixture
        def bad_end():
            yield
            assert False

        def test_good(): pass
        def test_bad(): assert False
        def test_bad_at_its_end(bad_end): pass
        def test_not_here(): pytest.skip("lacks: a thing")
        @pytest.mark.xfail
        def test_known(): assert False
        @pytest.mark.slow
        def test_slow(): pass
        """,
        quick=True,
    )
    assert tally.passed == ["test_good"]
    assert tally.failed == ["test_bad", "test_bad_at_its_end"]
    assert [name for name, _ in tally.skipped] == ["test_not_here", "test_known"]
    assert tally.skipped[0] == ("test_not_here", "lacks: a thing")


def test_a_crash_is_named_and_the_rest_still_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tally = run_tests(
        monkeypatch,
        tmp_path,
        """
        import os, resource, signal
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        def test_before(): pass
        def test_segfault(): os.kill(os.getpid(), signal.SIGSEGV)
        def test_between(): pass
        def test_killed(): os.kill(os.getpid(), signal.SIGKILL)
        def test_after(): pass
        """,
    )
    assert tally.passed == ["test_before", "test_between", "test_after"]
    assert tally.failed == ["test_segfault", "test_killed"]
    assert "test_segfault: pytest ended by status -11 in it; going on with the rest" in capfd.readouterr().out


def test_a_test_that_hangs_with_the_gil_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UMM_TEST_LIMIT_S", "1")
    tally = run_tests(
        monkeypatch,
        tmp_path,
        """
        import ctypes
        def test_hangs(): ctypes.PyDLL(None).sleep(1000)  # PyDLL: without letting go of the GIL
        def test_after(): pass
        """,
    )
    assert tally.failed == ["test_hangs"]
    assert tally.passed == ["test_after"]
    captured = capfd.readouterr()
    assert "test_hangs: pytest out of time or killed in it" in captured.out
    assert "Timeout" in captured.err and "test_hangs" in captured.err


@pytest.mark.parametrize(
    ("source", "arguments", "failed"),
    [
        ("def test_good(): pass", ["-k", "no_such_test"], 1),
        ("def test_good(): pass", ["--no-such-option"], 1),
        ("import no_such_module_of_ours\ndef test_good(): pass", [], 1),
        ("def broken(:", [], 1),
    ],
)
def test_a_run_without_tests_has_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, arguments: list[str], failed: int
) -> None:
    tally = run_tests(monkeypatch, tmp_path, source, *arguments)
    assert tally.passed == []
    assert len(tally.failed) == failed


def test_the_last_line_is_the_count_and_the_status_follows_it(capsys: pytest.CaptureFixture[str]) -> None:
    skips = [("c", "lacks: a thing")]
    assert checks.conclude(Tally(["a", "b"], [], skips), quick=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "2 passed, 0 failed, 1 skipped"
    assert "   c: lacks: a thing" in lines
    assert checks.conclude(Tally(["a"], ["b"], []), quick=False) == 1
    assert capsys.readouterr().out.endswith("   b\n1 passed, 1 failed, 0 skipped\n")
    assert checks.conclude(Tally([], [], skips), quick=False) == 1


def test_a_command_that_takes_too_long_is_ended_with_its_children() -> None:
    outcome = run("sh", "-c", "echo begun; sleep 1000 & sleep 1000", limit_s=0.5)
    assert outcome.status is None
    assert not outcome.ok
    assert outcome.output.startswith("begun")
