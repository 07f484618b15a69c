"""System calls that touch missing pages: the kernel's own faults bring them in, or fail with EFAULT."""

from __future__ import annotations

import errno
import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from uspace_mm.kernel.proc import page_size
from uspace_mm.pager import Pager
from uspace_mm.stores import FileStore, MemoryStore

NOBODY = 65534
PAGE = page_size()
PAGES = 16
SIZE = PAGES * PAGE
EXPECTED = (np.arange(SIZE, dtype=np.uint64) * 31 % 251).astype(np.uint8)


@pytest.fixture
def kernel_faults() -> None:
    allowed = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1"
    if os.geteuid() and not allowed and not os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        pytest.skip("lacks: the right to serve the kernel's own faults")


@pytest.mark.usefixtures("kernel_faults")
@pytest.mark.parametrize("move", [True, False], ids=["move", "copy"])
def test_write_reads_missing_pages(tmp_path: Path, move: bool) -> None:
    file = tmp_path / "store"
    file.write_bytes(EXPECTED.tobytes())
    copy = tmp_path / "copy"
    with Pager(8 * PAGE, move=move) as pager, pager.map(FileStore(file)) as region:
        for _ in range(3):
            with copy.open("wb", buffering=0) as out:
                assert out.write(region.view()) == SIZE
            assert copy.read_bytes() == EXPECTED.tobytes()
            region.evict()
        with copy.open("r+b", buffering=0) as out:
            view = region.view()
            assert os.pwritev(out.fileno(), [view[: PAGE + 3], view[-5:]], 7) == PAGE + 8
            del view
        assert copy.read_bytes()[7 : PAGE + 15] == EXPECTED[: PAGE + 3].tobytes() + EXPECTED[-5:].tobytes()
        assert region.stats().counters.faults >= 3 * PAGES


@pytest.mark.usefixtures("kernel_faults")
@pytest.mark.parametrize("move", [True, False], ids=["move", "copy"])
def test_read_writes_into_missing_pages(tmp_path: Path, move: bool) -> None:
    file = tmp_path / "source"
    source = (255 - EXPECTED).tobytes()
    file.write_bytes(source)
    expected = EXPECTED.copy()
    with Pager(8 * PAGE, move=move) as pager, pager.map(MemoryStore(EXPECTED.copy())) as region:
        view = region.view()
        with io.FileIO(file) as opened:
            # From the middle of one page to the middle of another: what is around it is the store's.
            assert opened.readinto(view[100 : 2 * PAGE + 200]) == 2 * PAGE + 100
            expected[100 : 2 * PAGE + 200] = np.frombuffer(source, np.uint8)[: 2 * PAGE + 100]
            region.evict()
            parts = [view[4 * PAGE + 1 : 5 * PAGE - 1], view[6 * PAGE - 3 : 6 * PAGE + 3]]
            assert os.preadv(opened.fileno(), parts, 50) == PAGE + 4
            taken = np.frombuffer(source, np.uint8)[50 : 50 + PAGE + 4]
            expected[4 * PAGE + 1 : 5 * PAGE - 1] = taken[: PAGE - 2]
            expected[6 * PAGE - 3 : 6 * PAGE + 3] = taken[PAGE - 2 :]
            del parts
        assert (region.array() == expected).all()
        region.evict()
        assert (region.array() == expected).all()
        del view


@pytest.mark.usefixtures("kernel_faults")
def test_sockets_send_from_and_receive_into_missing_pages() -> None:
    zeros = np.zeros(SIZE, np.uint8)
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        Pager(8 * PAGE) as pager,
        pager.map(MemoryStore(EXPECTED.copy())) as source,
        pager.map(MemoryStore(zeros)) as target,
    ):
        for start in range(0, SIZE, PAGE):
            piece = slice(start, start + PAGE)
            ours.sendall(source.view()[piece])
            received = 0
            while received < PAGE:
                received += theirs.recv_into(target.view()[start + received : start + PAGE])
        target.evict()
        assert (target.array() == EXPECTED).all()
        assert (source.array() == EXPECTED).all()


# What a call does to missing memory when its faults cannot be served; then the bytes by plain accesses.
EFAULT_CALLS = """
import errno, os, signal, socket, sys
import numpy as np
from uspace_mm.kernel.proc import page_size
from uspace_mm.kernel.userfaultfd import Source
from uspace_mm.pager import Pager
from uspace_mm.stores import MemoryStore

in_thread, user, source = sys.argv[1] == "1", int(sys.argv[2]), Source[sys.argv[3]]
signal.alarm(20)
if os.geteuid() == 0 and user:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
page = page_size()
expected = (np.arange(16 * page, dtype=np.uint64) % 253).astype(np.uint8)
with Pager(in_thread=in_thread, source=source) as pager, pager.map(MemoryStore(expected.copy())) as region:
    region.advise("random")
    view = region.view()
    read_end, write_end = os.pipe()
    ours, theirs = socket.socketpair()
    os.write(write_end, b"x" * 64)
    ours.send(b"y" * 64)
    calls = {
        "write": lambda: os.write(write_end, view[page : page + 64]),
        "readv": lambda: os.readv(read_end, [view[3 * page : 3 * page + 64]]),
        "send": lambda: ours.send(view[5 * page : 5 * page + 64]),
        "recv": lambda: theirs.recv_into(view[7 * page : 7 * page + 64]),
    }
    for name, call in calls.items():
        try:
            done = call()
        except OSError as error:
            assert error.errno == errno.EFAULT, (name, error)
        else:
            raise AssertionError(f"{name}: {done} bytes, expected EFAULT")
    array = region.array()
    assert (array == expected).all()
    # In place, the same memory is as good as any.
    assert calls["write"]() == 64
    assert os.read(read_end, 256)[-64:] == expected[page : page + 64].tobytes()
    del view, array, calls, call
    for end in (read_end, write_end):
        os.close(end)
    ours.close()
    theirs.close()
print("EFAULT")
"""


def _expect_efault(in_thread: bool, user: int, source: str) -> None:
    arguments = [str(int(in_thread)), str(user), source]
    run = subprocess.run(
        [sys.executable, "-c", EFAULT_CALLS, *arguments], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "EFAULT\n"


def test_an_ordinary_users_system_calls_fail_with_efault() -> None:
    _expect_efault(False, NOBODY if os.geteuid() == 0 else 0, "USER_MODE")


def test_in_the_in_thread_mode_system_calls_fail_with_efault() -> None:
    _expect_efault(True, 0, "ANY")


@pytest.mark.usefixtures("kernel_faults")
def test_a_lost_page_is_an_error_of_the_call_not_zeros(tmp_path: Path) -> None:
    file = tmp_path / "store"
    file.write_bytes(EXPECTED.tobytes())
    out = tmp_path / "out"
    with Pager() as pager, pager.map(FileStore(file)) as region, out.open("wb", buffering=0) as opened:
        region.advise("random")
        os.truncate(file, SIZE // 2)
        with pytest.raises(OSError) as caught:
            os.write(opened.fileno(), region.view()[SIZE // 2 :])
        assert caught.value.errno == errno.EFAULT
        assert out.read_bytes() == b""
        assert (region.array()[: SIZE // 2] == EXPECTED[: SIZE // 2]).all()
