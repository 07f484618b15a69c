"""Probes and `uspace-mm doctor`, as root and as a user without rights, and behind a seccomp filter."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.integration.kernel.huge import settings_lock
from uspace_mm.cli import main
from uspace_mm.kernel import proc
from uspace_mm.kernel.features import feature_names, pager_verdict, probe_all
from uspace_mm.kernel.transparent_hugepage import ROOT, TransparentHugepage
from uspace_mm.kernel.userfaultfd import Feature, Source, UserfaultfdBuilder, probe_features

NOBODY = 65534
CAP_SETGID, CAP_SETUID = 6, 7
UNPRIVILEGED = Path("/proc/sys/vm/unprivileged_userfaultfd")
DEVICE = Path("/dev/userfaultfd")


# Everything is imported while this is still root: the interpreter may live where nobody may read.
AS_NOBODY = """
import ctypes, errno, json, os, struct, sys, platform
import uspace_mm.cli
from uspace_mm.errors import UspaceError
from uspace_mm.kernel import features, prctl
from uspace_mm.kernel.mapping import Mapping
from uspace_mm.kernel.pagemap import Pagemap
from uspace_mm.kernel.proc import page_size
from uspace_mm.kernel.userfaultfd import *
uspace_mm.cli._build_parser()

def hide_userfaultfd(error):
    "A seccomp filter like a container's: the system call answers `error`."
    numbers = {"x86_64": 323, "aarch64": 282}
    class Filter(ctypes.Structure):
        _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte),
                    ("k", ctypes.c_uint)]
    class Program(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(Filter))]
    code = (Filter * 4)(
        (0x20, 0, 0, 0),                               # load the number of the call
        (0x15, 0, 1, numbers[platform.machine()]),     # is it userfaultfd?
        (0x06, 0, 0, 0x00050000 | error),              # then fail with errno
        (0x06, 0, 0, 0x7FFF0000),                      # else allow
    )
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(Program(4, code)), 0, 0) == 0, os.strerror(ctypes.get_errno())

def drop(uid):
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    prctl.set_dumpable(True)
"""


def run(script: str, *, as_nobody: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `script` in a process of its own, by default without any right."""
    status = Path("/proc/self/status").read_text()
    effective = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff")), 16)
    if not effective >> CAP_SETUID & effective >> CAP_SETGID & 1:
        pytest.skip("lacks: CAP_SETUID and CAP_SETGID, to become another user")
    head = AS_NOBODY + (f"drop({NOBODY})\n" if as_nobody else "")
    return subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def needs_default_rights() -> None:
    if UNPRIVILEGED.read_text().strip() != "0":
        pytest.skip("lacks: vm.unprivileged_userfaultfd=0")
    if DEVICE.exists() and DEVICE.stat().st_mode & 0o006:
        pytest.skip("lacks: a /dev/userfaultfd that is not everybody's")


def needs_seccomp() -> None:
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("lacks: the number of the system call on this architecture")


# As the present user


def test_every_row_is_complete_and_unique() -> None:
    probes = probe_all()
    assert [probe.name for probe in probes] == feature_names()
    assert len(set(feature_names())) == len(probes)
    for probe in probes:
        for text in (probe.name, probe.how, probe.used_for, probe.instead):
            assert text and "\n" not in text


def test_each_bit_of_the_kernel_has_a_row_that_agrees() -> None:
    available = probe_features()
    present = {probe.name: probe.present for probe in probe_all()}
    no_hugetlb = not proc.hugetlb_pools()
    for bit in Feature:
        if no_hugetlb and bit in (Feature.MISSING_HUGETLBFS, Feature.MINOR_HUGETLBFS):
            continue
        assert bit.name in present, f"no row for {bit!r}"
        assert present[bit.name] == (bit in available), bit


def test_probing_changes_no_settings() -> None:
    if not ROOT.is_dir():
        pytest.skip("lacks: transparent huge pages")
    with settings_lock():
        settings = TransparentHugepage().settings()
        probe_all()
        assert TransparentHugepage().settings() == settings


def test_probing_leaves_nothing() -> None:
    probe_all()
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), len(proc.smaps()), len(os.listdir("/proc/self/task"))
    for _ in range(5):
        probe_all()
        pager_verdict()
    after = len(os.listdir("/proc/self/fd")), len(proc.smaps()), len(os.listdir("/proc/self/task"))
    assert (after[0], after[2]) == (before[0], before[2])
    assert abs(after[1] - before[1]) < 10


def test_a_part_of_the_rows_can_be_asked_for() -> None:
    assert [probe.name for probe in probe_all(["MOVE", "pagemap"])] == ["MOVE", "pagemap"]


def test_move_in_batches_is_measured_where_there_is_move() -> None:
    row = next(iter(probe_all(["MOVE in batches"])))
    if Feature.MOVE in probe_features():
        assert "ns per page in 64s" in row.how
    else:
        assert not row.present


def test_doctor_prints_one_line_per_feature_when_piped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    for name, line in zip(feature_names(), lines[1:], strict=False):
        assert line.startswith(name + " ")
        assert line[len(name) :].split()[0] in ("yes", "no")
    assert "\x1b" not in captured.out
    assert lines[-1].startswith("the pager works here")


def test_doctor_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pager"]["works"] is True
    assert report["machine"]["page_size"] == proc.page_size()
    assert [row["name"] for row in report["features"]] == feature_names()
    assert all(set(row) == {"name", "present", "how", "used_for", "instead"} for row in report["features"])


@pytest.mark.parametrize("columns", [80, 200])
def test_doctor_fits_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    environment = dict(os.environ, COLUMNS=str(columns), TERM="dumb")
    with subprocess.Popen(
        [sys.executable, "-m", "uspace_mm.cli", "doctor"], stdout=slave, env=environment
    ) as process:
        os.close(slave)
        output = b""
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # EIO: the other end was closed
                break
            output += chunk
        os.close(master)
    assert process.returncode == 0
    lines = output.decode().replace("\r", "").splitlines()
    assert max(map(len, lines)) <= columns
    text = "\n".join(lines)
    for name in feature_names():
        assert name in text, "a name is never broken"
    assert "the pager works here" in text


# As nobody


def test_nobody_gets_user_mode_only_and_is_told_how_to_get_more() -> None:
    needs_default_rights()
    done = run("""
        verdict = features.pager_verdict()
        print(json.dumps([verdict.works, verdict.source.name, verdict.remedy]))
        for source in (Source.SYSCALL, Source.DEVICE):
            try:
                UserfaultfdBuilder(source).open().close()
            except UserfaultfdUnavailable as error:
                print(json.dumps([error.errno, str(error)]))
        with Mapping(2 * page_size()) as memory, UserfaultfdBuilder().open() as uffd:
            uffd.register(memory.address, memory.length, RegisterMode.MISSING)
            uffd.copy(memory.address, b"\\x42" * page_size()).require()
            print(json.dumps([uffd.source.name, int(memory.array[0])]))
            try:
                os.write(1, (ctypes.c_char * 1).from_address(memory.address + page_size()))
            except OSError as error:
                print(json.dumps(errno.errorcode[error.errno]))
    """)
    assert done.returncode == 0, done.stderr
    verdict, syscall, device, works, touched = map(json.loads, done.stdout.splitlines())
    assert verdict[:2] == [True, "USER_MODE"]
    for word in ("EFAULT", "vm.unprivileged_userfaultfd=1", "/dev/userfaultfd", "CAP_SYS_PTRACE"):
        assert word in verdict[2]
    for _, message in (syscall, device):
        assert "vm.unprivileged_userfaultfd=1" in message and "CAP_SYS_PTRACE" in message
    assert works == ["USER_MODE", 0x42]
    assert touched == "EFAULT"


def test_doctor_as_nobody_exits_0_and_shows_what_lacks() -> None:
    needs_default_rights()
    done = run("""
        sys.exit(uspace_mm.cli.main(["doctor", "--json"]))
    """)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["machine"]["uid"] == NOBODY
    assert report["pager"]["source"] == "user_mode"
    rows = {row["name"]: row for row in report["features"]}
    assert rows["user mode only"]["present"]
    assert not rows["userfaultfd(2)"]["present"]
    assert "EPERM" in rows["userfaultfd(2)"]["how"]
    assert "EACCES" in rows["/dev/userfaultfd"]["how"]
    assert not rows["EVENT_FORK"]["present"]
    assert "CAP_SYS_PTRACE" in rows["EVENT_FORK"]["how"]
    assert not rows["frame numbers"]["present"]
    assert not rows["huge page settings"]["present"]
    assert rows["pager basics"]["present"]
    no_right_needed = ("MOVE", "WP_ASYNC", "POISON", "pagemap", "PAGEMAP_SCAN", "MADV_COLLAPSE")
    for probe in probe_all(no_right_needed):
        assert rows[probe.name]["present"] == probe.present, rows[probe.name]


def test_nobody_is_refused_by_name_elsewhere() -> None:
    done = run("""
        from uspace_mm.kernel import proc, process
        from uspace_mm.kernel.madvise import Advice
        from uspace_mm.kernel.transparent_hugepage import ROOT, TransparentHugepage
        import numpy as np
        from uspace_mm.kernel.pagemap import page_flags
        parent = os.getppid()
        attempts = [
            lambda: Pagemap(parent),
            lambda: proc.smaps(parent),
            lambda: process.process_read(parent, page_size(), bytearray(8)),
            lambda: process.pidfd_getfd(process.pidfd_open(parent), 0),
            lambda: process.process_madvise(process.pidfd_open(parent), [(page_size(), page_size())],
                                            Advice.COLD),
            lambda: TransparentHugepage().enabled.write("never"),
            lambda: page_flags(np.ones(1, np.uint64)),
        ]
        for attempt in attempts:
            try:
                attempt()
                print("no error")
            except UspaceError as error:
                print(type(error).__name__, error)
    """)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    for line in lines:
        assert line.startswith("KernelError ")
        assert "[EACCES]" in line or "[EPERM]" in line
        assert "; " in line, "the remedy follows the errno"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("EPERM", ("seccomp", "vm.unprivileged_userfaultfd", "CAP_SYS_PTRACE", "/dev/userfaultfd")),
        ("ENOSYS", ("CONFIG_USERFAULTFD", "seccomp")),
    ],
)
def test_doctor_exits_3_with_the_remedy_when_nothing_opens(error: str, words: tuple[str, ...]) -> None:
    needs_default_rights()
    needs_seccomp()
    done = run(f"""
        hide_userfaultfd(errno.{error})
        sys.exit(uspace_mm.cli.main(["doctor", "--json"]))
    """)
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("uspace-mm doctor: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    report = json.loads(done.stdout)
    assert report["pager"] == {
        "works": False,
        "source": None,
        "remedy": done.stderr.removeprefix("uspace-mm doctor: ").rstrip("\n"),
    }
    rows = {row["name"]: row for row in report["features"]}
    assert not any(rows[bit.name]["present"] for bit in Feature if bit.name)
    assert rows["pagemap"]["present"]


def test_the_device_works_where_the_system_call_is_filtered() -> None:
    needs_seccomp()
    if not DEVICE.exists():
        pytest.skip("lacks: /dev/userfaultfd")
    done = run(
        """
        hide_userfaultfd(errno.EPERM)
        with UserfaultfdBuilder().open() as uffd:
            print(uffd.source.name)
        print(features.pager_verdict().source.name)
        sys.exit(uspace_mm.cli.main(["doctor"]))
    """,
        as_nobody=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["DEVICE", "DEVICE"]


def test_the_verdict_names_the_source_that_the_pager_would_get() -> None:
    verdict = pager_verdict()
    assert verdict.works
    with UserfaultfdBuilder().open() as uffd:
        assert uffd.source is verdict.source
    assert bool(verdict.remedy) == (verdict.source is Source.USER_MODE)
