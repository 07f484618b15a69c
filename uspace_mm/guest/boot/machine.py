"""The machine that QEMU is asked for, how long a boot may take, and what the guest says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Memory, CPUs and CPU model of a guest. ``cpu_model`` None is the fastest that has the page size."""

    memory_bytes: int = 1 << 30
    cpus: int = 2
    cpu_model: str | None = None


@dataclass(frozen=True)
class Deadlines:
    """Seconds that each phase of a boot may take; emulation and load are in the defaults' margin.

    ``first_byte_s``: from the launch to the first byte on the console; ``init_s``: from there to the agent's
    HELLO; ``end_s``: for the answer to a request that needs no time, and for files that come back.
    """

    first_byte_s: float = 30.0
    init_s: float = 60.0
    end_s: float = 60.0


@dataclass(frozen=True)
class Hello:
    """What the agent found in the guest: ``page_size`` in bytes is AT_PAGESZ."""

    page_size: int
    release: str
    machine: str
    cpus: int
    memory_bytes: int
