"""QEMU's command line for a guest, and the descriptors that go with it."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.guest.boot import initramfs
from uspace_mm.guest.boot.cpus import choose_cpu
from uspace_mm.guest.boot.machine import Machine
from uspace_mm.guest.boot.qemu import Qemu, find_qemu
from uspace_mm.guest.pagesize import PageSize

PORT_NAME = "uspace_mm.agent"
_KVM = Path("/dev/kvm")
# The agent's frames are up to 256 KiB.
_CHANNEL_BUFFER_BYTES = 1 << 20


class Kernel(Protocol):
    """What a boot needs to know of a kernel."""

    @property
    def image(self) -> Path: ...

    @property
    def page_size(self) -> PageSize | None:
        """None: chosen by the kernel's command line."""

    @property
    def modules(self) -> Sequence[Path]:
        """Loaded in this order before anything is mounted."""


class RootFilesystem(Protocol):
    """What a boot needs to know of a root file system; no layers at all is the initramfs alone."""

    @property
    def layers(self) -> Sequence[Path]:
        """squashfs or erofs images, lowest first."""

    @property
    def agent(self) -> Path:
        """The agent as a static program for arm64."""


def is_emulated() -> bool:
    """Whether guests run under emulation: elsewhere than on arm64 with a usable /dev/kvm."""
    return platform.machine() != "aarch64" or not os.access(_KVM, os.R_OK | os.W_OK)


def kernel_command_line(kernel: Kernel, page_size: PageSize, layers: int) -> str:
    """The guest kernel's arguments."""
    words = [
        # The first byte comes with the kernel's first step, not with the UART's driver.
        "earlycon",
        "console=ttyAMA0",
        # The tests of a kernel that oopsed prove nothing, and what it held is held for ever: end, and say so.
        "oops=panic",
        "panic=-1",
        f"umm.layers={layers}",
    ]
    if kernel.page_size is None:
        words.append(f"arm64.pagesize={page_size.name}")
    return " ".join(words)


@dataclass(frozen=True)
class MemoryFile:
    """A file that is the guest's memory: written to (``shared``), or the start of a private copy."""

    path: Path
    shared: bool
    #: Descriptor of the rest of a saved state, for QEMU to be told to go on from; :func:`launch` closes it.
    state: int | None = None


def launch(
    kernel: Kernel,
    page_size: PageSize,
    root: RootFilesystem,
    machine: Machine,
    memory: MemoryFile | None = None,
) -> Qemu:
    """Start QEMU with the kernel, the agent and the layers.

    Raises :class:`InputError` for a kernel and a CPU that do not go together and for images that are not
    there, and :class:`UnsupportedError` without QEMU.
    """
    qemu = find_qemu()
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise UnsupportedError("setpriv is not on PATH: install it (Debian: util-linux)")
    if kernel.page_size not in (None, page_size):
        raise InputError(f"{kernel.image}: its pages are {kernel.page_size}, not {page_size}")
    for path in (kernel.image, root.agent, *root.layers, *kernel.modules):
        if not path.is_file():
            raise InputError(f"{path}: no such file")
    emulated = is_emulated()
    if emulated:
        cpu = choose_cpu(machine.cpu_model, page_size, qemu)
        accelerator = "tcg,thread=multi"
    else:
        cpu, accelerator = machine.cpu_model or "host", "kvm"
    with ExitStack() as on_failure:
        agent, agent_end = _socket_pair(on_failure)
        monitor, monitor_end = _socket_pair(on_failure)
        console, console_end = os.pipe()
        on_failure.callback(os.close, console)
        on_failure.callback(os.close, console_end)
        archive = initramfs.in_memory(initramfs.build(root.agent, kernel.modules))
        on_failure.callback(os.close, archive)
        arguments = [
            *(setpriv, "--pdeathsig", "KILL", "--", str(qemu)),
            *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"),
            *("-accel", accelerator, "-cpu", cpu, "-smp", str(machine.cpus)),
            *_memory(machine, memory),
            *("-kernel", str(kernel.image), "-initrd", f"/proc/self/fd/{archive}"),
            *("-append", kernel_command_line(kernel, page_size, len(root.layers))),
            # A pipe, not a socket: in a socket each byte of the UART takes the room of a message.
            *("-chardev", f"file,id=console,path=/proc/self/fd/{console_end}", "-serial", "chardev:console"),
            *(
                "-chardev",
                f"socket,id=monitor,fd={monitor_end.fileno()}",
                "-mon",
                "chardev=monitor,mode=control",
            ),
            *("-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,fd={agent_end.fileno()}"),
            *("-device", f"virtserialport,chardev=agent,name={PORT_NAME}", "-device", "pvpanic-pci"),
            *(word for number, layer in enumerate(root.layers) for word in _disk(number, layer)),
        ]
        theirs = [agent_end.detach(), monitor_end.detach(), console_end, archive]
        if memory is not None and memory.state is not None:
            theirs.append(memory.state)
        started = Qemu(arguments, agent=agent, descriptors=theirs)
        on_failure.pop_all()
        started.start(console, monitor)
        return started


def _socket_pair(on_failure: ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        on_failure.callback(end.close)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHANNEL_BUFFER_BYTES)
    return ours, theirs


def _memory(machine: Machine, file: MemoryFile | None) -> list[str]:
    size = f"{machine.memory_bytes >> 20}M"
    if file is None:
        return ["-machine", "virt", "-m", size]
    name = str(file.path).replace(",", ",,")
    share = "on" if file.shared else "off"
    return [
        *("-machine", "virt,memory-backend=memory", "-m", size),
        *("-object", f"memory-backend-file,id=memory,size={size},mem-path={name},share={share}"),
        *([] if file.state is None else ["-incoming", "defer"]),
    ]


def _disk(number: int, path: Path) -> list[str]:
    # In QEMU's options a comma is written twice.
    name = str(path).replace(",", ",,")
    return [
        "-drive",
        f"if=none,id=layer{number},file={name},format=raw,readonly=on,file.locking=off",
        "-device",
        f"virtio-blk-pci,drive=layer{number},serial=layer{number}",
    ]
