"""How a command in a guest ended: one class per way, so that none is mistaken for another."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from typing import ClassVar, Literal

# In the order in which a boot goes through them; each has a deadline of its own.
Phase = Literal["first console byte", "init", "command", "end"]


@dataclass(frozen=True)
class Outcome:
    """Base of all outcomes. ``exit_status`` is what ``guest run`` exits with, ``kind`` the name in JSON."""

    kind: ClassVar[str] = "outcome"

    @property
    def exit_status(self) -> int:
        return 1

    @property
    def ok(self) -> bool:
        """Whether the command ran and exited 0."""
        return False


@dataclass(frozen=True)
class Exited(Outcome):
    """The command ran and ended by itself."""

    status: int
    kind: ClassVar[str] = "exited"

    @property
    def exit_status(self) -> int:
        return self.status

    @property
    def ok(self) -> bool:
        return self.status == 0

    def __str__(self) -> str:
        return f"exited {self.status}"


@dataclass(frozen=True)
class Killed(Outcome):
    """The command was ended by a signal. As in a shell, the exit status is 128 and its number."""

    signal: int
    core_dumped: bool = False
    out_of_memory: bool = False
    kind: ClassVar[str] = "killed"

    @property
    def exit_status(self) -> int:
        return 128 + self.signal

    def __str__(self) -> str:
        try:
            name = signal.Signals(self.signal).name
        except ValueError:
            name = f"signal {self.signal}"
        why = " by the guest's out-of-memory killer" if self.out_of_memory else ""
        return f"killed by {name}{why}"


@dataclass(frozen=True)
class NotStarted(Outcome):
    """The guest could not execute the command (no such file, not executable, another architecture)."""

    command: str
    errno: int
    reason: str
    kind: ClassVar[str] = "not started"

    @property
    def exit_status(self) -> int:
        return 127 if self.errno == 2 else 126

    def __str__(self) -> str:
        return f"{self.command}: {self.reason}"


@dataclass(frozen=True)
class HarnessOutcome(Outcome):
    """The command's end is not known, because something around it ended first."""

    @property
    def exit_status(self) -> int:
        return 125


@dataclass(frozen=True)
class TimedOut(HarnessOutcome):
    """A phase took longer than its deadline; the guest was ended."""

    phase: Phase
    limit_s: float
    kind: ClassVar[str] = "timed out"

    @property
    def exit_status(self) -> int:
        return 124

    def __str__(self) -> str:
        return f"timed out: {self.phase} took more than {self.limit_s:g} s"


@dataclass(frozen=True)
class Panicked(HarnessOutcome):
    """The guest's kernel panicked. ``oops`` is what it printed, from the first line of the report on."""

    oops: str
    kind: ClassVar[str] = "kernel panic"

    def __str__(self) -> str:
        first = next((line for line in self.oops.splitlines() if "panic" in line.lower()), "no text")
        # Without the time in front, which not every kernel prints.
        return "the guest's kernel panicked: " + re.sub(r"^\[[ \d.]+\] ", "", first.strip())


@dataclass(frozen=True)
class Silent(HarnessOutcome):
    """Not one byte on the console: a CPU without the kernel's granule parks like this."""

    limit_s: float
    kind: ClassVar[str] = "no console output"

    def __str__(self) -> str:
        return (
            f"no console output in {self.limit_s:g} s: does this CPU have the kernel's page size, "
            "and is the image for this architecture?"
        )


@dataclass(frozen=True)
class PoweredOff(HarnessOutcome):
    """The guest was powered off or reset from inside before the command's end was reported."""

    how: Literal["powered off", "reset", "halted"]
    kind: ClassVar[str] = "powered off"

    def __str__(self) -> str:
        return f"the guest was {self.how} from inside before the command had ended"


@dataclass(frozen=True)
class QemuFailed(HarnessOutcome):
    """QEMU did not start, or ended by itself. ``output`` is what it said."""

    status: int
    output: str
    kind: ClassVar[str] = "QEMU failed"

    def __str__(self) -> str:
        last = self.output.strip().splitlines()[-1] if self.output.strip() else "it said nothing"
        how = f"signal {-self.status}" if self.status < 0 else f"exit status {self.status}"
        return f"QEMU failed ({how}): {last}"


@dataclass(frozen=True)
class ChannelLost(HarnessOutcome):
    """The connection to the agent broke or carried damaged frames while QEMU ran on."""

    reason: str
    kind: ClassVar[str] = "channel lost"

    def __str__(self) -> str:
        return f"the channel to the guest was lost: {self.reason}"


@dataclass(frozen=True)
class SetUpFailed(HarnessOutcome):
    """The guest's kernel ran, but the agent could not set the guest up (a layer that does not mount, say)."""

    reason: str
    kind: ClassVar[str] = "set-up failed"

    def __str__(self) -> str:
        return f"the guest could not be set up: {self.reason}"


@dataclass(frozen=True)
class WrongPageSize(HarnessOutcome):
    """The guest runs with another page size than was asked for (AT_PAGESZ; a silent fallback)."""

    wanted_bytes: int
    found_bytes: int
    kind: ClassVar[str] = "wrong page size"

    def __str__(self) -> str:
        return (
            f"the guest runs with pages of {self.found_bytes >> 10} KiB, "
            f"not of {self.wanted_bytes >> 10} KiB as asked for"
        )
