"""``uspace-mm demo NAME``: one module ``demo_NAME`` of this package per demonstration."""

from __future__ import annotations

from uspace_mm.cli._nested import Nested


class Command(Nested):
    """Chooses the demonstration."""

    name = "demo"
    help = "Show the pager or a postcopy migration at work on real data."
    metavar = "DEMO"
    modules = ("demo_postcopy", "demo_pager")
