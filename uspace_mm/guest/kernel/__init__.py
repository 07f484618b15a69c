"""Kernels for the guests: built here from one source, Debian's own, or a file."""

from uspace_mm.guest.kernel.build import Built, build, cached, find
from uspace_mm.guest.kernel.files import from_file
from uspace_mm.guest.kernel.model import Kernel, boot_argument

__all__ = ["Built", "Kernel", "boot_argument", "build", "cached", "find", "from_file"]
