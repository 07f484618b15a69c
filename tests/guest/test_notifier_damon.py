"""Reads of present pages, seen by DAMON alone, which the guests' kernels have; and what it leaves behind."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from uspace_mm.errors import InputError, KernelError
from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.kernel.mapping import Mapping
from uspace_mm.kernel.proc import page_size, pmd_size
from uspace_mm.notifier import Ages, Evidence, Process
from uspace_mm.notifier._damon import ADMIN, Damon

PAGES = 64
PROT_READ = 1
KDAMONDS = ADMIN / "kdamonds"


def left() -> list[str]:
    """What is in sysfs: nothing but a count of 0 when there are no kdamonds."""
    return [(KDAMONDS / "nr_kdamonds").read_text().strip(), *sorted(os.listdir(KDAMONDS))]


def samples(ages: Ages) -> Evidence:
    return next(evidence for evidence in ages.evidence if evidence.name == "samples")


def read_all(memory: Mapping) -> None:
    """Read each page, after a change of protection, which drops the translations that CPUs hold."""
    libc = ctypes.CDLL(None, use_errno=True)
    for protection in (PROT_READ, PROT_READ | 2):
        assert libc.mprotect(ctypes.c_void_p(memory.address), ctypes.c_size_t(memory.length), protection) == 0
    assert int(memory.array[:: page_size()].sum()) == PAGES


def populated() -> Mapping:
    memory = Mapping(PAGES * page_size())
    if pmd_size() is not None:
        madvise(memory.address, memory.length, Advice.NOHUGEPAGE)
    memory.array[:] = 1
    # Brings the pages onto the LRU lists now: until then DAMON cannot mark them, and sees this use late.
    Path("/proc/sys/vm/drop_caches").write_text("1")
    return memory


def test_reads_are_seen_and_what_is_not_touched_is_not() -> None:
    assert left() == ["0", "nr_kdamonds"]
    with populated() as read, populated() as untouched:
        with Ages(read.address, read.address + read.length, touches=False, damon=True) as ages:
            assert samples(ages).seen, samples(ages).how
            assert not {"pages", "touches"} & {one.name for one in ages.evidence if one.seen}
            for _ in range(20):
                for _ in range(5):
                    read_all(read)
                    time.sleep(0.005)
                age = ages.look()
                if age.sampled and age.sampled_bytes:
                    break
            assert age.sampled
            assert age.sampled_bytes is not None
            assert 0 < age.sampled_bytes <= read.length
            assert age.referenced
            assert (age.written_bytes, age.used_bytes, age.touched) == (0, None, None)
            # DAMON is the machine's: a second object says that it is taken, and the first goes on.
            with Ages(untouched.address, untouched.address + 1, touches=False, damon=True) as second:
                assert "taken" in samples(second).how
            ages.look()  # ends the aggregation interval that the last reads were in
            age = ages.look()
            assert (age.sampled, age.sampled_bytes, age.referenced) == (False, 0, False)
        assert left() == ["0", "nr_kdamonds"]
        with pytest.raises(InputError, match="closed"):
            ages.look()
        with Ages(untouched.address, untouched.address + untouched.length, touches=False, damon=True) as ages:
            assert samples(ages).seen, samples(ages).how
            for _ in range(3):
                read_all(read)
                assert not ages.look().sampled
    assert left() == ["0", "nr_kdamonds"]


def test_idle_page_tracking_is_preferred() -> None:
    with populated() as memory, Ages(memory.address, memory.address + memory.length, touches=False) as ages:
        assert {one.name for one in ages.evidence if one.seen} == {"writes", "pages", "subscribers"}
        assert samples(ages).how == "idle page tracking is better"
        assert left() == ["0", "nr_kdamonds"]


def test_a_process_that_ends_and_one_that_never_was() -> None:
    code = "import sys\nprint(id(sys), flush=True)\nsys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        address = int(child.stdout.readline())
        with Process(child.pid, interval_s=None) as process:
            ages = Ages(address, address + 1, space=process, touches=False, damon=True)
            with ages:
                assert samples(ages).seen, samples(ages).how
                assert ages.look().sampled is not None
                child.stdin.close()
                child.wait()
                with pytest.raises(KernelError, match="kdamond|kdamonds"):
                    for _ in range(50):
                        ages.look()
    assert left() == ["0", "nr_kdamonds"]
    with pytest.raises(KernelError):
        Damon(child.pid, 0, page_size())
    assert left() == ["0", "nr_kdamonds"]


def test_what_nobody_closes_and_what_is_not_ours() -> None:
    with populated() as memory:
        damon = Damon(os.getpid(), memory.address, memory.address + memory.length)
        assert left() == ["1", "0", "nr_kdamonds"]
        del damon
        assert left() == ["0", "nr_kdamonds"]
        # Another user's that came in between stays as it is.
        damon = Damon(os.getpid(), memory.address, memory.address + memory.length)
        try:
            (KDAMONDS / "0/state").write_text("off")
            (KDAMONDS / "nr_kdamonds").write_text("2")
            with pytest.raises(KernelError, match="somebody else"):
                damon.take()
            damon.close()
            assert left() == ["2", "0", "1", "nr_kdamonds"]
        finally:
            (KDAMONDS / "nr_kdamonds").write_text("0")
