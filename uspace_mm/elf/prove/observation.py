"""What the probe printed of one job, as a record; see native/elf/probe.c and compare.h for its lines."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass

# Lines that say that memory is not as the file asks; `extra` is a protection lost.
_DIFFERENCES = ("lacks", "unmapped", "source", "bytes", "zeros", "beyond")


@dataclass(frozen=True, slots=True)
class Observation:
    """How one file was loaded with one page size.

    ``end`` is ``exited``, ``killed``, ``timeout``, ``unstarted``, or ``lost`` when the guest ended first;
    ``code`` its number. ``compared`` says whether memory was compared with the file before that.
    """

    page: int
    compared: bool
    differences: frozenset[str]
    end: str
    code: int
    output: str

    @property
    def ended_well(self) -> bool:
        """Whether the process ended by itself, with whatever status."""
        return self.end == "exited"

    def __str__(self) -> str:
        if self.end == "killed":
            try:
                text = f"killed by {signal.Signals(self.code).name}"
            except ValueError:
                text = f"killed by signal {self.code}"
        elif self.end == "timeout":
            text = "still running when its time was over"
        elif self.end == "unstarted":
            text = f"could not be started (errno {self.code})"
        elif self.end == "lost":
            text = "the guest ended first"
        else:
            text = f"exited {self.code}"
        return f"{text}: {self.output}" if self.output else text


def parse(lines: Iterable[str]) -> dict[str, Observation]:
    """The observations in the probe's output by the names of the jobs; one that has no end is ``lost``."""
    found: dict[str, Observation] = {}
    name: str | None = None
    page = code = 0
    compared = False
    differences: set[str] = set()
    end, output = "lost", ""

    def finish() -> None:
        if name is not None:
            found[name] = Observation(page, compared, frozenset(differences), end, code, output)

    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "job":
            finish()
            name, page, code, compared, end, output = rest, 0, 0, False, "lost", ""
            differences = set()
        elif word == "page":
            page = _number(rest)
        elif word == "compared":
            compared = rest == "0"
        elif word in _DIFFERENCES:
            differences.add(line)
        elif word in ("exited", "killed", "unstarted"):
            end, code = word, _number(rest)
        elif word == "timeout":
            end = word
        elif word == "output":
            output = rest
    finish()
    return found


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
