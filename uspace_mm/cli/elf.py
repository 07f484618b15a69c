"""``uspace-mm elf COMMAND``: what ELF files do on kernels with other page sizes."""

from __future__ import annotations

from uspace_mm.cli._nested import Nested


class Command(Nested):
    """Chooses what to do with ELF files."""

    name = "elf"
    help = "Judge ELF files: do they load on kernels with 4K, 16K and 64K pages?"
    modules = ("elf_audit",)
