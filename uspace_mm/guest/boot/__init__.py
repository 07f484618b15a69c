"""Boots a guest under QEMU, runs commands in it, and says how they ended."""

from __future__ import annotations

from uspace_mm.guest.boot.errors import GuestError, GuestFileError
from uspace_mm.guest.boot.guest import Guest, boot
from uspace_mm.guest.boot.launch import Kernel, RootFilesystem
from uspace_mm.guest.boot.machine import Deadlines, Hello, Machine

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
]
