"""What a guest promises to the tests in it, from inside; on the host there is nothing to ask."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from uspace_mm.guest.pagesize import PageSize, parse_page_size

pytestmark = pytest.mark.skipif(
    "UMM_GUEST_PAGE_SIZE" not in os.environ, reason="lacks: a guest (it runs there)"
)

AT_PAGESZ = 6


@pytest.fixture(scope="module")
def asked() -> PageSize:
    return parse_page_size(os.environ["UMM_GUEST_PAGE_SIZE"])


def test_pages_have_the_size_asked_for(asked: PageSize) -> None:
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype = ctypes.c_ulong
    assert getauxval(AT_PAGESZ) == asked.bytes
    assert os.sysconf("SC_PAGE_SIZE") == mmap.PAGESIZE == asked.bytes
    said = subprocess.run(["getconf", "PAGESIZE"], capture_output=True, text=True, check=True)
    assert int(said.stdout) == asked.bytes


def test_the_kernel_maps_pages_of_that_size(asked: PageSize) -> None:
    with mmap.mmap(-1, 4 * asked.bytes) as memory:
        resident = (ctypes.c_ubyte * 4)()
        first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        memory[2 * asked.bytes] = 1
        assert (
            ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(first), 4 * asked.bytes, resident) == 0
        )
        assert [cell & 1 for cell in resident] == [0, 0, 1, 0]
        assert first % asked.bytes == 0


def test_a_huge_page_is_what_a_pmd_maps(asked: PageSize) -> None:
    size = int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    assert size == asked.pmd_bytes
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert int(fields["Hugepagesize"].split()[0]) << 10 == asked.pmd_bytes


def test_it_is_an_arm64_linux_with_the_features_asked_for() -> None:
    assert platform.machine() == "aarch64" and sys.platform == "linux"
    assert Path("/sys/kernel/mm/ksm/run").exists()
    assert "userfaultfd" in Path("/proc/kallsyms").read_text()
    assert {"memory"} <= set(Path("/sys/fs/cgroup/cgroup.controllers").read_text().split())


def test_the_report_descriptor_is_out_of_the_way() -> None:
    assert "UMM_REPORT_FD" not in os.environ
    inherited = subprocess.run(
        [sys.executable, "-c", "import os; print(*sorted(map(int, os.listdir('/proc/self/fd'))))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert max(map(int, inherited.stdout.split())) <= 3, (
        "a child has its own three, and the one that lists them"
    )


def test_files_can_be_written_everywhere(tmp_path: Path) -> None:
    for folder in (Path.cwd(), tmp_path, Path("/usr"), Path("/dev/shm")):
        path = folder / "written-by-a-test"
        path.write_bytes(b"x" * 100_000)
        assert path.read_bytes() == b"x" * 100_000
        path.unlink()


def test_the_clock_is_the_hosts() -> None:
    # The host made this file's copy moments ago, or copied an older one.
    assert time.time() > Path(__file__).stat().st_mtime - 60
