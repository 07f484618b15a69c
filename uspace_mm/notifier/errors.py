"""What can go wrong with notifiers, beyond a value that cannot be used."""

from __future__ import annotations

from uspace_mm.errors import InputError, UspaceError


class NotifierError(UspaceError):
    """Base of the errors of this room."""


class WouldDeadlock(NotifierError):
    """Asked for in a callback, this would wait for the callback itself."""


class Released(NotifierError):
    """The address space is gone: its ``release`` was told already."""


class ForkedAway(NotifierError):
    """A registration of the process that this one was forked from: it hears nothing of this one's memory."""


class ReadTimeout(NotifierError, TimeoutError):
    """A change of the interval was under way for longer than the caller would wait."""


class TryAgain(NotifierError):
    """The change was not made: a subscriber would have to wait, or is late and must not be passed over."""


class NoProcess(NotifierError, InputError):
    """There is no such process, or it has no memory that could be watched."""
