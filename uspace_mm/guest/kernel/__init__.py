"""Kernels for the guests: built here from one source, Debian's own, or a file."""

from uspace_mm.guest.kernel.files import from_file
from uspace_mm.guest.kernel.model import Kernel, boot_argument
from uspace_mm.guest.kernel.own import Built, build, cached, find
from uspace_mm.guest.kernel.packaged import fetch

__all__ = ["Built", "Kernel", "boot_argument", "build", "cached", "fetch", "find", "from_file"]
