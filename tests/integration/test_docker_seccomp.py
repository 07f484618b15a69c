"""docker/seccomp.json against the system calls that the package makes, and against those it must refuse.

Commands run with the profile loaded; a call that it does not name kills them, so that no fallback hides one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.confinement import library, rules, without
from uspace_mm.guest import kernel, rootfs

ROOT = Path(__file__).resolve().parents[2]
PROFILE = ROOT / "docker" / "seccomp.json"
UMM = [sys.executable, "-c", "import sys; from uspace_mm.cli import main; sys.exit(main())"]
# What the engines' own profiles refuse (some of them: without CAP_SYS_PTRACE), and ours is there for.
OURS = {"pidfd_getfd", "process_madvise", "process_vm_readv", "process_vm_writev", "userfaultfd"}
# Allowed by the engines today, and younger than the profile that Debian 12 brings.
YOUNGER = {
    *("cachestat", "fchmodat2", "futex_requeue", "futex_wait", "futex_waitv", "futex_wake", "io_pgetevents"),
    *("map_shadow_stack", "mseal", "vmsplice"),
    *("getxattrat", "listxattrat", "removexattrat", "setxattrat"),
}
ENGINES_OWN = Path("/usr/share/containers/seccomp.json")


@pytest.fixture(autouse=True)
def libseccomp() -> None:
    try:
        library()
    except OSError:
        pytest.skip("lacks: libseccomp.so.2 (Debian: libseccomp2)")


def read(path: Path = PROFILE) -> dict[str, Any]:
    profile: dict[str, Any] = json.loads(path.read_text())
    return profile


def confined(*command: str, options: tuple[str, ...] = ("--strict",)) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / "confinement.py"), *options, str(PROFILE), *command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )


def features(*options: str) -> set[str]:
    """Names of the features that doctor finds under the profile."""
    done = confined(*UMM, "doctor", "--json", options=options)
    assert done.returncode in (0, 3), done.stderr
    return {feature["name"] for feature in json.loads(done.stdout)["features"] if feature["present"]}


def test_doctor_finds_under_the_profile_what_it_finds_without_it() -> None:
    free = subprocess.run([*UMM, "doctor", "--json"], capture_output=True, text=True, timeout=100)
    found = {feature["name"] for feature in json.loads(free.stdout)["features"] if feature["present"]}
    # Measured, and the measure varies with what else the machine does.
    # io_uring is refused: it would make system calls that the profile never sees.
    aside = {"MOVE in batches", "io_uring fixed buffers"}
    assert features("--strict") - aside == found - aside


@pytest.mark.parametrize(
    ("call", "feature"),
    [
        ("userfaultfd", "user mode only"),
        ("process_madvise", "process_madvise"),
        ("process_vm_readv", "process_vm_readv"),
        ("pidfd_getfd", "pidfd_getfd"),
    ],
)
def test_each_call_that_we_added_is_needed(call: str, feature: str) -> None:
    assert feature in features()
    assert feature not in features("--without", call)


def test_the_demonstrations_run_and_make_no_other_call(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 20))
    done = confined(*UMM, "demo", "pager", str(file), "--json")
    assert done.returncode == 0, done.stderr
    done = confined(*UMM, "demo", "postcopy", "--size", "16M", "--steps", "2", "--json")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_guest_runs_and_makes_no_other_call() -> None:
    if not shutil.which("qemu-system-aarch64"):
        pytest.skip("lacks: qemu-system-aarch64 (Debian: qemu-system-arm)")
    fitting = [built for built in kernel.cached() if built.current]
    if not fitting:
        pytest.skip("lacks: a kernel for guests (uspace-mm guest kernel build --page-size 16k)")
    size = fitting[-1].kernel.page_size
    assert size is not None
    rootfs.obtain()
    command = ["guest", "run", "--page-size", str(size), "--", "sh", "-c", "getconf PAGESIZE; exit 7"]
    done = confined(*UMM, *command)
    assert (done.returncode, done.stdout) == (7, f"{size.bytes}\n"), done.stderr


def test_an_audit_makes_no_other_call() -> None:
    done = confined(*UMM, "elf", "audit", "--json", "--machine", "any", sys.executable)
    assert done.returncode in (0, 1), done.stderr
    assert json.loads(done.stdout)


@pytest.mark.slow
def test_the_tests_of_the_kernel_interfaces_and_the_pager_pass_and_make_no_other_call(tmp_path: Path) -> None:
    suites = ["kernel", "test_pager_fork.py", "test_pager_syscalls.py", "test_stores_function.py"]
    done = confined(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"),
        f"--basetemp={tmp_path / 't'}",
        *(f"tests/integration/{suite}" for suite in suites),
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


REFUSED = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
answer = libc.syscall(*map(int, sys.argv[1:]))
print(0 if answer >= 0 else ctypes.get_errno())
"""


def errno_of(name: str, *arguments: int) -> int:
    """What a call answers under the profile, 0 when it is allowed."""
    number = library().seccomp_syscall_resolve_name(name.encode())
    done = confined(sys.executable, "-c", REFUSED, str(number), *map(str, arguments), options=())
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(
    "call",
    ["mount", "umount2", "unshare", "setns", "bpf", "perf_event_open", "kexec_load", "init_module", "keyctl",
     "open_by_handle_at", "reboot", "chroot", "io_uring_enter", "swapon", "pivot_root"],
)  # fmt: skip
def test_a_call_that_is_not_in_the_profile_is_refused(call: str) -> None:
    # The kernel would answer a call with such arguments otherwise: EFAULT, EINVAL, EBADF, ENOENT, or nothing.
    assert errno_of(call, -1, -1, -1, -1) == errno.EPERM


def test_new_namespaces_and_other_sockets_are_refused() -> None:
    new_user, sigchld = 0x10000000, 17
    assert errno_of("clone", new_user | sigchld, 0, 0, 0, 0) == errno.EPERM
    assert errno_of("clone3", 0, 0) == errno.ENOSYS  # the C library takes clone then
    stream = 1
    for family in (1, 2, 10):
        assert errno_of("socket", family, stream, 0) == 0
    for family in (38, 40):  # AF_ALG, AF_VSOCK
        assert errno_of("socket", family, stream, 0) == errno.EPERM


def test_it_allows_nothing_beyond_the_engines_own_but_what_we_added() -> None:
    if not ENGINES_OWN.exists():
        pytest.skip(f"lacks: {ENGINES_OWN} (Debian: golang-github-containers-common)")
    allow = {name for rule in read(ENGINES_OWN)["syscalls"] for name in rule["names"] if is_allow(rule)}
    ours = {name for rule in read()["syscalls"] for name in rule["names"] if is_allow(rule)}
    assert ours - allow - YOUNGER <= OURS
    assert ours >= OURS


def is_allow(rule: dict[str, Any]) -> bool:
    return bool(rule["action"] == "SCMP_ACT_ALLOW")


def test_no_name_is_a_slip_of_the_pen() -> None:
    lib = library()
    unknown = {name for name, _, _ in rules(read()) if lib.seccomp_syscall_resolve_name(name.encode()) == -1}
    assert unknown <= YOUNGER


def test_a_profile_without_a_call_lacks_that_call_alone() -> None:
    profile = read()
    names = [name for name, _, _ in rules(profile)]
    less = [name for name, _, _ in rules(without(profile, "userfaultfd"))]
    assert sorted([*less, "userfaultfd"]) == sorted(names)
