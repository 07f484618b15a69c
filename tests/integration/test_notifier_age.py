"""Was memory used? By which evidence, and what is said where there is none."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from uspace_mm.errors import InputError
from uspace_mm.kernel import page_idle
from uspace_mm.kernel.features import probe_all
from uspace_mm.kernel.mapping import Mapping
from uspace_mm.notifier import Event, Notifier, Process, register
from uspace_mm.notifier.age import Age, Ages
from uspace_mm.pager import Pager
from uspace_mm.stores import ZeroStore

PAGE = mmap.PAGESIZE


def lacks(*names: str) -> None:
    here = {probe.name for probe in probe_all() if probe.present}
    if missing := sorted(set(names) - here):
        pytest.skip(f"lacks: {', '.join(missing)}")


def seen(ages: Ages) -> dict[str, bool]:
    return {evidence.name: evidence.seen for evidence in ages.evidence}


def test_writes_are_seen_page_by_page() -> None:
    lacks("WP_ASYNC", "PAGEMAP_SCAN")
    with Mapping(16 * PAGE) as memory:
        memory.array[:] = 1
        with Ages(memory.address, memory.address + 8 * PAGE, touches=False, damon=False) as ages:
            here = {"pages": page_idle.BITMAP.exists(), "samples": False, "touches": False, "refaults": False}
            assert seen(ages) == {"writes": True, "subscribers": True} | here
            assert ages.look().written_bytes == 0
            memory.array[3 * PAGE] = 2
            memory.array[5 * PAGE + 7] = 2
            memory.array[9 * PAGE] = 2  # elsewhere
            age = ages.look()
            assert age.written_bytes == 2 * PAGE
            assert age.referenced
            assert ages.look().written_bytes == 0
            assert int(memory.array[3 * PAGE]) == 2  # a read is no write
            assert ages.look().written_bytes == 0


def test_reads_are_seen_by_accessed_bits() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("lacks: CONFIG_PROC_PAGE_MONITOR")
    # Between guards: what the accessed bits are asked for is a mapping, and neighbours would be one with it.
    with Mapping(66 * PAGE) as memory:
        inside = memory.address + PAGE
        for edge in (memory.address, memory.address + 65 * PAGE):
            protect_none(edge)
        memory.array[PAGE : 65 * PAGE] = 1
        with Ages(inside, inside + 64 * PAGE) as first, Ages(inside, inside + PAGE) as second:
            assert seen(first)["touches"]
            # A CPU may still hold the translations: new ones are looked up after a while.
            assert any(touch(memory, first) for _ in range(100))
            assert second.look().touched, "what one object cleared, the other one saw"
            assert not second.look().touched
            assert not first.look().touched


def protect_none(address: int) -> None:
    import ctypes

    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), PAGE, 0) == 0


def touch(memory: Mapping, ages: Ages) -> bool:
    int(memory.array[PAGE : 65 * PAGE : PAGE].sum())
    return bool(ages.look().touched)


def test_another_process() -> None:
    code = "import sys\nm = bytearray(1 << 20)\nfor line in sys.stdin: m[:] = m; print(1, flush=True)"
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        with (
            Process(child.pid, interval_s=None) as process,
            Ages(0, 1 << 47, space=process, damon=False) as ages,
        ):
            assert [name for name, there in seen(ages).items() if there] == ["touches"]
            assert ages.evidence[1].how == "a range above 1 GiB"
            assert "another process" in ages.evidence[0].how
            child.stdin.write("\n")
            child.stdin.flush()
            child.stdout.readline()
            age = ages.look()
            assert age.touched
            assert (age.written_bytes, age.refaults, age.subscribers) == (None, None, None)
        child.kill()


def test_faults_of_a_region() -> None:
    with Pager() as pager, pager.map(ZeroStore(16 * PAGE)) as region:
        array = region.array()
        with Ages(region, touches=False) as ages:
            assert seen(ages)["refaults"]
            # Its memory is the pager's to watch: why writes are not seen is said.
            assert seen(ages)["writes"] is False
            assert "EBUSY" in ages.evidence[0].how
            array[0] = 1
            assert ages.look().refaults == 1
            assert ages.look().refaults == 0
            region.evict()
            assert int(array[0]) == 1
            assert ages.look().referenced
        del array


def test_subscribers_are_asked() -> None:
    class Using(Notifier):
        used = True

        def age(self, event: Event) -> bool:
            return self.used

    memory = np.zeros(100, np.uint8)
    using = Using()
    with Ages(memory, touches=False) as ages:
        assert ages.look().subscribers is None
        with register(using, memory):
            assert ages.look().subscribers is True
            using.used = False
            assert ages.look().subscribers is False


def test_what_cannot_be_watched() -> None:
    with pytest.raises(InputError, match="end of the range"):
        Ages(0)
    with pytest.raises(InputError, match="empty"):
        Ages(5, 5)
    with Ages(0, PAGE, touches=False, damon=False) as ages:  # not mapped
        assert not seen(ages)["writes"]
        age = ages.look()
        assert age == Age(None, age.used_bytes, None, None, None)
        assert not age.used_bytes
    with pytest.raises(InputError, match="closed"):
        ages.look()
