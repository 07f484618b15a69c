"""``uspace-mm guest kernel COMMAND``: build, fetch, inspect, compare and list kernels."""

from __future__ import annotations

from uspace_mm.cli._nested import Nested


class Command(Nested):
    """Chooses what to do with kernels."""

    name = "kernel"
    help = "Build or fetch arm64 kernels with 4K, 16K and 64K pages, and say what an image is made of."
    modules = (
        "guest_kernel_build",
        "guest_kernel_fetch",
        "guest_kernel_inspect",
        "guest_kernel_compare",
        "guest_kernel_list",
    )
