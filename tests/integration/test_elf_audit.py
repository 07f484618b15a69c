"""The command as a user runs it, and its reading of headers against ``readelf -lW`` of binutils."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.elfs import RW, RX, Ph, elf
from uspace_mm import cli
from uspace_mm.elf.image import ElfError, NotLoadableError, read_image
from uspace_mm.elf.source import DescriptorSource
from uspace_mm.errors import UnsupportedError
from uspace_mm.guest.pagesize import PAGE_SIZES

GOOD = elf((Ph(0, flags=RX), Ph(0x20000, 0x10000, flags=RW)))
BAD = elf((Ph(0, flags=RX), Ph(0x21000, 0x10000, flags=RW, align=0x1000)))


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "x-1-cp313-cp313-manylinux_2_28_aarch64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/good.so", GOOD)
        archive.writestr("x/bad\x1b[31m.so", BAD)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["elf", "audit", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_text(wheel: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("80", "50", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        status, out, err = run(capsys, wheel)
        assert (status, err) == (1, "")
        long = [line for line in out.splitlines() if len(line) > int(columns)]
        # A path has no place to break: it stands alone.
        assert all(line.strip().endswith(".so") for line in long)
        assert "\x1b" not in out
        assert "good.so" not in out
    assert "FAILS" in out
    assert "-Wl,-z,max-page-size=0x10000" in out
    assert "p_vaddr 0x21000" in out
    assert "good.so" in run(capsys, wheel, "--all")[1]


def test_exit_status_depends_on_the_page_sizes_asked_for(
    wheel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, wheel, "--page-size", "4k")[0] == 0
    assert run(capsys, wheel, "--page-size", "4k,16k")[0] == 1


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        ([tmp_path / "none"], "No such file"),
        ([tmp_path], "no ELF file for aarch64"),
        ([tmp_path, "--page-size", "8k"], "page size"),
        ([tmp_path, "--json", "--sarif", "-"], "only one"),
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 2
        assert expected in err
        assert err.count("\n") == 1
    (tmp_path / "x").write_bytes(elf((Ph(0),), machine=62))
    status, _, err = run(capsys, tmp_path)
    assert status == 2
    assert "x86_64" in err
    (tmp_path / "y").write_bytes(GOOD)
    status, _, err = run(capsys, tmp_path / "y", "--sarif", tmp_path / "no" / "x.sarif")
    assert status == 2
    assert "cannot write" in err


def test_json(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, wheel, "--json")
    told = json.loads(out)
    assert told["exit_status"] == status == 1
    assert told["summary"]["by_page_size"]["64k"]["fails"] == 1
    bad = next(file for file in told["files"] if "bad" in file["path"])
    finding = next(f for f in bad["verdicts"][2]["findings"] if f["rule"] == "congruence")
    assert finding["numbers"] == {
        "p_vaddr": 0x21000,
        "p_offset": 0x10000,
        "remainder": 0x1000,
        "page": 0x10000,
    }
    assert finding["segment"] == 1
    assert bad["verdicts"][2]["by_loader"] == {"glibc 2.35+": "fails", "glibc < 2.35": "fails"}


def test_sarif_has_the_structure_of_2_1_0(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.sarif"
    assert run(capsys, wheel, "--sarif", path)[0] == 1
    log = json.loads(path.read_text())
    assert set(log) == {"$schema", "version", "runs"}
    assert log["version"] == "2.1.0"
    (one,) = log["runs"]
    driver = one["tool"]["driver"]
    assert driver["name"] and driver["version"]
    ids = [rule["id"] for rule in driver["rules"]]
    assert len(set(ids)) == len(ids)
    assert all(rule["shortDescription"]["text"] for rule in driver["rules"])
    assert one["results"]
    for result in one["results"]:
        assert set(result) <= {"ruleId", "ruleIndex", "level", "message", "locations", "properties"}
        assert ids[result["ruleIndex"]] == result["ruleId"]
        assert result["level"] in ("none", "note", "warning", "error")
        assert result["message"]["text"]
        (location,) = result["locations"]
        uri = location["physicalLocation"]["artifactLocation"]["uri"]
        assert re.fullmatch(r"(file:///)?[A-Za-z0-9._~/%!$&'()*+,;=:@-]+", uri)
        assert location["logicalLocations"][0]["fullyQualifiedName"].startswith("x/bad")
    assert "error" in [result["level"] for result in one["results"]]


def test_junit(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, wheel, "--junit", "-")
    assert status == 1
    root = ElementTree.fromstring(out)
    suites = {str(suite.findall("properties/property")[0].get("value")): suite for suite in root}
    assert list(suites) == ["4k", "16k", "64k"]
    assert [(suite.get("tests"), suite.get("failures")) for suite in suites.values()] == [
        ("2", "0"),
        ("2", "1"),
        ("2", "1"),
    ]
    assert "congruence" in str(suites["64k"].findall("testcase/failure")[0].text)


def test_it_says_nothing_in_a_pipe_and_starts_without_heavy_imports(wheel: Path) -> None:
    code = (
        "import sys; from uspace_mm import cli; status = cli.main(sys.argv[1:]);"
        "assert not {'numpy', 'uspace_mm._native', 'rich'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "elf", "audit", str(wheel), "--page-size", "4k"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def elf_files() -> list[Path]:
    """A hundred files of this machine, and all of the cross compiler's libraries where it is installed."""
    found: list[Path] = []
    for folder in (sysconfig.get_config_var("LIBDIR") or "", "/usr/lib/x86_64-linux-gnu", "/usr/bin", "/bin"):
        found += [p for p in sorted(Path(folder).glob("*"))[:60] if p.is_file() and not p.is_symlink()]
    found += [p for p in Path("/usr/aarch64-linux-gnu/lib").glob("*.so*") if not p.is_symlink()]
    return [p for p in found if p.open("rb").read(4) == b"\x7fELF"]


def test_headers_as_readelf_reads_them() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("lacks: readelf (Debian: binutils)")
    files = elf_files()
    assert files
    line = re.compile(
        r"^  (LOAD|GNU_RELRO) +(0x\w+) (0x\w+) 0x\w+ (0x\w+) (0x\w+) ([RWE ]{3}) (0x\w+)$", re.MULTILINE
    )
    compared = 0
    for path in files:
        printed = subprocess.run([readelf, "-lW", path], capture_output=True, text=True, check=False).stdout
        with path.open("rb") as file:
            try:
                image = read_image(DescriptorSource(file.fileno()))
            except (ElfError, NotLoadableError):
                assert "LOAD" not in printed
                continue
        ours = [("LOAD", s) for s in image.loads] + ([("GNU_RELRO", image.relro)] if image.relro else [])
        told = sorted(
            (kind, s.offset, s.vaddr, s.filesz, s.memsz, s.rights.replace("X", "E"), s.align)
            for kind, s in ours
        )
        theirs = sorted(
            (m[1], *(int(m[i], 16) for i in range(2, 6)), m[6].replace(" ", ""), int(m[7], 16))
            for m in line.finditer(printed)
        )
        assert told == theirs, path
        interp = re.search(r"interpreter: (.*)\]", printed)
        assert image.interp == (interp[1] if interp else None)
        compared += 1
    assert compared >= len(files) // 2


def test_this_machines_own_files_load_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """The rules played on files that run here every day, with the page size that they run with."""
    page = os.sysconf("SC_PAGESIZE")
    size = next((s for s in PAGE_SIZES if s.bytes == page), None)
    if size is None:
        pytest.skip(f"lacks: a page size of arm64 (this machine has {page})")
    files = elf_files()
    _, out, _ = run(capsys, *files, "--machine", "any", "--page-size", size.name, "--json")
    bad = [f["path"] for f in json.loads(out)["files"] if f["verdicts"][0]["status"] != "loads"]
    assert not bad


def test_interrupting_a_long_audit_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    for index in range(2000):
        (tmp_path / f"{index}.so").write_bytes(BAD)
    process = subprocess.Popen(
        [sys.executable, "-m", "uspace_mm.cli", "elf", "audit", *[str(tmp_path)] * 50],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    descriptors = Path(f"/proc/{process.pid}/fd")
    own = str(tmp_path)
    while process.poll() is None and not any(own in _target(link) for link in descriptors.iterdir()):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, "uspace-mm elf: interrupted")


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def test_verdicts_are_printed_though_no_guest_runs(
    wheel: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UnsupportedError("lacks: qemu-system-aarch64")

    monkeypatch.setattr("uspace_mm.elf.prove.prove", refuse)
    status, out, err = run(capsys, wheel, "--prove")
    assert (status, err.count("\n")) == (3, 1)
    assert "lacks: qemu" in err
    assert "FAILS" in out


def test_an_image_laid_out_as_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blobs = tmp_path / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    (tmp_path / "oci-layout").write_text("{}")
    (tmp_path / "index.json").write_text("{}")
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w:gz") as archive:
        info = tarfile.TarInfo("usr/lib/bad.so")
        info.size = len(BAD)
        archive.addfile(info, io.BytesIO(BAD))
    (blobs / ("0" * 64)).write_bytes(layer.getvalue())
    status, out, _ = run(capsys, tmp_path, "--json")
    assert status == 1
    assert [file["path"].rpartition("!")[2] for file in json.loads(out)["files"]] == ["usr/lib/bad.so"]


def test_virtual_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "lib" / "python3.13" / "site-packages" / "x"
    site.mkdir(parents=True)
    (tmp_path / "lib64").symlink_to("lib")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (site / "bad.so").write_bytes(BAD)
    status, out, _ = run(capsys, tmp_path, "--json")
    assert status == 1
    assert [file["path"] for file in json.loads(out)["files"]] == [str(site / "bad.so")]


def test_output_in_an_encoding_that_lacks_the_letters(tmp_path: Path) -> None:
    (tmp_path / "\u732b.so").write_bytes(BAD)
    done = subprocess.run(
        [sys.executable, "-m", "uspace_mm.cli", "elf", "audit", str(tmp_path)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (1, b"")
    assert b"\\u732b.so" in done.stdout
