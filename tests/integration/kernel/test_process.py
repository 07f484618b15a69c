"""Other processes, and this one's own attributes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from uspace_mm.errors import InputError, KernelError
from uspace_mm.kernel import mapping as m
from uspace_mm.kernel import prctl, proc
from uspace_mm.kernel.madvise import Advice
from uspace_mm.kernel.pagemap import (
    Pagemap,
)
from uspace_mm.kernel.process import (
    PidfdFlag,
    pidfd_getfd,
    pidfd_open,
    process_madvise,
    process_read,
    process_readv,
    process_write,
    process_writev,
)

PAGE = proc.page_size()
PMD = proc.pmd_size()


SLEEPER_BYTES = 4 * PAGE


def sleeper() -> subprocess.Popen[bytes]:
    """A process with SLEEPER_BYTES of "Z", whose address it prints."""
    script = (
        f"import sys, ctypes, mmap; m = mmap.mmap(-1, {SLEEPER_BYTES}, flags=mmap.MAP_PRIVATE);"
        f"m[:] = b'Z' * {SLEEPER_BYTES}; b = (ctypes.c_char * 1).from_buffer(m);"
        "print(ctypes.addressof(b), flush=True); sys.stdin.read()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )


CAP_SYS_NICE = 23


def has_capability(number: int) -> bool:
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))
    return bool(int(effective, 16) >> number & 1)


def test_another_process_is_read_written_and_advised() -> None:
    with sleeper() as child:
        assert child.stdin and child.stdout
        address = int(child.stdout.readline())
        pidfd = pidfd_open(child.pid)
        try:
            into = bytearray(SLEEPER_BYTES)
            assert process_read(child.pid, address, into) == SLEEPER_BYTES
            assert into == b"Z" * SLEEPER_BYTES
            assert process_write(child.pid, address, b"changed") == 7
            assert process_read(child.pid, address, memoryview(into)[:8]) == 8
            assert into[:8] == b"changedZ"
            scattered = [(address + PAGE, 3), (address, 8)]
            assert process_writev(child.pid, scattered, b"abcdefghijk") == 11
            assert process_readv(child.pid, scattered[::-1], memoryview(into)[:11]) == 11
            assert into[:11] == b"defghijkabc"
            with pytest.raises(InputError, match="the ranges are 11 bytes, the buffer is 4"):
                process_writev(child.pid, scattered, b"four")
            page = address
            with Pagemap(child.pid) as pagemap:
                assert pagemap.present(page, PAGE).all()
            names = {entry.name for entry in proc.smaps(child.pid)}
            assert "[stack]" in names
            with pytest.raises(KernelError, match="not mapped in the process"):
                process_read(child.pid, 0, into)
            if not has_capability(CAP_SYS_NICE):
                pytest.skip("lacks: CAP_SYS_NICE, to advise another process")
            assert process_madvise(pidfd, [(page, PAGE), (page + PAGE, PAGE)], Advice.COLD) == 2 * PAGE
            with pytest.raises(KernelError) as caught:
                process_madvise(pidfd, [(page, PAGE)], Advice.DONTNEED)
            assert caught.value.errno in (errno.EINVAL, errno.EPERM)
        finally:
            os.close(pidfd)
            child.kill()


def test_a_read_that_ends_at_a_hole_is_short() -> None:
    with m.Mapping(2 * PAGE) as mapping:
        mapping.array[:] = 3
        m.unmap(mapping.address + PAGE, PAGE)
        into = np.zeros(2 * PAGE, np.uint8)
        assert process_read(os.getpid(), mapping.address, into) == PAGE
        assert (into[:PAGE] == 3).all() and not into[PAGE:].any()


def test_a_pidfd_outlives_its_process_and_says_so() -> None:
    with sleeper() as child:
        pidfd = pidfd_open(child.pid, PidfdFlag.NONBLOCK)
        try:
            child.kill()
            child.wait()
            with pytest.raises(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            with pytest.raises(KernelError, match="no such process"):
                pidfd_getfd(pidfd, 0)
            with pytest.raises(KernelError, match="no such process"):
                process_madvise(pidfd, [(PAGE, PAGE)], Advice.COLD)
        finally:
            os.close(pidfd)
        with pytest.raises(KernelError):
            proc.smaps(child.pid)


def test_a_descriptor_of_another_process_is_the_same_file() -> None:
    with sleeper() as child:
        pidfd = pidfd_open(child.pid)
        try:
            taken = pidfd_getfd(pidfd, 1)
            try:
                assert os.fstat(taken).st_ino == Path(f"/proc/{child.pid}/fd/1").stat().st_ino
                assert not os.get_inheritable(taken)
            finally:
                os.close(taken)
            with pytest.raises(KernelError) as caught:
                pidfd_getfd(pidfd, 900)
            assert caught.value.errno == errno.EBADF
        finally:
            os.close(pidfd)
            child.kill()


def test_thp_mode_is_told_by_status_and_put_back() -> None:
    before = prctl.thp_mode()

    def status() -> str:
        text = Path("/proc/self/status").read_text()
        return next(line.split()[1] for line in text.splitlines() if line.startswith("THP_enabled"))

    with prctl.thp_mode_changed(prctl.ThpMode.DISABLED):
        assert prctl.thp_mode() is prctl.ThpMode.DISABLED
        assert status() == "0"
    assert prctl.thp_mode() is before
    try:
        with prctl.thp_mode_changed(prctl.ThpMode.EXCEPT_ADVISED):
            assert prctl.thp_mode() is prctl.ThpMode.EXCEPT_ADVISED
            raise ZeroDivisionError
    except KernelError as error:
        assert "6.18" in str(error)
        pytest.skip("lacks: PR_THP_DISABLE_EXCEPT_ADVISED")
    except ZeroDivisionError:
        pass
    assert prctl.thp_mode() is before


def test_dumpable_is_read_and_set() -> None:
    assert prctl.dumpable()
    prctl.set_dumpable(False)
    try:
        assert not prctl.dumpable()
    finally:
        prctl.set_dumpable(True)
