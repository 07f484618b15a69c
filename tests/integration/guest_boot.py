"""Kernels and root file systems for the tests that boot guests, and what a command in one wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from uspace_mm.errors import UnsupportedError
from uspace_mm.guest import kernel as kernels
from uspace_mm.guest import rootfs
from uspace_mm.guest.boot import Deadlines, Guest, Kernel, Machine, RootFilesystem, boot
from uspace_mm.guest.boot.qemu import find_qemu
from uspace_mm.guest.outcome import Outcome
from uspace_mm.guest.pagesize import PAGE_SIZES, PageSize

# Enough for Python in a guest with 64K pages; little, so that memory runs out soon where it is to run out.
SMALL = Machine(memory_bytes=256 << 20)


def require_qemu() -> None:
    """Skip where there is no QEMU for arm64."""
    try:
        find_qemu()
    except UnsupportedError:
        pytest.skip("lacks: qemu-system-aarch64 (Debian: qemu-system-arm)")


def kernel_of(size: PageSize) -> Kernel:
    """Our own kernel of that page size, when it was built."""
    require_qemu()
    try:
        return kernels.find(size, build=False)
    except UnsupportedError:
        pytest.skip(f"lacks: a kernel with {size} pages (uspace-mm guest kernel build --page-size {size})")


def any_kernel() -> tuple[Kernel, PageSize]:
    """One of our own kernels with its page size; the largest, where most goes wrong."""
    require_qemu()
    for size in reversed(PAGE_SIZES):
        try:
            return kernels.find(size, build=False), size
        except UnsupportedError:
            continue
    pytest.skip("lacks: a kernel (uspace-mm guest kernel build --page-size 64k)")


def root() -> RootFilesystem:
    """Debian with Python, without our package."""
    return rootfs.obtain(own=False)


@contextmanager
def booted(machine: Machine = SMALL, deadlines: Deadlines | None = None) -> Iterator[Guest]:
    """A guest with any of our kernels."""
    kernel, size = any_kernel()
    with boot(kernel, size, root(), machine, deadlines=deadlines or Deadlines()) as guest:
        yield guest


class Output:
    """What a command wrote."""

    def __init__(self) -> None:
        self.out, self.err, self.report = bytearray(), bytearray(), bytearray()


def run(
    guest: Guest, *argv: str, timeout_s: float = 60.0, stdin: bytes | None = None
) -> tuple[Outcome, Output]:
    """Run a command, keep what it wrote."""
    output = Output()
    outcome = guest.run(
        argv,
        stdin=stdin,
        on_stdout=output.out.extend,
        on_stderr=output.err.extend,
        on_report=output.report.extend,
        timeout_s=timeout_s,
    )
    return outcome, output


def is_running(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
