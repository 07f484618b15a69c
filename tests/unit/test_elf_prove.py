"""Evidence from guests beside verdicts: when it may change one, and in which direction."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from tests.elfs import RW, RX, Ph, elf
from uspace_mm.elf.audit import audit
from uspace_mm.elf.image import read_image
from uspace_mm.elf.prove import jobs, prove
from uspace_mm.elf.prove.judging import judge
from uspace_mm.elf.prove.observation import Observation, parse
from uspace_mm.elf.prove.staging import StagingError, stage
from uspace_mm.elf.records import Loader, Status, Verdict
from uspace_mm.elf.render import json as json_form
from uspace_mm.elf.render import sarif, text
from uspace_mm.elf.source import BytesSource
from uspace_mm.elf.verdict import judge as predict
from uspace_mm.guest.boot import Guest
from uspace_mm.guest.pagesize import PAGE_SIZES, PageSize, parse_page_size

K4, _, K64 = PAGE_SIZES
CLEAN = Observation(65536, True, frozenset(), "exited", 0, "")
REFUSED = Observation(65536, False, frozenset(), "exited", 3, "not page-aligned")
KILLED = Observation(65536, False, frozenset(), "killed", 11, "")
DIFFERS = replace(CLEAN, differences=frozenset({"lacks 10000 84 5 6"}))
ABORTED = replace(CLEAN, end="killed", code=6, output="<jemalloc>: Unsupported system page size")
GOOD = elf((Ph(0, flags=RX), Ph(0x20000, 0x10000, flags=RW)))
BAD = elf((Ph(0, flags=RX), Ph(0x21000, 0x10000, flags=RW, align=0x1000)))


def predicted(status: Status, *others: tuple[Loader, Status]) -> Verdict:
    return Verdict(K64, status, ((Loader.GLIBC, status), *others), ())


@pytest.mark.parametrize(
    ("before", "seen", "after"),
    [
        (Status.UNKNOWN, CLEAN, Status.LOADS),
        (Status.WRONG, CLEAN, Status.LOADS),
        (Status.LOADS, CLEAN, Status.LOADS),
        (Status.UNKNOWN, REFUSED, Status.FAILS),
        (Status.LOADS, REFUSED, Status.FAILS),
        (Status.LOADS, KILLED, Status.FAILS),
        (Status.UNKNOWN, DIFFERS, Status.WRONG),
        (Status.LOADS, DIFFERS, Status.WRONG),
        (Status.UNKNOWN, ABORTED, Status.FAILS),
        (Status.FAILS, REFUSED, Status.FAILS),
        (Status.LOADS, replace(CLEAN, code=1), Status.WRONG),  # an import failed that works with 4k pages
        (Status.UNKNOWN, replace(CLEAN, end="lost"), Status.UNKNOWN),
    ],
)
def test_what_was_seen_decides(before: Status, seen: Observation, after: Status) -> None:
    verdict = judge(predicted(before), Loader.GLIBC, seen, CLEAN)
    assert (verdict.status, verdict.predicted) == (after, before)
    assert verdict.evidence is not None
    assert verdict.evidence.ok is (None if seen.end == "lost" else not after.failing)


@pytest.mark.parametrize(
    "control", [REFUSED, KILLED, replace(CLEAN, compared=False, end="unstarted", code=2)]
)
@pytest.mark.parametrize("seen", [REFUSED, KILLED, CLEAN])
def test_what_does_not_load_with_4k_pages_says_nothing(seen: Observation, control: Observation) -> None:
    for before in Status:
        verdict = judge(predicted(before), Loader.GLIBC, seen, control)
        assert verdict.status is before
        assert verdict.evidence is not None
        assert verdict.evidence.ok is None
        assert "4k" in verdict.evidence.text


def test_the_control_itself_can_get_worse_only_by_comparison() -> None:
    verdict = Verdict(K4, Status.LOADS, ((Loader.GLIBC, Status.LOADS),), ())
    assert judge(verdict, Loader.GLIBC, REFUSED, None).status is Status.LOADS
    assert judge(verdict, Loader.GLIBC, DIFFERS, None).status is Status.WRONG


def test_a_loader_that_was_not_watched_keeps_its_verdict() -> None:
    verdict = judge(predicted(Status.WRONG, (Loader.MUSL, Status.WRONG)), Loader.GLIBC, CLEAN, CLEAN)
    assert dict(verdict.by_loader) == {Loader.GLIBC: Status.LOADS, Loader.MUSL: Status.WRONG}
    assert verdict.status is Status.WRONG
    older = predicted(Status.LOADS, (Loader.GLIBC_OLD, Status.FAILS))
    assert judge(older, Loader.GLIBC, CLEAN, CLEAN).status is Status.NEWER_GLIBC


def test_what_a_program_writes_itself_is_no_difference() -> None:
    own = replace(CLEAN, differences=frozenset({"bytes 30000 8"}))
    assert judge(predicted(Status.UNKNOWN), Loader.GLIBC, own, own).status is Status.LOADS
    more = replace(own, differences=own.differences | {"bytes 40000 8"})
    assert judge(predicted(Status.UNKNOWN), Loader.GLIBC, more, own).status is Status.WRONG


def test_a_program_that_ends_badly_by_itself_is_no_difference() -> None:
    crash = replace(CLEAN, end="killed", code=11)
    assert judge(predicted(Status.UNKNOWN), Loader.KERNEL, crash, crash).status is not Status.FAILS


def test_the_lines_of_the_probe() -> None:
    text = """job a
page 65536
lacks 20000 4000 6 4
extra 0 1000 4 6
compared 0
output some words
exited 0
end
job b
page 65536
compared 2
killed 11
end
job c
page 65536
timeout
end
job d
unstarted 2
end
job e
page 65536"""
    seen = parse(text.splitlines())
    assert seen["a"] == Observation(
        65536, True, frozenset({"lacks 20000 4000 6 4"}), "exited", 0, "some words"
    )
    assert (seen["b"].compared, seen["b"].end, seen["b"].code) == (False, "killed", 11)
    assert (seen["c"].end, seen["d"].end, seen["d"].code, seen["e"].end) == (
        "timeout",
        "unstarted",
        2,
        "lost",
    )
    assert str(seen["b"]) == "killed by SIGSEGV"


def test_a_wheel_is_laid_out_whole_and_imported(tmp_path: Path) -> None:
    path = tmp_path / "x-1-cp313-cp313-manylinux_2_28_aarch64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/__init__.py", "")
        archive.writestr("x/a.cpython-313-aarch64-linux-gnu.so", BAD)
        archive.writestr("x.libs/b.so", BAD)
        archive.writestr("../../escape.so", BAD)
    report = audit([path], PAGE_SIZES)
    staged = stage(str(path), report.files, report.files, tmp_path / "to")
    assert {str(inside) for inside in staged.files()} >= {"x/__init__.py", "x.libs/b.so", "escape.so"}
    assert not (tmp_path.parent / "escape.so").exists()
    made = [jobs.make(index, file, staged, "/f/0") for index, file in enumerate(report.files)]
    lines = [job.line.split("\t") for found in made for job in found]
    assert len(lines) == 3
    assert all(line[-1] == "x" for line in lines[:2])
    assert "PYTHONPATH=/f/0" in lines[0]


def test_a_library_is_laid_out_with_what_it_needs(tmp_path: Path) -> None:
    folder = tmp_path / "lib"
    folder.mkdir()
    (folder / "a.so").write_bytes(elf((Ph(0, flags=RX),), needed=("libb.so.1", "libc.so.6")))
    (folder / "libb.so.1.2").write_bytes(elf((Ph(0, flags=RX),), soname="libb.so.1", needed=("libc.so",)))
    (folder / "libc.so.6").write_bytes(elf((Ph(0, flags=RX),), soname="libc.so.6", needed=()))
    report = audit([folder], PAGE_SIZES)
    name = str(folder / "a.so")
    own = [file for file in report.files if file.name == name]
    staged = stage(name, own, report.files, tmp_path / "to")
    assert {str(inside) for inside in staged.files()} == {"a.so", "libb.so.1"}


def test_too_much_to_load_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uspace_mm.elf.prove.staging.LIMIT_BYTES", 1000)
    path = tmp_path / "a.so"
    path.write_bytes(GOOD)
    report = audit([path], PAGE_SIZES)
    with pytest.raises(StagingError):
        stage(str(path), report.files, report.files, tmp_path / "to")


def test_executables_and_musl_files_get_their_own_jobs(tmp_path: Path) -> None:
    def line(data: bytes) -> list[str]:
        path = tmp_path / "f"
        path.write_bytes(data)
        report = audit([path], PAGE_SIZES)
        (job,) = jobs.make(
            0, report.files[0], stage(str(path), report.files, report.files, tmp_path / "to"), "/f/0"
        )
        return job.line.split("\t")

    executable = line(elf((Ph(0, flags=RX),), interp="/lib/ld-linux-aarch64.so.1"))
    assert executable[1] == "executable"
    assert executable[-2:] == ["/f/0/f", "--version"]
    musl = line(elf((Ph(0, flags=RX),), needed=("libc.musl-aarch64.so.1",)))
    assert musl[-2:] == ["/umm-elf/opener-musl", "/f/0/f"]


def test_prediction_of_the_seeds() -> None:
    assert predict(read_image(BytesSource(BAD)), parse_page_size("64k")).status is Status.FAILS


class FakeGuest:
    """Takes files, and prints what a probe would, until a file takes it down."""

    def __init__(self, fatal: str) -> None:
        self.fatal = fatal
        self.files: dict[str, bytes] = {}

    def __enter__(self) -> FakeGuest:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.clear()

    def put(self, path: str, content: bytes | Path, mode: int = 0o644) -> None:
        self.files[path] = content.read_bytes() if isinstance(content, Path) else content

    def run(self, command: list[str], *, on_stdout: Callable[[bytes], object], timeout_s: float) -> None:
        assert timeout_s > 60
        for line in self.files[command[1]].decode().splitlines():
            name, _, _, file, *_ = line.split("\t")
            assert file in self.files
            on_stdout(f"job {name}\npage 65536\n".encode())
            if file.endswith(self.fatal):
                return
            on_stdout(b"compared 0\nexited 0\nend\n")


def test_a_file_that_takes_the_guest_down_does_not_keep_others_from_being_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "lib"
    folder.mkdir()
    data = elf((Ph(0, flags=RX),), text=b"<jemalloc>: Unsupported system page size")
    for name in ("a.so", "b.so", "c.so"):
        (folder / name).write_bytes(data)
    tool = tmp_path / "tool"
    tool.write_bytes(b"")
    monkeypatch.setattr("uspace_mm.elf.prove.tools.obtain", lambda progress: {"probe": tool})
    booted: list[PageSize] = []

    def booter(size: PageSize, machine: object, progress: object) -> Guest:
        booted.append(size)
        return cast("Guest", FakeGuest("b.so" if size is K64 else "none"))

    report = audit([folder], (K4, K64))
    prove(report, booter=booter)
    assert booted == [K4, K64, K64]
    assert [file.verdicts[1].status for file in report.files] == [Status.LOADS, Status.UNKNOWN, Status.LOADS]
    lost = report.files[1].verdicts[1].evidence
    assert lost is not None
    assert lost.ok is None
    shown = text.render(report)
    assert "c.so" in shown  # proved to load: that is news
    assert "guest ended" in shown
    assert json_form.render(report)["files"][1]["verdicts"][1]["evidence"]["ok"] is None
    assert "guest" not in {result["ruleId"] for result in sarif.render(report)["runs"][0]["results"]}
