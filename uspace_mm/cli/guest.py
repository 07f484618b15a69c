"""``uspace-mm guest COMMAND``: kernels, boots and tests with 4K, 16K and 64K pages."""

from __future__ import annotations

import argparse

from uspace_mm.cli._nested import Nested


class Command(Nested):
    """Chooses what to do with guests."""

    name = "guest"
    help = "Build kernels with 4K, 16K and 64K pages, boot them, and run commands and tests in them."
    modules = ("guest_kernel", "guest_root", "guest_run", "guest_test", "guest_cache")

    def run(self, args: argparse.Namespace) -> int:
        if args.guest_command == "cache":
            return super().run(args)
        from uspace_mm.guest.cache import in_use

        # What the command has looked up stays there until it ends.
        with in_use():
            return super().run(args)
