"""The stage of scripts/test that runs our own tests in guests with pages of 4, 16 and 64 KiB.

The C tests go along as static programs, which tests/guest/test_native.py starts.
"""

from __future__ import annotations

import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from scripts.lib.native import BUILD, CROSS, build, warnings_are_errors
from scripts.lib.running import ROOT, Tally, report, run, say

PROGRAM = Path(sys.executable).parent / "uspace-mm"
SIZES = "4k,16k,64k"
# Huge pages are 512 MiB with pages of 64 KiB, and a test makes one out of small pages while it holds another;
# 3 GiB do for a test alone, but after 400 others have no free block of that size.
MEMORY = "4G"
# From nothing: three kernels and the root file system.
KERNELS_LIMIT_S = 60 * 60
TESTS_LIMIT_S = 40 * 60
TEST_LIMIT_S = 10 * 60

# What depends on the kernel. The rest of the tests is about the tree, the host's tools and the command line.
TESTS = (
    "tests/guest",
    "tests/unit/test_kernel_types.py",
    "tests/unit/test_postcopy_protocol.py",
    "tests/integration/kernel",
    "tests/integration/test_notifier_age.py",
    "tests/integration/test_notifier_cache.py",
    "tests/integration/test_notifier_io_uring.py",
    "tests/integration/test_notifier_pager.py",
    "tests/integration/test_pager_arrays.py",
    "tests/integration/test_pager_close.py",
    "tests/integration/test_pager_files.py",
    "tests/integration/test_pager_kernel_faults.py",
    "tests/integration/test_pager_prefetch.py",
    "tests/integration/test_pager_syscalls.py",
    "tests/integration/test_pager_units.py",
    "tests/integration/test_postcopy.py",
    "tests/integration/test_postcopy_receiver.py",
    "tests/integration/test_stores.py",
)

# Programs that start programs, many threads, full disks: minutes per page size under emulation. With --full.
LONG_TESTS = (
    "tests/integration/test_notifier_process.py",
    "tests/integration/test_pager_fork.py",
    "tests/integration/test_pager_full.py",
    "tests/integration/test_pager_many.py",
    "tests/integration/test_pager_signals.py",
    "tests/integration/test_pager_spawn.py",
    "tests/integration/test_stores_function.py",
)

TOOLS = {
    "qemu-system-aarch64": "qemu-system-arm",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
    "mksquashfs": "squashfs-tools",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
}


def missing_tools() -> list[str]:
    """Tools that a guest or its kernel needs, with the Debian packages that bring them."""
    return [f"{tool} (Debian: {package})" for tool, package in TOOLS.items() if not shutil.which(tool)]


def kernels_and_root(tally: Tally) -> None:
    """Make what guests boot from, or find it in the user's cache; tests of other stages use it as well."""
    if lacks := missing_tools():
        tally.skipped.append(("guests", f"lacks: {', '.join(lacks)}"))
        return
    for name, command in {
        "guest kernels": ["kernel", "build", "--page-size", "all"],
        "guest root file system": ["root", "build"],
    }.items():
        outcome = run(PROGRAM, "guest", *command, limit_s=KERNELS_LIMIT_S)
        tally.check(name, outcome.ok)
        if not outcome.ok:
            report(name, outcome.output)


def guests(tally: Tally, full: bool) -> None:
    """Run TESTS in a guest of each page size (`full`: LONG_TESTS too); every test of every size counts."""
    if missing_tools():
        return  # which is among the skipped already
    project = stage_project(tally)
    if project is None:
        return
    junit = BUILD / "guest-tests.xml"
    junit.unlink(missing_ok=True)
    options: dict[str, object] = {
        "--page-size": SIZES,
        "--memory": MEMORY,
        "--project": project,
        "--pip": "hypothesis",
        "--junit": junit,
        "--timeout": f"{TESTS_LIMIT_S}s",
        "--test-timeout": f"{TEST_LIMIT_S}s",
    }
    outcome = run(
        *(PROGRAM, "guest", "test"),
        *(str(word) for option in options.items() for word in option),
        *("--", "-m", "not slow", *TESTS, *(LONG_TESTS if full else ())),
        limit_s=TESTS_LIMIT_S,
    )
    failed = count(junit, tally) if junit.is_file() else 0
    if failed or not outcome.ok:
        report("tests in guests", outcome.output)
    if not outcome.ok and not failed:
        tally.check(f"tests in guests (exit status {outcome.status})", False)


def stage_project(tally: Tally) -> Path | None:
    """A folder with the tests and the C tests for aarch64; the package itself is part of the guests."""
    name = "C tests for the guests"
    options = [*warnings_are_errors("aarch64-linux-gnu-gcc"), "-Dc_link_args=-static"]
    directory, outcome = build("c-aarch64-static", [*options, *CROSS])
    tally.check(name, outcome.ok)
    if not outcome.ok:
        report(name, outcome.output)
        return None
    project = BUILD / "guest-project"
    shutil.rmtree(project, ignore_errors=True)
    shutil.copytree(ROOT / "tests", project / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", project)
    programs = project / "native-tests"
    programs.mkdir()
    for program in sorted((directory / "tests").glob("test_*")):
        if program.is_file():
            shutil.copy(program, programs)
    say(f"   {len(list(programs.iterdir()))} C tests go along")
    return project


def count(junit: Path, tally: Tally) -> int:
    """Add every test of the report to the tally, with its page size; returns how many failed."""
    failed = 0
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        size = next(p.get("value") for p in case.iter("property") if p.get("name") == "page_size")
        name = f"{size}: {case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
            tally.check(name, False)
        elif skipped is not None and skipped.get("type") != "pytest.xfail":
            tally.skipped.append((name, skipped.get("message") or "no reason given"))
        else:
            tally.check(name, True)
    return failed
