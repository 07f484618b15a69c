"""Loads in guests what the rules did not find plainly fine, and holds the verdicts against what happened."""

from __future__ import annotations

from uspace_mm.elf.prove.proving import prove

__all__ = ["prove"]
