"""Guests that go on from a saved state: what a boot leads to is made once, and kept in the cache.

The state is the guest at the moment when its agent had said HELLO. Its memory is a file that a later guest
maps privately, as the templates of Kata Containers do; the rest is what QEMU's migration writes. It belongs
to one kernel, root file system, machine and QEMU: whatever differs is another entry. The clock, and random
numbers that no other guest from this state has, are given to the guest before anything runs in it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from uspace_mm.guest import cache
from uspace_mm.guest.boot.conversation import Conversation
from uspace_mm.guest.boot.errors import GuestError
from uspace_mm.guest.boot.guest import ENTROPY_BYTES, Guest, await_hello, boot, parse_hello
from uspace_mm.guest.boot.launch import (
    Kernel,
    MemoryFile,
    RootFilesystem,
    is_emulated,
    kernel_command_line,
    launch,
)
from uspace_mm.guest.boot.machine import Deadlines, Machine
from uspace_mm.guest.boot.qemu import MonitorError, Qemu, find_qemu
from uspace_mm.guest.channel import PROTOCOL
from uspace_mm.guest.outcome import QemuFailed
from uspace_mm.guest.pagesize import PageSize
from uspace_mm.guest.progress import Progress, silent

KIND = "saved-guest"
# Of some 60 MiB each; every change of the sources that guests see makes new ones.
KEPT = 6
# The memory is digested once, and its file may become as large.
MOST_MEMORY_BYTES = 2 << 30
_MEMORY, _STATE, _HELLO, _CONSOLE = "memory", "state", "hello.json", "console"


def resume(
    kernel: Kernel,
    page_size: PageSize,
    root: RootFilesystem,
    machine: Machine,
    *,
    deadlines: Deadlines,
    progress: Progress = silent,
) -> Guest:
    """A guest from the saved state, which is made when there is none; booted where that does not work.

    Raises what :func:`boot` raises.
    """
    limits = deadlines.scaled(emulated=is_emulated())
    if not is_emulated() or machine.memory_bytes > MOST_MEMORY_BYTES:
        # Under KVM a boot takes as long, and a state belongs to the host's CPU.
        return boot(kernel, page_size, root, machine, deadlines=deadlines, progress=progress)
    try:
        inputs = _inputs(kernel, page_size, root, machine)

        def make(entry: Path) -> None:
            _save(entry, kernel, page_size, root, machine, limits, progress)

        entry = cache.find(KIND, inputs)
        if entry is None:
            entry = cache.obtain(KIND, inputs, make, progress=progress)
            _forget_old(entry)
        return _resume(entry, kernel, page_size, root, machine, limits)
    except _CannotResume as error:
        cache.remove(error.entry)
    except (MonitorError, cache.CacheError, OSError):
        pass  # a disk that is full, a QEMU that cannot: the guest still boots
    except GuestError as error:
        # A full disk under its memory kills QEMU. Any other end a boot would have as well.
        if not isinstance(error.outcome, QemuFailed):
            raise
    return boot(kernel, page_size, root, machine, deadlines=deadlines, progress=progress)


class _CannotResume(Exception):
    """The state of this entry leads nowhere."""

    def __init__(self, entry: Path) -> None:
        super().__init__(str(entry))
        self.entry = entry


def _inputs(
    kernel: Kernel, page_size: PageSize, root: RootFilesystem, machine: Machine
) -> Mapping[str, object]:
    return {
        "protocol": PROTOCOL,
        "page_size": page_size.name,
        "kernel": [_identity(path) for path in (kernel.image, *kernel.modules)],
        "command_line": kernel_command_line(kernel, page_size, len(root.layers)),
        "root": [_identity(path) for path in (root.agent, *root.layers)],
        "machine": [machine.memory_bytes, machine.cpus, machine.cpu_model],
        # The program itself, since a distribution changes it without a new version.
        "qemu": _identity(find_qemu()),
        "maker": cache.digest_file(Path(__file__).with_name("launch.py")),
    }


def _identity(path: Path) -> list[object]:
    """A file that is changed or replaced has another one."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _save(
    entry: Path,
    kernel: Kernel,
    page_size: PageSize,
    root: RootFilesystem,
    machine: Machine,
    limits: Deadlines,
    progress: Progress,
) -> None:
    progress(f"booting a guest with {page_size} pages, to save its state")
    with ExitStack() as stack:
        qemu = launch(kernel, page_size, root, machine, MemoryFile(entry / _MEMORY, shared=True))
        stack.callback(qemu.close)
        conversation = Conversation(qemu.agent, qemu, end_s=limits.end_s)
        stack.callback(conversation.close)
        try:
            hello = await_hello(qemu, conversation, page_size, limits, progress)
            parse_hello(hello, page_size)
        except GuestError as error:
            error.console = qemu.console_text
            raise
        _write_state(qemu, entry / _STATE, limits.end_s)
        (entry / _HELLO).write_text(json.dumps(hello))
        (entry / _CONSOLE).write_text(qemu.console_text)


def _write_state(qemu: Qemu, path: Path, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    _leave_memory_out(qemu, limit_s)
    # QEMU stops the guest when it writes the last of it; one stopped by us would be so after a resume.
    qemu.command("migrate", limit_s, uri=f"exec:cat > {shlex.quote(str(path))}")
    while (status := qemu.command("query-migrate", limit_s).get("status")) != "completed":
        if status in ("failed", "cancelled") or time.monotonic() > deadline:
            raise MonitorError(f"QEMU could not save the guest's state in {path}: {status}")
        time.sleep(0.01)


def _leave_memory_out(qemu: Qemu, limit_s: float) -> None:
    """The state is all but the memory, which is in its file already."""
    wanted = [{"capability": "x-ignore-shared", "state": True}]
    qemu.command("migrate-set-capabilities", limit_s, capabilities=wanted)


def _resume(
    entry: Path,
    kernel: Kernel,
    page_size: PageSize,
    root: RootFilesystem,
    machine: Machine,
    limits: Deadlines,
) -> Guest:
    hello = parse_hello(json.loads((entry / _HELLO).read_text()), page_size)
    console = (entry / _CONSOLE).read_bytes()
    with ExitStack() as undo:
        state = os.open(entry / _STATE, os.O_RDONLY | os.O_CLOEXEC)
        qemu = launch(kernel, page_size, root, machine, MemoryFile(entry / _MEMORY, False, state))
        undo.callback(qemu.close)
        qemu.begin_console(console)
        _leave_memory_out(qemu, limits.first_byte_s)
        qemu.command("migrate-incoming", limits.first_byte_s, uri=f"fd:{state}")
        conversation = Conversation(qemu.agent, qemu, end_s=limits.end_s)
        undo.callback(conversation.close)
        conversation.resume_after_hello()
        try:
            conversation.set_clock(os.urandom(ENTROPY_BYTES), limits.first_byte_s)
        except GuestError as error:
            raise _CannotResume(entry) from error
        qemu.reports_panics = hello.reports_panics
        undo.pop_all()
        return Guest(qemu, conversation, hello, limits)


def _forget_old(newest: Path) -> None:
    """Remove the entries beyond the last few; guests that run have their files open."""
    entries = [path for path in newest.parent.iterdir() if not path.name.startswith(".")]
    for path in sorted(entries, key=lambda path: path.stat().st_mtime_ns, reverse=True)[KEPT:]:
        if path != newest:
            shutil.rmtree(path, ignore_errors=True)
