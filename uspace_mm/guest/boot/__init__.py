"""Boots a guest under QEMU, runs commands in it, and says how they ended."""

from __future__ import annotations

from uspace_mm.guest.boot.errors import GuestError, GuestFileError
from uspace_mm.guest.boot.guest import Guest, boot
from uspace_mm.guest.boot.launch import Kernel, RootFilesystem
from uspace_mm.guest.boot.machine import Deadlines, Hello, Machine
from uspace_mm.guest.boot.ready import ready

__all__ = [
    "Deadlines",
    "Guest",
    "GuestError",
    "GuestFileError",
    "Hello",
    "Kernel",
    "Machine",
    "RootFilesystem",
    "boot",
    "ready",
]
