"""Every error this package raises on purpose: one base class, one subclass per kind of failure.

The command line turns the class into an exit status: 1 the thing asked about is not so, 2 bad usage or
input, 3 this machine cannot.
"""

from __future__ import annotations

import errno as _errno
import os


class UspaceError(Exception):
    """Base of all errors of this package. ``exit_status`` is what the command line exits with."""

    exit_status = 1


class InputError(UspaceError, ValueError):
    """A value that the caller gave cannot be used; the message says which and what would do."""

    exit_status = 2


class UnsupportedError(UspaceError):
    """This machine lacks a feature or a right; the message names it and the remedy."""

    exit_status = 3


class KernelError(UspaceError, OSError):
    """A system call failed. ``call``, ``address`` and ``length`` say which and on what; ``errno`` why."""

    def __init__(
        self,
        call: str,
        error: int,
        *,
        address: int | None = None,
        length: int | None = None,
        hint: str = "",
    ) -> None:
        error = abs(error)
        where = "" if address is None else f" at {address:#x}"
        if length is not None:
            where += f", {length} bytes"
        name = _errno.errorcode.get(error, str(error))
        text = f"{call}{where}: {os.strerror(error)} [{name}]" + (f"; {hint}" if hint else "")
        super().__init__(error, text)
        self.call = call
        self.address = address
        self.length = length

    def __str__(self) -> str:
        return str(self.args[1])
