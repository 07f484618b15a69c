"""``uspace-mm guest COMMAND``: kernels, boots and tests with 4K, 16K and 64K pages."""

from __future__ import annotations

from uspace_mm.cli._nested import Nested


class Command(Nested):
    """Chooses what to do with guests."""

    name = "guest"
    help = "Build kernels with 4K, 16K and 64K pages, boot them, and run commands and tests in them."
    modules = ("guest_kernel", "guest_run", "guest_test")
