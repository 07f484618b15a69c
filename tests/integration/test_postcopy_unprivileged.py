"""Postcopy without rights: as a user who may open user-mode userfaultfds at most."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

NOBODY = 65534

# Imports come first: the package may lie where only its owner can read.
MOVE = """
import os, sys, threading, socket, mmap
import numpy as np
from uspace_mm.kernel.prctl import set_dumpable
from uspace_mm.postcopy.receiver import Receiver
from uspace_mm.postcopy.sender import Sender

if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({nobody})
    os.setuid({nobody})
    set_dumpable(True)  # or /proc/self/pagemap would still be root's

page = mmap.PAGESIZE
memory = np.frombuffer(mmap.mmap(-1, 64 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
memory[: 40 * page] = np.arange(40 * page) % 251
sender, receiver = Sender(memory), Receiver()
for _ in range(2):
    ours, theirs = socket.socketpair()
    accepting = threading.Thread(target=sender.accept, args=(ours,))
    accepting.start()
    receiver.connect(theirs, 1 << 30)
    accepting.join()
receiving = threading.Thread(target=receiver.precopy)
receiving.start()
sender.round()
memory[:: 3 * page] += 1
sender.switch(1, b"state")
receiving.join()
arrived = receiver.enter()
receiver.running()
serving = threading.Thread(target=sender.serve)
serving.start()
assert (arrived[::-1] == memory[::-1]).all()
assert receiver.await_complete(10)
serving.join()
stats = receiver.stats()
assert stats["verified"] == 64 and stats["missing_pages"] == 22, stats
receiver.close()
sender.close()
print("moved as", os.geteuid())
"""


def test_an_ordinary_user_can_move_memory() -> None:
    user = os.geteuid() or NOBODY
    run = subprocess.run(
        [sys.executable, "-c", MOVE.format(nobody=NOBODY)], capture_output=True, text=True, timeout=60
    )
    if "UnsupportedError" in run.stderr:
        pytest.skip(f"lacks: {run.stderr.splitlines()[-1]}")
    assert (run.stdout, run.stderr) == (f"moved as {user}\n", "")
