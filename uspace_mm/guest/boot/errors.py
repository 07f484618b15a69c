"""What goes wrong with a guest, as exceptions."""

from __future__ import annotations

import os

from uspace_mm.errors import UspaceError
from uspace_mm.guest.outcome import Outcome


class GuestError(UspaceError):
    """A guest did not come up, or ended before it was told to; ``outcome`` says how.

    ``console`` is what it printed, where the guest itself is not there to ask.
    """

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(str(outcome))
        self.outcome = outcome
        self.console = ""


class GuestFileError(UspaceError):
    """A file could not be brought into a guest or back; ``path`` is its name there."""

    def __init__(self, path: str, errno: int, doing: str) -> None:
        super().__init__(f"{doing} {path} in the guest: {os.strerror(errno)}")
        self.path = path
        self.errno = errno
