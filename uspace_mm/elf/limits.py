"""How much an audit unpacks, so that a bomb or a liar costs a bounded amount of memory, disk and time."""

from __future__ import annotations

from dataclasses import dataclass


class RefusedError(Exception):
    """An archive, or a member of one, is left alone; the text says which bound it passes."""


@dataclass(frozen=True)
class Limits:
    """Bounds for one archive, and for all under one path. Sizes in bytes."""

    floor_bytes: int = 128 << 20  # any archive may expand to this much
    ratio: int = 100  # and to this many times its own size: the best wheels and packages reach about 15
    ceiling_bytes: int = 64 << 30  # all archives under one path together
    member_bytes: int = 16 << 30  # one ELF file or nested archive, unpacked
    members: int = 1_000_000
    depth: int = 5  # archives in archives: an image, its layer, a package, its data, a wheel
    memory_bytes: int = 8 << 20  # of one unpacked member, before it goes to a temporary file
    table_bytes: int = 16 << 20  # a zip's directory, a tar's extended header
    decoder_bytes: int = 256 << 20  # the window that a compressed stream asks for


class Total:
    """What is left for all archives under one path."""

    def __init__(self, limits: Limits) -> None:
        self.left = limits.ceiling_bytes


class Budget:
    """What is left of the bounds for one archive, with all that is in it."""

    def __init__(self, limits: Limits, packed_bytes: int, shared: Total) -> None:
        self.limits = limits
        self.shared = shared
        self.total = min(max(limits.floor_bytes, limits.ratio * packed_bytes), limits.ceiling_bytes)
        self.left = self.total
        self.members = limits.members

    def unpack(self, size: int) -> None:
        """`size` more bytes came out of an archive; raises :class:`RefusedError` past the bound."""
        self.left -= size
        self.shared.left -= size
        if self.shared.left < 0:
            self.left = -1
            raise RefusedError(
                f"not unpacked: {self.limits.ceiling_bytes >> 20} MiB came out of archives under this path"
            )
        if self.left < 0:
            raise RefusedError(
                f"expands to more than {self.total >> 20} MiB, {self.limits.ratio} times its size: taken "
                "for a bomb, the rest is left alone"
            )

    def count(self) -> None:
        """One more member of an archive."""
        self.members -= 1
        if self.members < 0:
            raise RefusedError(f"has more than {self.limits.members} members: the rest is left alone")
