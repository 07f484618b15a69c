"""What a run needs of a guest: a narrow interface, so that another program can stand in for it in tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from uspace_mm.errors import UspaceError
from uspace_mm.guest.outcome import Outcome
from uspace_mm.guest.pagesize import PageSize

OnBytes = Callable[[bytes], None]


class BootFailed(UspaceError):
    """The guest did not come up; ``outcome`` says how, ``console`` is the end of what it printed."""

    def __init__(self, message: str, outcome: Outcome | None = None, console: str = "") -> None:
        super().__init__(message)
        self.outcome = outcome
        self.console = console


@dataclass(frozen=True)
class Place:
    """Where things are inside a machine: the project, and the folder with the reporter and the driver."""

    project: str
    harness: str
    python: str


class Machine(Protocol):
    """A booted guest with the project in it."""

    @property
    def page_size_bytes(self) -> int:
        """What the machine itself says its page size is."""

    @property
    def place(self) -> Place: ...

    def run(
        self,
        command: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str],
        stdin: bytes,
        on_stdout: OnBytes,
        on_stderr: OnBytes,
        on_report: OnBytes,
    ) -> Outcome:
        """Run a command to its end; one at a time. Returns a harness outcome when the machine ended first."""

    def answers(self, timeout_s: float) -> bool:
        """Whether the machine still answers; may be called while a command runs, from another thread."""

    def close(self) -> None:
        """End the machine, whatever it does; a `run` that waits returns. May come from another thread."""


class Boot(Protocol):
    """Boots a machine of one page size; raises :class:`BootFailed`, or an error of the host's making."""

    def __call__(self, size: PageSize) -> Machine: ...
