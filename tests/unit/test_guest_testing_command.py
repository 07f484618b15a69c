"""``uspace-mm guest test``: what it makes of its arguments, and what it refuses before it builds anything."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from uspace_mm import cli
from uspace_mm.cli.guest_test import Command, _job, without_program
from uspace_mm.errors import InputError
from uspace_mm.guest.pagesize import PAGE_SIZES
from uspace_mm.guest.testing.guests import kernels_for
from uspace_mm.guest.testing.job import Job, join
from uspace_mm.guest.testing.machine import Place
from uspace_mm.guest.testing.project import load
from uspace_mm.guest.testing.times import parse_time

K4, K16, K64 = PAGE_SIZES


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["pytest", "-x", "tests"], ["-x", "tests"]),
        (["/usr/bin/py.test"], []),
        (["python3", "-m", "pytest", "-q"], ["-q"]),
        (["python", "-m", "unittest"], ["python", "-m", "unittest"]),
        (["-k", "pytest"], ["-k", "pytest"]),
        ([], []),
    ],
)
def test_the_programs_name_may_be_there(words: list[str], left: list[str]) -> None:
    assert without_program(words) == left


def test_paths_of_the_project_are_those_of_the_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path / "tests")
    parser = argparse.ArgumentParser()
    Command().prepare_parser(parser)
    args = parser.parse_args(["--", "pytest", f"{tmp_path}/tests/test_a.py::x", f"--out={tmp_path}/o", "-q"])
    job = _job(args, load(tmp_path))
    text = job.text(Place("/project", "/harness", "python3")).decode()
    assert '"/project/tests/test_a.py::x", "--out=/project/o", "-q"' in text
    assert '"/project", "/project/src"' in text
    assert job.cwd == "tests" and join("/project", job.cwd) == "/project/tests"
    assert (job.limits.total_s, job.limits.test_s) == (1800, 120)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--page-size", "8k"], "page size '8k'"),
        (["--project", "/no/such/folder"], "no such folder"),
        (["--timeout", "soon"], "--timeout soon: expected a time"),
        (["--test-timeout", "0"], "--test-timeout 0: expected a time"),
        (["--memory", "much"], "size 'much'"),
        (["--cpus", "0"], "--cpus 0"),
        (["--parallel", "-1"], "--parallel -1"),
        (["--junit", "/proc/no/such/file.xml"], "--junit /proc/no/such/file.xml"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["guest", "test", *arguments]) == 2
    captured = capsys.readouterr()
    assert says in captured.err and len(captured.err.splitlines()) == 1 and captured.out == ""


def test_a_project_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(300 << 20)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["guest", "test", "--memory", "512M"]) == 2
    assert "300.0 MiB in 1 files are too much for a guest of 512.0 MiB" in capsys.readouterr().err


def test_kernels_that_do_not_fit_the_page_sizes(tmp_path: Path) -> None:
    def image(name: str, code: int) -> str:
        header = bytearray(64)
        header[0x18] = code << 1
        header[0x38:0x3C] = b"ARM\x64"
        path = tmp_path / name
        path.write_bytes(bytes(header) + b"Linux version 6.12.0 (x) #1\0" + bytes(4096))
        return str(path)

    ours = image("16", K16.header_code)
    assert kernels_for([K16], [ours])[K16].page_size == K16
    with pytest.raises(InputError, match="its pages are 16k, and 4k, 64k was asked for"):
        kernels_for([K4, K64], [ours])
    with pytest.raises(InputError, match="has 16k pages already"):
        kernels_for([K16], [ours, image("other", K16.header_code)])
    for_all = kernels_for([K4, K64], [image("all", 0)])
    assert [kernel.page_size for kernel in for_all.values()] == [None, None]


def test_times() -> None:
    assert [parse_time("--x", text) for text in ("90", "1.5s", "5m", "1h")] == [90, 1.5, 300, 3600]


def test_the_rest_of_a_job_keeps_everything_else() -> None:
    job = Job(args=("-x",), cwd="tests", paths=("src",)).rest(("a", "b"), ("c.py",))
    assert (job.args, job.cwd, job.paths, job.only, job.ignore) == (
        ("-x",),
        "tests",
        ("src",),
        ("a", "b"),
        ("c.py",),
    )
