"""Guests that do not come up, or go before their command ends: in time, named, with nothing left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.guest_boot import SMALL, any_kernel, booted, is_running, root, run
from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.guest.boot import (
    Deadlines,
    GuestError,
    Kernel,
    Machine,
    RootFilesystem,
    boot,
    conversation,
    cpus,
)
from uspace_mm.guest.outcome import (
    Exited,
    Killed,
    Outcome,
    Panicked,
    PoweredOff,
    QemuFailed,
    SetUpFailed,
    Silent,
    TimedOut,
    WrongPageSize,
)
from uspace_mm.guest.pagesize import PAGE_SIZES, PageSize, parse_page_size


@dataclass(frozen=True)
class OtherKernel:
    image: Path
    page_size: PageSize | None
    modules: tuple[Path, ...] = ()


@dataclass(frozen=True)
class OtherRoot:
    layers: tuple[Path, ...]
    agent: Path


def fails_to_boot(
    kernel: Kernel,
    size: PageSize,
    files: RootFilesystem | None = None,
    machine: Machine = SMALL,
    deadlines: Deadlines = Deadlines(),  # noqa: B008 frozen
) -> Outcome:
    with pytest.raises(GuestError) as caught:
        boot(kernel, size, files or root(), machine, deadlines=deadlines)
    return caught.value.outcome


def test_a_panic_comes_with_its_report() -> None:
    with booted() as guest:
        outcome, _ = run(guest, "sh", "-c", "echo c > /proc/sysrq-trigger; sleep 60")
        assert isinstance(outcome, Panicked)
        assert "sysrq triggered crash" in outcome.oops
        assert "Kernel panic - not syncing" in str(outcome)
        assert guest.run(["true"]) == outcome
        with pytest.raises(GuestError):
            guest.put("/tmp/x", b"")


@pytest.mark.parametrize(("letter", "how"), [("o", "powered off"), ("b", "reset")])
def test_a_guest_that_is_powered_off_from_inside(letter: str, how: str) -> None:
    with booted() as guest:
        outcome, _ = run(guest, "sh", "-c", f"echo {letter} > /proc/sysrq-trigger; sleep 60")
    assert outcome == PoweredOff(how)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_guest_that_halts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "_QUIET_S", 2.0)
    halt = "import ctypes; ctypes.CDLL(None).reboot(0xCDEF0123 - (1 << 32))"
    with booted() as guest:
        outcome, _ = run(guest, "python3", "-c", halt)
    assert outcome == PoweredOff("halted")


@pytest.mark.slow
def test_a_command_that_forks_for_ever() -> None:
    with booted() as guest:
        answers: list[bool] = []

        def ask() -> None:
            time.sleep(2)
            answers.append(guest.ping(30))

        asking = threading.Thread(target=ask)
        asking.start()
        outcome, _ = run(guest, "sh", "-c", "f() { f | f & }; f; sleep 1000", timeout_s=6)
        asking.join()
    # The shell may be the one that gets no more processes.
    assert outcome == TimedOut("command", 6) or isinstance(outcome, Exited | Killed)
    assert answers == [True]


def test_a_flood_that_never_ends() -> None:
    with booted() as guest:
        pid = guest.pid
        outcome = guest.run(["yes"], on_stdout=lambda data: None, timeout_s=1)
        assert outcome == TimedOut("command", 1)
        assert not is_running(pid)
        assert outcome.exit_status == 124


def test_qemu_that_is_killed() -> None:
    with booted() as guest:
        killer = threading.Timer(0.3, os.kill, (guest.pid, signal.SIGKILL))
        killer.start()
        outcome, _ = run(guest, "sleep", "1000")
        killer.join()
    assert isinstance(outcome, QemuFailed)
    assert outcome.status == -signal.SIGKILL


def test_close_from_another_thread_ends_a_run() -> None:
    with booted() as guest:
        closer = threading.Timer(0.3, guest.close)
        closer.start()
        outcome, _ = run(guest, "sleep", "1000")
        closer.join()
    assert isinstance(outcome, QemuFailed)
    guest.close()


BOOTS_AND_WAITS = """
import sys
from tests.integration.guest_boot import booted
with booted() as guest:
    print(guest.pid, flush=True)
    guest.run(["sleep", "1000"])
"""


def test_qemu_dies_with_a_process_that_is_killed() -> None:
    any_kernel()
    with subprocess.Popen([sys.executable, "-c", BOOTS_AND_WAITS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert is_running(pid)
        process.kill()
        process.wait()
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)


def test_a_cpu_without_the_page_size_is_refused() -> None:
    kernel, _ = any_kernel()
    size = parse_page_size("16k")
    with pytest.raises(InputError, match="no 16k pages"):
        boot(OtherKernel(kernel.image, size), size, root(), Machine(cpu_model="cortex-a57"))
    with pytest.raises(InputError, match="not a 64-bit CPU"):
        boot(OtherKernel(kernel.image, size), size, root(), Machine(cpu_model="cortex-a15"))
    with pytest.raises(InputError, match="not a 64-bit CPU"):
        boot(OtherKernel(kernel.image, size), size, root(), Machine(cpu_model="pentium"))


def test_a_kernel_that_says_nothing(tmp_path: Path) -> None:
    """An image for another architecture, as a boot that was not asked what it is would see it."""
    image = tmp_path / "image"
    image.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\0\x3e\0" + bytes(1 << 20))
    size = PAGE_SIZES[0]
    short = Deadlines(first_byte_s=0.2)
    outcome = fails_to_boot(OtherKernel(image, size), size, deadlines=short)
    assert isinstance(outcome, Silent | QemuFailed)


@pytest.mark.slow
def test_a_kernel_whose_granule_the_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens without the table: it parks in silence."""
    from uspace_mm.guest import kernel as kernels

    size = parse_page_size("16k")
    try:
        kernel = kernels.find(size, build=False)
    except UnsupportedError:
        pytest.skip("lacks: a kernel with 16k pages (uspace-mm guest kernel build --page-size 16k)")
    monkeypatch.setitem(cpus.GRANULES, "cortex-a57", frozenset({"16k"}))
    machine = Machine(SMALL.memory_bytes, cpu_model="cortex-a57")
    assert isinstance(fails_to_boot(kernel, size, machine=machine, deadlines=Deadlines(0.3)), Silent)


def test_a_silent_fallback_to_another_page_size() -> None:
    # A stand-in: a kernel with one size compiled in ignores the argument, as one for all sizes does with a
    # size that it does not know. No kernel for all sizes is to be had.
    kernel, size = any_kernel()
    other = next(item for item in PAGE_SIZES if item != size)
    outcome = fails_to_boot(OtherKernel(kernel.image, None, tuple(kernel.modules)), other)
    assert outcome == WrongPageSize(other.bytes, size.bytes)


def test_a_kernel_of_another_page_size_is_refused() -> None:
    kernel, size = any_kernel()
    other = next(item for item in PAGE_SIZES if item != size)
    with pytest.raises(InputError, match=f"its pages are {size}"):
        boot(kernel, other, root())


def test_a_layer_that_is_none(tmp_path: Path) -> None:
    kernel, size = any_kernel()
    layer = tmp_path / "a,layer"
    layer.write_bytes(os.urandom(1 << 20))
    outcome = fails_to_boot(kernel, size, OtherRoot((layer,), root().agent))
    assert isinstance(outcome, SetUpFailed)
    assert "layer 0" in outcome.reason
    with pytest.raises(InputError, match="no such file"):
        boot(kernel, size, OtherRoot((tmp_path / "missing",), root().agent))


def test_an_init_that_ends() -> None:
    kernel, size = any_kernel()
    outcome = fails_to_boot(kernel, size, OtherRoot((), Path("/bin/true")))
    assert isinstance(outcome, Panicked)
    assert "init" in outcome.oops


def test_too_little_memory_for_qemu() -> None:
    kernel, size = any_kernel()
    outcome = fails_to_boot(kernel, size, machine=Machine(memory_bytes=1 << 50))
    assert isinstance(outcome, QemuFailed)
    assert outcome.output


def test_without_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, size = any_kernel()
    files = root()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UnsupportedError, match="qemu-system-arm"):
        boot(kernel, size, files)


def test_a_guest_without_a_root_file_system() -> None:
    kernel, size = any_kernel()
    with boot(kernel, size, OtherRoot((), root().agent), SMALL) as guest:
        outcome, output = run(guest, "/init", "--help")
    assert outcome == Exited(2)
    assert b"usage" in output.err
