"""No room: a full disk, a full spill directory, a file size limit, and a memory cgroup.

Each in a child process with a mount namespace of its own, so that nothing stays mounted whatever happens.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

TIMEOUT_S = 60

PRELUDE = """
import errno, os, resource, subprocess, sys, time
import numpy as np
from uspace_mm.errors import KernelError
from uspace_mm.pager import Pager
from uspace_mm.stores import FileStore, MemoryStore

DISK = sys.argv[1]

def mount(size):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", DISK], check=True)

def make_room(size):
    subprocess.run(["mount", "-o", f"remount,size={size}", DISK], check=True)

def refused(call, error):
    try:
        call()
    except KernelError as caught:
        assert caught.errno == error, caught
        assert errno.errorcode[error] in str(caught), caught
        return str(caught)
    raise AssertionError("nothing was refused")

def does_not_spin():
    # The evictor may try again, but has to sleep in between. Of CPU time a busy machine takes no more.
    time.sleep(0.1)
    before, wall = time.process_time(), time.monotonic()
    time.sleep(0.4)
    used = (time.process_time() - before) / (time.monotonic() - wall)
    assert used < 0.5, f"{used:.0%} of a CPU though nobody faults"
"""


def run(script: str, *arguments: str | Path, namespace: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
    if namespace:
        command = ["unshare", "--mount", "--propagation", "private", *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def succeeds(script: str, *arguments: str | Path, namespace: bool = True) -> None:
    done = run(script, *arguments, namespace=namespace)
    assert (done.returncode, done.stdout.strip()) == (0, "ok"), done.stdout + done.stderr


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    if shutil.which("unshare") is None:
        pytest.skip("lacks: unshare(1)")
    directory = tmp_path / "disk"
    directory.mkdir()
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", str(directory)]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("lacks: the right to mount (CAP_SYS_ADMIN)")
    return directory


@pytest.mark.parametrize("budget", ["None", "'1M'"], ids=["no budget", "1M"])
@pytest.mark.parametrize("move", ["True", "False"], ids=["move", "copy"])
def test_a_full_disk_refuses_and_nothing_is_lost(disk: Path, budget: str, move: str) -> None:
    script = f"""
mount("2M")
path = DISK + "/data"
SIZE = 4 << 20
with open(path, "wb") as file:
    file.truncate(SIZE)
with open(DISK + "/filler", "wb") as file:
    file.write(bytes(1536 << 10))
expected = np.arange(1, SIZE // 8 + 1, dtype=np.uint64)
with Pager({budget}, move={move}) as pager, pager.map(FileStore(path, mode="writeback")) as region:
    array = region.array(np.uint64)
    array[:] = expected
    text = refused(region.flush, errno.ENOSPC)
    assert text.startswith("write back to the store at 0x"), text
    assert (array == expected).all()
    refused(region.evict, errno.ENOSPC)
    assert pager.stats().counters.evict_failed > 0
    assert (array == expected).all()
    does_not_spin()
    array[7] = expected[7] = 5
    os.unlink(DISK + "/filler")
    refused(region.flush, errno.ENOSPC)  # some room is not enough
    make_room("8M")
    region.flush()
    assert open(path, "rb").read() == expected.tobytes()
    region.evict()
    assert (array == expected).all()
    del array
assert open(path, "rb").read() == expected.tobytes()
print("ok")
"""
    succeeds(script, disk)


@pytest.mark.parametrize("in_thread", ["False", "True"], ids=["handlers", "in thread"])
@pytest.mark.parametrize("move", ["True", "False"], ids=["move", "copy"])
def test_a_full_spill_directory_keeps_everything_resident(disk: Path, move: str, in_thread: str) -> None:
    script = f"""
mount("1M")
os.environ["TMPDIR"] = DISK
SIZE = 8 << 20
expected = np.arange(1, SIZE // 8 + 1, dtype=np.uint64)
with Pager("2M", move={move}, in_thread={in_thread}) as pager:
    with pager.map(MemoryStore(np.zeros(SIZE, np.uint8))) as region:
        array = region.array(np.uint64)
        array[:] = expected
        assert (array == expected).all()
        refused(region.evict, errno.ENOSPC)
        c = pager.stats().counters
        assert c.evict_failed > 0 and 0 < c.spill_bytes <= 1 << 20, c
        assert (array == expected).all()
        does_not_spin()
        array[::512] += np.uint64(3)
        expected[::512] += np.uint64(3)
        assert (array == expected).all()
        make_room("32M")
        region.evict()
        assert region.stats().counters.resident_bytes == 0
        assert region.stats().counters.spill_bytes == SIZE
        assert (array == expected).all()
        for _ in range(3):
            array[::512].sum()
            for _ in range(200):
                if pager.stats().counters.resident_bytes <= 2 << 20:
                    break
                time.sleep(0.05)
            else:
                raise AssertionError("the budget is not kept again")
        del array
print("ok")
"""
    succeeds(script, disk)


def test_a_file_size_limit_is_an_error_not_a_signal(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"")
    os.truncate(path, 4 << 20)
    script = """
SIZE = 4 << 20
expected = np.arange(1, SIZE // 8 + 1, dtype=np.uint64)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # Python ignores SIGXFSZ
with Pager("1M") as pager, pager.map(FileStore(DISK, mode="writeback")) as region:
    array = region.array(np.uint64)
    array[:] = expected
    refused(region.flush, errno.EFBIG)
    assert (array == expected).all()
    assert open(DISK, "rb").read()[: 1 << 20] == expected.tobytes()[: 1 << 20]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    region.flush()
    assert (array == expected).all()
    del array
assert open(DISK, "rb").read() == expected.tobytes()
print("ok")
"""
    succeeds(script, path, namespace=False)


def own_group(controller: str) -> Path | None:
    """This process's directory in a cgroup v1 hierarchy with the controller."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        for mounted in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = mounted.partition(" - ")
            if after.startswith("cgroup ") and controller in after.split()[2].split(","):
                return Path(before.split()[4]) / path.lstrip("/")
    return None


def new_group() -> tuple[Path, str]:
    """A new memory cgroup and the name of its limit."""
    group = own_group("memory")
    if group is not None:
        new = group / f"umm-test-{os.getpid()}"
        new.mkdir()
        return new, "memory.limit_in_bytes"
    root = Path("/sys/fs/cgroup")
    if "memory" not in (root / "cgroup.subtree_control").read_text().split():
        raise OSError(errno.ENOTSUP, "no memory controller")
    new = root / f"umm-test-{os.getpid()}"
    new.mkdir()
    return new, "memory.max"


@pytest.fixture
def limited() -> Iterator[Path]:
    """A memory cgroup of 64 MiB."""
    try:
        group, limit = new_group()
    except OSError as error:
        pytest.skip(f"lacks: a memory cgroup that this user may divide ({error})")
    try:
        (group / limit).write_text(str(64 << 20))
        if (swap := group / "memory.swap.max").exists():
            swap.write_text("0")
        yield group
    finally:
        for _ in range(100):
            try:
                group.rmdir()
                break
            except OSError:  # the last process is still going
                time.sleep(0.05)


@pytest.mark.parametrize("budget", ["None", "'16M'"], ids=["no budget", "16M"])
def test_a_budget_keeps_below_a_memory_limit(limited: Path, tmp_path: Path, budget: str) -> None:
    path = tmp_path / "data"
    words = np.arange(1, (96 << 20) // 8 + 1, dtype=np.uint64)
    words.tofile(path)
    script = f"""
with open(sys.argv[2] + "/cgroup.procs", "w") as procs:
    procs.write(str(os.getpid()))
STEP = (1 << 20) // 8
with Pager({budget}) as pager, pager.map(FileStore(DISK)) as region:
    array = region.array(np.uint64)
    try:
        for first in range(0, len(array), STEP):
            region.populate(first * 8, (first + STEP) * 8)
            expected = np.arange(first + 1, first + STEP + 1, dtype=np.uint64)
            assert (array[first : first + STEP] == expected).all(), first
    except KernelError as caught:
        print(caught)
        sys.exit(9)
    del array
print("ok")
"""
    done = run(script, path, limited, namespace=False)
    if budget == "None":
        assert done.returncode in (-signal.SIGKILL, -signal.SIGBUS, 9), done.stdout + done.stderr
    else:
        assert (done.returncode, done.stdout.strip()) == (0, "ok"), done.stdout + done.stderr


def test_a_region_that_was_forgotten_keeps_its_store(tmp_path: Path) -> None:
    script = """
import gc
SIZE = 8 << 20

def forgotten(**options):
    words = np.full(SIZE // 8, 7, np.uint64)
    return Pager("2M", **options).map(MemoryStore(words)).array(np.uint64)

arrays = [forgotten(in_thread=in_thread, move=move) for in_thread in (0, 1) for move in (0, 1)]
gc.collect()
for array in arrays:
    assert (array == 7).all()
    array[:] = 5
    assert (array == 5).all()
print("ok")  # and the evictors are at work as the interpreter ends
"""
    succeeds(script, tmp_path, namespace=False)
