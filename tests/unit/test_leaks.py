"""The leak check that surrounds every test sees what it is there to see, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from tests.leaks import everything, left_behind


def test_nothing_is_reported_when_nothing_is_left(tmp_path: Path) -> None:
    before = everything(tmp_path)
    with open("/dev/null"), (tmp_path / "file").open("w"):
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        subprocess.run([sys.executable, "-c", ""], check=True)
    (tmp_path / "file").unlink()
    assert left_behind(before, tmp_path) == []


def test_a_descriptor_is_named_with_what_it_refers_to(tmp_path: Path) -> None:
    before = everything(tmp_path)
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        assert left_behind(before, tmp_path, 0) == [f"fd {fd} -> /dev/null"]
    finally:
        os.close(fd)


def test_a_thread_is_named(tmp_path: Path) -> None:
    before = everything(tmp_path)
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        (left,) = left_behind(before, tmp_path, 0)
        assert left.startswith(f"thread {thread.native_id} (")
    finally:
        end.set()
        thread.join()


def test_a_thread_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    before = everything(tmp_path)
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    timer = threading.Timer(0.1, end.set)
    timer.start()
    assert left_behind(before, tmp_path) == []
    thread.join()
    timer.join()


def test_children_are_named_dead_ones_too(tmp_path: Path) -> None:
    before = everything(tmp_path)
    reader, writer = os.pipe()
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=reader)
    os.close(reader)
    dead = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-c", ""])
    os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)
    try:
        left = left_behind(before, tmp_path, 0)
        assert f"child {dead}: a zombie" in left
        assert any(item.startswith(f"child {living.pid}: ") and "input()" in item for item in left)
    finally:
        os.close(writer)
        living.wait()
        os.waitpid(dead, 0)


def test_files_in_the_temporary_directory_and_in_shared_memory_are_named(tmp_path: Path) -> None:
    before = everything(tmp_path)
    temporary = tmp_path / "forgotten"
    shared = Path("/dev/shm") / f"uspace-mm-test-{os.getpid()}"
    temporary.touch()
    shared.touch()
    try:
        assert left_behind(before, tmp_path, 0) == sorted([f"file {shared}", f"file {temporary}"])
    finally:
        temporary.unlink()
        shared.unlink()
