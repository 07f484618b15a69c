"""Fill the guests' cache with what an image of them holds: ``fill_cache.py 4k,16k,64k`` (or ``all``).

A kernel or a root image that came with the build context is taken as it is, whichever compiler made it; what
is missing is made. What only the making needed is removed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

from uspace_mm.errors import UnsupportedError
from uspace_mm.guest import cache, kernel
from uspace_mm.guest.pagesize import PageSize, parse_page_sizes

# Packages and lists of the mirror: half a gigabyte that a guest does not boot from.
ONLY_FOR_MAKING = ("apt", "deb", "kernel-source")


def is_missing(size: PageSize) -> bool:
    try:
        kernel.find(size, build=False)
    except UnsupportedError:
        return True
    return False


if missing := [str(size) for size in parse_page_sizes(sys.argv[1]) if is_missing(size)]:
    subprocess.run(["uspace-mm", "guest", "kernel", "build", "--page-size", ",".join(missing)], check=True)
for kind in ONLY_FOR_MAKING:
    shutil.rmtree(cache.cache_root() / kind, ignore_errors=True)
