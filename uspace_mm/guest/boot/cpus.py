"""Which page sizes QEMU's arm64 CPUs have, and which of them boots fastest.

A kernel whose granule the CPU lacks parks before its first console byte, so a pair that cannot work is
refused before the launch.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.guest.pagesize import PAGE_SIZES, PageSize

# Boots about twice as fast as `max` under emulation, a little faster than cortex-a76, and has every granule.
DEFAULT_MODEL = "neoverse-n1"

_ALL = frozenset(size.name for size in PAGE_SIZES)
_NO_16K = _ALL - {"16k"}
# TGRAN4, TGRAN16 and TGRAN64 of ID_AA64MMFR0_EL1 in QEMU's target/arm/cpu64.c and tcg/cpu64.c.
GRANULES: dict[str, frozenset[str]] = {
    "a64fx": _NO_16K,
    "cortex-a35": _ALL,
    "cortex-a53": _NO_16K,
    "cortex-a55": _ALL,
    "cortex-a57": _NO_16K,
    "cortex-a72": _NO_16K,
    "cortex-a76": _ALL,
    "cortex-a710": _ALL,
    "neoverse-n1": _ALL,
    "neoverse-n2": _ALL,
    "neoverse-v1": _ALL,
    "max": _ALL,
}
# Models of cores without 64-bit state: a kernel for arm64 cannot start on them.
_IS_32_BIT = re.compile(r"(arm\d|cortex-(a7|a8|a9|a15|m\d+|r\d+f?)$|pxa|sa1|ti925)")


def choose_cpu(model: str | None, page_size: PageSize, qemu: Path) -> str:
    """The CPU model to ask QEMU for: `model` where it has the page size, else the fastest.

    Raises :class:`InputError` for a model that lacks the page size or that is not known, and
    :class:`UnsupportedError` when QEMU cannot be asked.
    """
    if model is None:
        return DEFAULT_MODEL
    # Properties follow the name: `max,pauth-impdef=on`.
    name = model.split(",", 1)[0]
    granules = GRANULES.get(name)
    if granules is None:
        known = models_of(qemu)
        if name not in known or _IS_32_BIT.match(name):
            usable = ", ".join(sorted(other for other in known if not _IS_32_BIT.match(other)))
            raise InputError(f"CPU {name!r}: not a 64-bit CPU of this QEMU; it has {usable}")
        return model  # newer than our table: the deadline of the first console byte will tell
    if page_size.name not in granules:
        having = ", ".join(sorted(other for other, sizes in GRANULES.items() if page_size.name in sizes))
        raise InputError(
            f"CPU {name}: it has no {page_size} pages, the kernel would stop in silence; use one of {having}"
        )
    return model


def models_of(qemu: Path) -> set[str]:
    """The CPU models that this QEMU has for its machine ``virt``."""
    command = [str(qemu), "-M", "virt", "-cpu", "help"]
    try:
        listing = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UnsupportedError(f"{' '.join(command)}: {error}") from error
    return {line.split()[0] for line in listing.stdout.splitlines() if line.startswith("  ")}
