"""Guests for tests: kernel, root file system, and the project as a layer on top, booted one at a time."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from uspace_mm.errors import InputError
from uspace_mm.guest.boot import Guest, GuestError, Kernel, Machine, boot
from uspace_mm.guest.boot.ready import BUILT, DEBIAN, find_kernel
from uspace_mm.guest.outcome import Outcome
from uspace_mm.guest.pagesize import PageSize
from uspace_mm.guest.progress import Progress, silent
from uspace_mm.guest.rootfs import obtain
from uspace_mm.guest.testing.machine import BootFailed, OnBytes, Place
from uspace_mm.guest.testing.project import PLACE, Project, make_layer
from uspace_mm.guest.testing.size_run import SOURCES
from uspace_mm.guest.testing.suite import side_by_side
from uspace_mm.sizes import format_size

# The project's layer is cached in the guest's memory while it is read, and what tests write stays there.
PROJECT_SHARE = 0.5
# Lines of the console that are shown for a guest that did not come up.
CONSOLE_LINES = 15


@dataclass(frozen=True)
class Settings:
    """What guests are made of.

    ``kernels`` are images, or ``built`` (our own, which a page size without an image gets) or ``debian``.
    """

    memory_bytes: int = 1 << 30
    cpus: int = 2
    cpu_model: str | None = None
    kernels: tuple[str, ...] = ()
    wheels: tuple[Path, ...] = ()
    pips: tuple[str, ...] = ()
    overlays: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Root:
    layers: Sequence[Path]
    agent: Path


class Guests:
    """Boots guests of some page sizes with one project in them; a :class:`Boot`. Close it when all are gone.

    Raises :class:`uspace_mm.errors.UspaceError` when a kernel or the root file system cannot be had.
    """

    def __init__(
        self, settings: Settings, project: Project, sizes: Sequence[PageSize], progress: Progress = silent
    ) -> None:
        if project.total_bytes > PROJECT_SHARE * settings.memory_bytes:
            size, memory = format_size(project.total_bytes), format_size(settings.memory_bytes)
            raise InputError(
                f"{project.root}: {size} in {len(project.files)} files are too much for a guest of {memory}: "
                "name a smaller folder as project, let git ignore what tests do not need, or give more memory"
            )
        self._settings = settings
        self._kernels = kernels_for(sizes, settings.kernels, progress)
        progress("root file system")
        base = obtain(
            wheels=settings.wheels, pips=settings.pips, overlays=settings.overlays, progress=progress
        )
        progress("packing the project")
        self._folder = tempfile.TemporaryDirectory(prefix="umm-guest-test-")
        try:
            layer = Path(self._folder.name) / "project.squashfs"
            make_layer(project, SOURCES, layer)
        except BaseException:
            self._folder.cleanup()
            raise
        self._root = _Root((*base.layers, layer), base.agent)

    def __call__(self, size: PageSize) -> BootedGuest:
        settings = self._settings
        machine = Machine(settings.memory_bytes, settings.cpus, settings.cpu_model)
        try:
            return BootedGuest(boot(self._kernels[size], size, self._root, machine))
        except GuestError as error:
            console = "\n".join(str(getattr(error, "console", "")).splitlines()[-CONSOLE_LINES:])
            raise BootFailed(f"did not boot: {error}", error.outcome, console) from error

    def parallel(self, sizes: int) -> int:
        """How many of `sizes` guests this machine has CPUs and memory for at once."""
        return side_by_side(
            sizes,
            memory_bytes=self._settings.memory_bytes,
            cpus=len(os.sched_getaffinity(0)),
            available_bytes=psutil.virtual_memory().available,
        )

    def close(self) -> None:
        """Remove the project's layer."""
        self._folder.cleanup()


def kernels_for(
    sizes: Sequence[PageSize], named: Sequence[str], progress: Progress = silent
) -> dict[PageSize, Kernel]:
    """A kernel per page size: of the images `named` the one that has it, else our own or Debian's, built if
    need be.

    Raises :class:`InputError` when an image fits none of `sizes` or two fit one.
    """
    found: dict[PageSize, Kernel] = {}
    other = DEBIAN if DEBIAN in named else BUILT
    for image in named:
        if image in (DEBIAN, BUILT):
            continue
        kernel = find_kernel(sizes[0], image)
        fits = [size for size in sizes if kernel.page_size in (None, size)]
        if not fits:
            asked = ", ".join(size.name for size in sizes)
            raise InputError(f"{image}: its pages are {kernel.page_size}, and {asked} was asked for")
        for size in fits:
            if size in found and kernel.page_size is not None:
                raise InputError(f"{image}: {found[size].image} has {size} pages already")
            found.setdefault(size, kernel)
    for size in sizes:
        if size not in found:
            found[size] = find_kernel(size, other, progress=progress)
    return found


class BootedGuest:
    """A :class:`Guest` as a :class:`uspace_mm.guest.testing.machine.Machine`."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._process = os.pidfd_open(guest.pid)
        self._lock = threading.Lock()
        self._closed = False

    @property
    def page_size_bytes(self) -> int:
        return self._guest.hello.page_size

    @property
    def place(self) -> Place:
        return PLACE

    def run(
        self,
        command: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str],
        stdin: bytes,
        on_stdout: OnBytes,
        on_stderr: OnBytes,
        on_report: OnBytes,
    ) -> Outcome:
        with self._lock:
            return self._guest.run(
                command,
                cwd=cwd,
                env=env,
                stdin=stdin,
                on_stdout=on_stdout,
                on_stderr=on_stderr,
                on_report=on_report,
            )

    def answers(self, timeout_s: float) -> bool:
        # While a command runs, the conversation asks the agent by itself.
        if self._lock.acquire(blocking=False):
            try:
                return self._guest.ping(timeout_s)
            finally:
                self._lock.release()
        return self._guest.owed_s < timeout_s

    def close(self) -> None:
        if self._closed:
            return
        # A guest is not for two threads at once: its QEMU is killed, the one that runs a command sees it end.
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)
        with self._lock:
            if not self._closed:
                self._closed = True
                self._guest.close()
                os.close(self._process)
