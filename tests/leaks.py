"""What a process can leave behind: descriptors, threads, children, temporary files and shared memory."""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path

SETTLE_S = 3.0
SHARED_MEMORY = Path("/dev/shm")


def descriptors() -> set[str]:
    """Open descriptors with what they refer to, e.g. ``fd 12 -> anon_inode:[userfaultfd]``."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
        found.add(f"fd {entry} -> {target}")
    return found


def threads() -> set[str]:
    """Threads of this process, those that Python does not know of included."""
    return {f"thread {tid}" for tid in os.listdir("/proc/self/task")}


def children() -> set[str]:
    """Child processes, zombies included, except multiprocessing's own servants, which outlive their users."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            pids = (task / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for pid in pids:
            try:
                command = (
                    Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except (FileNotFoundError, ProcessLookupError):
                continue
            if "multiprocessing.resource_tracker" not in command:
                found.add(f"child {pid}: {command.strip() or 'a zombie'}")
    return found


def is_held_by_others(path: Path) -> bool:
    """Whether a process that is not of ours has the file open or mapped."""
    own = os.getpid()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == own:
            continue
        try:
            for fd in os.listdir(f"/proc/{entry}/fd"):
                if os.readlink(f"/proc/{entry}/fd/{fd}") == str(path):
                    return True
            if str(path) in Path(f"/proc/{entry}/maps").read_text():
                return True
        except (OSError, UnicodeDecodeError):
            continue
    return False


def files(temporary: Path) -> set[str]:
    """What lies in our temporary directory, and our files in /dev/shm."""
    found = {f"file {entry}" for entry in temporary.iterdir() if not entry.name.startswith("matplotlib-")}
    if SHARED_MEMORY.is_dir():
        for entry in SHARED_MEMORY.iterdir():
            try:
                if entry.stat().st_uid == os.getuid():
                    found.add(f"file {entry}")
            except FileNotFoundError:
                continue
    return found


def everything(temporary: Path) -> set[str]:
    return descriptors() | threads() | children() | files(temporary)


def stop_forkserver() -> None:
    """multiprocessing's fork server stays for good once used; its own tests end it the same way."""
    module = sys.modules.get("multiprocessing.forkserver")
    if module is not None and module._forkserver._forkserver_pid is not None:
        module._forkserver._stop()


def left_behind(before: set[str], temporary: Path, settle_s: float = SETTLE_S) -> list[str]:
    """What is there now and was not before, by name; what is just ending gets `settle_s` seconds to do so."""
    left = everything(temporary) - before
    if left:
        stop_forkserver()
        gc.collect()
    deadline = time.monotonic() + settle_s
    while (left := everything(temporary) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    shm = f"file {SHARED_MEMORY}/"
    return sorted(
        named(item)
        for item in left
        if not (item.startswith(shm) and is_held_by_others(Path(item.removeprefix("file "))))
    )


def named(item: str) -> str:
    """A thread with its name: threads may name themselves late, so they are compared by number alone."""
    if not item.startswith("thread "):
        return item
    try:
        return f"{item} ({Path(f'/proc/self/task/{item.split()[1]}/comm').read_text().strip()})"
    except (FileNotFoundError, ProcessLookupError):
        return item
