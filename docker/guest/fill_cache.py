"""Fill the image's cache with what guests boot: ``fill_cache.py has-kernels|fill 4k,16k,64k`` (or ``all``).

``has-kernels`` exits 1 when one would have to be built. A kernel that came with the build context is taken as
it is, whichever compiler made it; what is missing is made, and what only the making needed is removed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

from uspace_mm.errors import UnsupportedError
from uspace_mm.guest import cache, kernel, rootfs
from uspace_mm.guest.pagesize import PageSize, parse_page_sizes

# Packages and lists of the mirror, and what was unpacked of them: half a gigabyte that no guest boots from.
ONLY_FOR_MAKING = ("apt", "deb", "host-python", "kernel-source", "sysroot", "test-base", "wheel")


def is_missing(size: PageSize) -> bool:
    try:
        kernel.find(size, build=False)
    except UnsupportedError:
        return True
    return False


def fill(missing: list[PageSize]) -> None:
    if missing:
        names = ",".join(str(size) for size in missing)
        subprocess.run(["uspace-mm", "guest", "kernel", "build", "--page-size", names], check=True)
    rootfs.obtain()
    for kind in ONLY_FOR_MAKING:
        shutil.rmtree(cache.cache_root() / kind, ignore_errors=True)


what, sizes = sys.argv[1:]
missing = [size for size in parse_page_sizes(sizes) if is_missing(size)]
if what == "fill":
    fill(missing)
elif missing:
    sys.exit(1)
