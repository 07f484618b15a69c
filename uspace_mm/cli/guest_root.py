"""``uspace-mm guest root COMMAND``: build, list and update root file systems."""

from __future__ import annotations

from uspace_mm.cli._nested import Nested


class Command(Nested):
    """Chooses what to do with root file systems."""

    name = "root"
    help = "Make root file systems for guests from Debian packages, wheels and directories, without root."
    modules = ("guest_root_build", "guest_root_list", "guest_root_update")
