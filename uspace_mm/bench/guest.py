"""How long a guest takes: a command in one against a bare boot of the same kernel, and a suite of one test.

The floor is QEMU with the same kernel, CPU and memory whose init is a static program that powers off at once:
no disk, no channel, no root file system. Ours is the whole command, with the start of its interpreter: as it
is used (it resumes a saved state), and fresh (it boots).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from uspace_mm.bench.report import BenchOptions, BenchReport, at_most
from uspace_mm.errors import UnsupportedError, UspaceError
from uspace_mm.guest import kernel as kernels
from uspace_mm.guest import rootfs
from uspace_mm.guest.boot import Kernel, Machine, initramfs
from uspace_mm.guest.boot.cpus import DEFAULT_MODEL
from uspace_mm.guest.boot.launch import is_emulated
from uspace_mm.guest.boot.qemu import find_qemu
from uspace_mm.guest.pagesize import PAGE_SIZES, PageSize
from uspace_mm.guest.rootfs.toolchain import toolchain
from uspace_mm.guest.sources import native_sources

HELP = "time of a command and of a test suite in a guest, against a bare boot of the same kernel"
SUITE_LIMIT_S = 20.0
TARGETS = {
    **{f"ours_vs_bare_boot_{size}": at_most(1.5) for size in PAGE_SIZES},
    "suite_end_vs_20_s": at_most(1.0),
}
_LIMIT_S = 300.0
_SUITE = "def test_one():\n    assert 1 + 1 == 2\n"


class _Failed(UspaceError):
    """What is measured did not work."""


def run(options: BenchOptions) -> BenchReport:
    """Each page size whose kernel is there, bare and ours in turn in each round; times are medians.

    Quick: the largest page size alone. Raises :class:`UnsupportedError` when no kernel is there.
    """
    found = _kernels()
    if options.quick:
        found = found[-1:]
    rootfs.obtain()  # what has to be made is made before anything is measured
    results: dict[str, float] = {}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="umm-bench-guest-") as folder:
        archive = _floor(Path(folder))
        for size, kernel in found:
            options.progress(f"guest: {size}, saving a state")
            _ours(size)
            times = []
            rounds = options.rounds_or(7)
            for number in range(rounds):
                options.progress(f"guest: {size}, round {number + 1} of {rounds}")
                times.append((_bare(kernel, archive), _ours(size), _ours(size, "--fresh")))
            results[f"bare_boot_{size}_s"] = median(bare for bare, _, _ in times)
            results[f"run_true_{size}_s"] = median(ours for _, ours, _ in times)
            results[f"run_true_fresh_{size}_s"] = median(fresh for _, _, fresh in times)
            ratios[f"ours_vs_bare_boot_{size}"] = median(ours / bare for bare, ours, _ in times)
            ratios[f"fresh_vs_bare_boot_{size}"] = median(fresh / bare for bare, _, fresh in times)
        ends = []
        for size, _ in found:
            options.progress(f"guest: a suite of one test with {size} pages")
            runs = [_suite(size, Path(folder)) for _ in range(options.rounds_or(3))]
            results[f"first_result_{size}_s"] = median(first for first, _ in runs)
            results[f"suite_end_{size}_s"] = median(end for _, end in runs)
            ends.append(results[f"suite_end_{size}_s"])
    ratios["suite_end_vs_20_s"] = max(ends) / SUITE_LIMIT_S
    return BenchReport("guest", results, ratios, TARGETS)


def _kernels() -> list[tuple[PageSize, Kernel]]:
    find_qemu()
    found: list[tuple[PageSize, Kernel]] = []
    for size in PAGE_SIZES:
        try:
            found.append((size, kernels.find(size, build=False)))
        except UnsupportedError as error:
            missing = error
    if not found:
        raise missing
    return found


def _floor(folder: Path) -> Path:
    """The initramfs with the floor in it."""
    source = native_sources() / "bench" / "power_off.c"
    program, archive = folder / "power_off", folder / "power_off.cpio"
    with toolchain() as tools:
        tools.link(
            tools.compile([source], folder, ["-std=gnu11", "-O2", "-D_GNU_SOURCE"]), program, ["-static"]
        )
    archive.write_bytes(initramfs.build(program))
    return archive


def _bare(kernel: Kernel, archive: Path) -> float:
    machine = Machine()
    cpu, accelerator = (DEFAULT_MODEL, "tcg,thread=multi") if is_emulated() else ("host", "kvm")
    command = [
        *(str(find_qemu()), "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-machine", "virt", "-accel", accelerator, "-cpu", cpu, "-smp", str(machine.cpus)),
        *("-m", f"{machine.memory_bytes >> 20}M", "-kernel", str(kernel.image), "-initrd", str(archive)),
        *("-append", "console=ttyAMA0 panic=-1 quiet", "-serial", "null"),
    ]
    return _timed(command)


def _ours(size: PageSize, *options: str) -> float:
    return _timed([*_command(), "guest", "run", "--page-size", str(size), *options, "--", "true"])


def _command() -> list[str]:
    return [sys.executable, "-m", "uspace_mm.cli"]


def _timed(command: Sequence[str]) -> float:
    begin = time.perf_counter()
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )
    elapsed = time.perf_counter() - begin
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise _Failed(f"{Path(command[0]).name} exited {done.returncode}: {said[-1] if said else 'no word'}")
    return elapsed


def _suite(size: PageSize, folder: Path) -> tuple[float, float]:
    """Seconds from the command to the first result of a test, and to the end."""
    with _project(folder) as project:
        command = [*_command(), "guest", "test", "--page-size", str(size), "--project", str(project)]
        begin = time.perf_counter()
        with subprocess.Popen(
            command, cwd=project, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            first = None
            for line in process.stdout:
                if first is None and "test_one" in line:
                    first = time.perf_counter() - begin
            status = process.wait(_LIMIT_S)
        end = time.perf_counter() - begin
    if status or first is None:
        raise _Failed(f"guest test with {size} pages exited {status}")
    return first, end


@contextmanager
def _project(folder: Path) -> Iterator[Path]:
    project = folder / "project"
    project.mkdir()
    try:
        (project / "test_one.py").write_text(_SUITE)
        yield project
    finally:
        shutil.rmtree(project)
