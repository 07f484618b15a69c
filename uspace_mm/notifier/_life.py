"""What has to be done for all notifiers at once: at a fork, and when the interpreter ends.

One lock guards the bookkeeping of this room. It is never held while something waits for a callback. A fork
takes it, so that a child finds nothing half done under it. It is reentrant for the sake of finalizers.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from typing import Protocol

from uspace_mm._native import lib

lock = threading.RLock()
# How long callbacks that do not return hold up the interpreter's end, in all, after each one's wait_s.
_LONGEST_EXIT_S = 1.0


class Servant(Protocol):
    """What has a thread."""

    def after_fork(self) -> None:
        """In the child: the thread is not there."""

    def at_exit(self, deadline: float) -> None:
        """Stop, by time.monotonic() `deadline` at the latest."""


_servants: weakref.WeakSet[Servant] = weakref.WeakSet()


def register(servant: Servant) -> None:
    """Have `servant` told of forks and of the end, as long as it lives."""
    _servants.add(servant)


def _after_fork() -> None:
    lock.release()
    for servant in list(_servants):
        servant.after_fork()
    _servants.clear()


def _at_exit() -> None:
    # Daemon threads still run now, and the memory is still there: release comes before it goes.
    if lib.umm_space_subscriptions(lib.umm_space_self()):
        lib.umm_space_release(
            lib.umm_space_self(), lib.UMM_SOURCE_PROCESS, lib.UMM_REASON_EXIT, lib.UMM_PROMISE_ORDERED
        )
    deadline = time.monotonic() + _LONGEST_EXIT_S
    for servant in list(_servants):
        servant.at_exit(deadline)


os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=_after_fork)
atexit.register(_at_exit)
