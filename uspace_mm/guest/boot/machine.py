"""The machine that QEMU is asked for, how long a boot may take, and what the guest says of itself."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Machine:
    """Memory, CPUs and CPU model of a guest. ``cpu_model`` None is the fastest that has the page size."""

    memory_bytes: int = 1 << 30
    cpus: int = 2
    cpu_model: str | None = None


@dataclass(frozen=True)
class Deadlines:
    """Seconds that each phase may take on an idle machine with KVM; :meth:`scaled` is what is waited for.

    ``first_byte_s``: from the launch to the first byte on the console; ``init_s``: from there to the agent's
    HELLO; ``end_s``: for the answer to a request that needs no time, and for files that come back.
    """

    first_byte_s: float = 5.0
    init_s: float = 15.0
    end_s: float = 15.0

    def scaled(self, *, emulated: bool) -> Deadlines:
        """Longer by what emulation costs, and by how many others wait for each CPU of this machine."""
        load = os.getloadavg()[0] / (os.cpu_count() or 1)
        factor = (4.0 if emulated else 1.0) * max(1.0, load)
        return replace(
            self,
            first_byte_s=self.first_byte_s * factor,
            init_s=self.init_s * factor,
            end_s=self.end_s * factor,
        )


@dataclass(frozen=True)
class Hello:
    """What the agent found in the guest: ``page_size`` in bytes is AT_PAGESZ."""

    page_size: int
    release: str
    machine: str
    cpus: int
    memory_bytes: int
    #: Whether the guest's kernel tells QEMU of a panic, so that the console need not be looked at for it.
    reports_panics: bool
