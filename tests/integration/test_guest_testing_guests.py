"""The harness with real guests: one run of `guest test` on three page sizes, one of the plugin."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from uspace_mm.errors import UnsupportedError
from uspace_mm.guest.kernel import find
from uspace_mm.guest.pagesize import parse_page_size

ROOT = Path(__file__).resolve().parents[2]
SIZES = ("4k", "16k", "64k")
LIMIT_S = 400
REBOOT_POWER_OFF = 0x4321FEDC

TESTS = f"""
import ctypes, os, signal, time
import numpy as np
import pytest

SIZE = os.environ["UMM_GUEST_PAGE_SIZE"]

def test_pages():
    assert os.sysconf("SC_PAGE_SIZE") == {{"4k": 4096, "16k": 16384, "64k": 65536}}[SIZE]

def test_assumes_4k():
    size = os.sysconf("SC_PAGE_SIZE")
    assert size == 4096

def test_numpy(): assert np.arange(1000).sum() == 499500

def test_crash(): ctypes.string_at(0)

@pytest.mark.skipif(SIZE != "64k", reason="the other sizes live on")
def test_power_off(): ctypes.CDLL(None).reboot({REBOOT_POWER_OFF})

@pytest.mark.skipif(SIZE != "16k", reason="the other sizes run on")
def test_stop(): os.kill(os.getpid(), signal.SIGSTOP)

def test_flood(): print("x" * 3_000_000)

def test_last(): assert os.getcwd() == "/project/tests"
"""


def need_guests(*sizes: str) -> None:
    """Skip where guests of these sizes cannot run; kernels are not built by a test."""
    for tool, package in (("qemu-system-aarch64", "qemu-system-arm"), ("mksquashfs", "squashfs-tools")):
        if shutil.which(tool) is None:
            pytest.skip(f"lacks: {tool} (Debian: {package})")
    for size in map(parse_page_size, sizes):
        try:
            find(size, build=False)
        except UnsupportedError:
            pytest.skip(f"lacks: a kernel (uspace-mm guest kernel build --page-size {size})")


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], ElementTree.Element, int]:
    """The JSON, the JUnit file and the exit status of one run on all page sizes."""
    need_guests(*SIZES)
    folder = tmp_path_factory.mktemp("suite")
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_a.py").write_text(TESTS)
    options = (
        "--json",
        "--junit",
        str(folder / "out" / "j.xml"),
        "--memory",
        "512M",
        "--test-timeout",
        "12s",
    )
    done = run(folder / "tests", "uspace_mm.cli", "guest", "test", *options, "--", "pytest", "-v")
    assert done.stdout, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout), ElementTree.parse(folder / "out" / "j.xml").getroot(), done.returncode


@pytest.mark.slow
def test_each_page_size_has_its_results(
    three: tuple[dict[str, Any], ElementTree.Element, int],
) -> None:
    report, _, status = three
    assert status == report["exit_status"] == 1
    for size, entry in zip(SIZES, report["page_sizes"], strict=True):
        assert entry["page_size"] == size and entry["versions"]["machine"] == "aarch64"
        assert entry["problems"] == [] and entry["not_run"] == []
        found = {test["id"].partition("::")[2]: test["status"] for test in entry["tests"]}
        assert found == {
            "test_pages": "passed",
            "test_assumes_4k": "passed" if size == "4k" else "failed",
            "test_numpy": "passed",
            "test_crash": "failed",
            "test_power_off": "failed" if size == "64k" else "skipped",
            "test_stop": "failed" if size == "16k" else "skipped",
            "test_flood": "passed",
            "test_last": "passed",
        }
        assert entry["boots"] == (1 if size == "4k" else 2)


@pytest.mark.slow
def test_what_took_the_interpreter_or_the_guest_is_named(
    three: tuple[dict[str, Any], ElementTree.Element, int],
) -> None:
    reasons = {
        (entry["page_size"], test["id"].partition("::")[2]): test["reason"]
        for entry in three[0]["page_sizes"]
        for test in entry["tests"]
    }
    assert reasons["4k", "test_crash"] == "the interpreter was killed by SIGSEGV"
    assert "powered off" in reasons["64k", "test_power_off"]
    assert "took more than 12 s; the guest answers, its Python does not" in reasons["16k", "test_stop"]
    assert "assert 65536 == 4096" in reasons["64k", "test_assumes_4k"]


@pytest.mark.slow
def test_only_the_rows_that_differ_are_in_the_matrix(
    three: tuple[dict[str, Any], ElementTree.Element, int],
) -> None:
    report, junit, _ = three
    assert [row["id"].partition("::")[2] for row in report["differ"]] == [
        "test_assumes_4k",
        "test_power_off",
        "test_stop",
    ]
    assert report["differ"][0]["status"] == {"4k": "passed", "16k": "failed", "64k": "failed"}
    assert [suite.get("name") for suite in junit] == [f"guest {size}" for size in SIZES]
    assert {suite.get("tests") for suite in junit} == {"8"}


@pytest.mark.slow
def test_marked_tests_of_an_ordinary_run(tmp_path: Path) -> None:
    need_guests("16k", "64k")
    (tmp_path / "pytest.ini").write_text("[pytest]\nguest_memory = 512M\n")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "helper.py").write_text("import os\ndef pages(): return os.sysconf('SC_PAGE_SIZE')\n")
    (tmp_path / "test_a.py").write_text(
        "import sys\nimport pytest\n"
        "@pytest.mark.pagesize('16k', '64k')\n"
        "def test_pages():\n"
        "    from helper import pages\n"
        "    print('said', sys.platform)\n"
        "    assert pages() == 16384, 'not 16k'\n"
        "def test_local(): assert 'helper' not in sys.modules\n"
    )
    options = ("-p", "uspace_mm.guest.testing.plugin", "-p", "no:cacheprovider", "-v")
    done = run(tmp_path, "pytest", *options)
    assert "test_a.py::test_pages[16k] PASSED" in done.stdout, done.stdout + done.stderr
    assert "test_a.py::test_pages[64k] FAILED" in done.stdout
    assert "test_a.py::test_local PASSED" in done.stdout
    assert "AssertionError: not 16k" in done.stdout and "assert 65536 == 16384" in done.stdout
    assert "said linux" in done.stdout
    assert done.returncode == 1
