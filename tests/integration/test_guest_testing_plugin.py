"""The pytest plugin, in pytest runs of their own, with processes of this machine as guests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = """
import os, pytest
if "UMM_GUEST_PAGE_SIZE" not in os.environ:
    import uspace_mm.guest.testing.prepare as prepare
    from tests.stand_in import for_session
    prepare.for_session = for_session

def pytest_addoption(parser):
    parser.addoption("--colour", default="red")

@pytest.fixture
def where(request):
    return os.environ.get("UMM_GUEST_PAGE_SIZE", "host"), request.config.getoption("colour")
"""
HEAD = "import ctypes, os, pytest, sys, time, unittest, warnings\n"


class Run:
    """One pytest run: its output, exit status, and the words behind the node ids (``-v``)."""

    def __init__(self, folder: Path, *args: str, failing: str = "") -> None:
        booted = folder / "booted.txt"
        booted.unlink(missing_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "UMM_"))}
        environment |= {"PYTHONPATH": str(ROOT), "UMM_STAND_IN_BOOTED": str(booted), "COLUMNS": "200"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "uspace_mm.guest.testing.plugin", "-v", "-rA", *args],
            cwd=folder,
            env=environment | {"UMM_STAND_IN_FAILING": failing},
            capture_output=True,
            text=True,
            timeout=100,
        )
        self.status = done.returncode
        self.text = done.stdout + done.stderr
        self.words = {
            name.partition("::")[2]: word
            for name, word in re.findall(r"^(\S+::\S+) ([A-Z]+)(?: \(.*\))? +\[", done.stdout, re.MULTILINE)
        }
        self.booted = sorted(booted.read_text().split()) if booted.exists() else []


def project(folder: Path, source: str, ini: str = "[pytest]\n") -> Path:
    (folder / "pytest.ini").write_text(ini)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_a.py").write_text(HEAD + source)
    return folder


@pytest.mark.slow
def test_marked_tests_run_in_guests_and_report_as_if_local(tmp_path: Path) -> None:
    folder = project(
        tmp_path,
        """
def test_local(where): assert where == ("host", "blue")

@pytest.mark.pagesize("16k", "64k")
def test_guest(where):
    print("said", where[0])
    assert where == ("16k", "blue")

@pytest.mark.pagesize
@pytest.mark.parametrize("n", [1, 2])
class TestClass:
    def test_n(self, where, n):
        assert where[0] in ("4k", "16k", "64k")
        warnings.warn("careful " + where[0])

@pytest.mark.pagesize("4k")
@pytest.mark.xfail(reason="known")
def test_xfail(): assert 0

@pytest.mark.pagesize("4k")
@pytest.mark.skipif("UMM_GUEST_PAGE_SIZE" in os.environ, reason="because")
def test_skip(): pass

@pytest.mark.pagesize("4k")
def test_segv(): ctypes.string_at(0)

@pytest.mark.pagesize("4k")
def test_teardown(late, record_property): record_property("key", "value")

@pytest.fixture
def late():
    yield
    raise ValueError("late")

@pytest.mark.pagesize("4k,64k")
class TestUnittest(unittest.TestCase):
    def test_u(self): self.assertNotEqual(os.environ["UMM_GUEST_PAGE_SIZE"], "64k")

@pytest.fixture(scope="module")
def of_the_host():
    yield
    print("the host's fixture ended")

def test_last_local(of_the_host): pass

@pytest.mark.pagesize("4k")
def test_after(): pass
""",
        "[pytest]\naddopts = --colour=blue --strict-markers\n",
    )
    run = Run(folder, "--junitxml=out.xml")
    assert run.booted == ["16k", "4k", "64k"], run.text
    assert run.words == {
        "test_local": "PASSED",
        "test_guest[16k]": "PASSED",
        "test_guest[64k]": "FAILED",
        **{f"TestClass::test_n[{n}-{size}]": "PASSED" for n in (1, 2) for size in ("4k", "16k", "64k")},
        "test_xfail[4k]": "XFAIL",
        "test_skip[4k]": "SKIPPED",
        "test_segv[4k]": "FAILED",
        "test_teardown[4k]": "ERROR",
        "TestUnittest::test_u[4k]": "PASSED",
        "TestUnittest::test_u[64k]": "FAILED",
        "test_last_local": "PASSED",
        "test_after[4k]": "PASSED",
    }
    assert run.status == 1
    assert "AssertionError: assert ('64k', 'blue') == ('16k', 'blue')" in run.text
    assert "At index 0 diff: '64k' != '16k'" in run.text
    assert "said 64k" in run.text
    assert (
        "guest 4k: the interpreter was killed by SIGSEGV" in run.text
        and f'File "{folder}/tests/test_a.py", line 26 in test_segv' in run.text
    )
    assert f"{folder}/tests/test_a.py:15: UserWarning: careful 4k" in run.text
    assert "SKIPPED [1] tests/test_a.py:21: because" in run.text
    assert "the host's fixture ended" in run.text
    report = (folder / "out.xml").read_text()
    assert '<property name="key" value="value" /><property name="page_size" value="4k" />' in report


@pytest.mark.slow
def test_choosing(tmp_path: Path) -> None:
    folder = project(
        tmp_path,
        """
@pytest.mark.pagesize("16k", "64k")
@pytest.mark.parametrize("n", ["a-b", "16k"])
def test_1(where, n): assert n != "a-b" or where[0] != "64k"

@pytest.mark.pagesize("4k")
def test_2(where): pass
""",
    )
    run = Run(folder, "-x")
    assert run.words == {"test_1[a-b-16k]": "PASSED", "test_1[a-b-64k]": "FAILED"} and run.status == 1
    assert Run(folder, "--lf").words == {"test_1[a-b-64k]": "FAILED"}
    assert Run(folder, "tests/test_a.py::test_1[16k-16k]").words == {"test_1[16k-16k]": "PASSED"}
    run = Run(folder, "--guest-page-sizes", "64k", "-k", "16k or test_2")
    assert run.words == {"test_1[16k-64k]": "PASSED", "test_2": "SKIPPED"}
    assert "--guest-page-sizes 64k leaves none of its page sizes" in run.text
    run = Run(folder, "--guest-page-sizes", "none")
    assert run.words == {"test_1[a-b]": "PASSED", "test_1[16k]": "PASSED", "test_2": "PASSED"}
    assert run.booted == []
    run = Run(folder, "-s", "--colour", "green", "-k", "test_2")
    assert run.status == 0
    run = Run(folder, "--collect-only", "-q")
    assert "<Function test_1[a-b-16k]>" in run.text and run.booted == []


@pytest.mark.slow
def test_what_is_refused(tmp_path: Path) -> None:
    folder = project(tmp_path, "@pytest.mark.pagesize('8k')\ndef test_1(): pass\n")
    run = Run(folder)
    assert run.status == 2 and "pytest.mark.pagesize: page size '8k': arm64 has 4k, 16k and 64k" in run.text
    (folder / "tests" / "test_a.py").write_text("import pytest\n@pytest.mark.pagesize\ndef test_1(): pass\n")
    run = Run(folder, "--pdb")
    assert run.status == 4 and "--pdb does not reach into a guest" in run.text
    run = Run(folder, "--guest-page-sizes", "3k")
    assert run.status == 4 and "--guest-page-sizes: page size '3k': arm64 has" in run.text


@pytest.mark.slow
def test_a_guest_that_does_not_boot_is_an_error_of_each_test(tmp_path: Path) -> None:
    folder = project(tmp_path, "@pytest.mark.pagesize('4k', '16k')\n@pytest.mark.parametrize('n', [1, 2])\n"
                     "def test(n): pass\n")  # fmt: skip
    run = Run(folder, failing="16k")
    assert run.words == {
        "test[1-4k]": "PASSED",
        "test[1-16k]": "ERROR",
        "test[2-4k]": "PASSED",
        "test[2-16k]": "ERROR",
    }
    assert run.status == 1 and "guest 16k: no console output from 16k" in run.text
    assert run.booted == ["16k", "4k"]


def test_what_only_the_host_has(tmp_path: Path) -> None:
    folder = project(
        tmp_path,
        """
import json
@pytest.mark.pagesize("4k")
@pytest.mark.parametrize("n", [1, 2] if "UMM_GUEST_PAGE_SIZE" in os.environ else [1, 3])
def test(n): pass

@pytest.mark.pagesize("4k")
def test_plugin(only_here): pass
""",
    )
    outside = tmp_path / "plugins"
    outside.mkdir()
    (outside / "only_on_the_host.py").write_text("import pytest\n@pytest.fixture\ndef only_here(): pass\n")
    (folder / ".gitignore").write_text("plugins\n")
    subprocess.run(["git", "init", "-q", folder], check=True)
    run = Run(folder, "-p", "only_on_the_host", "-o", "pythonpath=plugins")
    assert run.words == {"test[1-4k]": "PASSED", "test[3-4k]": "ERROR", "test_plugin[4k]": "ERROR"}
    assert "does not collect this test" in run.text
    assert "fixture 'only_here' not found" in run.text
