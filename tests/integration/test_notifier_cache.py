"""RegistrationCache: functions of Python's, kept registrations, and exactly those dropped that changed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from uspace_mm.errors import InputError, UnsupportedError
from uspace_mm.kernel import mapping, proc
from uspace_mm.kernel.madvise import Advice
from uspace_mm.kernel.madvise import madvise as raw_madvise
from uspace_mm.kernel.mapping import PRIVATE_ANONYMOUS, MapFlag, Mapping, RemapFlag
from uspace_mm.notifier import Follow, RegistrationCache, calls
from uspace_mm.pager import Pager
from uspace_mm.stores import MemoryStore

PAGE = proc.page_size()
Range = tuple[int, int]


class Device:
    """Counts what is registered with it."""

    def __init__(self) -> None:
        self.live: set[Range] = set()
        self.dropped: list[Range] = []

    def register(self, address: int, length: int) -> Range:
        # What a raw call took is deregistered by the cache's own thread, perhaps only now.
        deadline = time.monotonic() + 30
        while (address, length) in self.live:
            assert time.monotonic() < deadline, "registered twice"
            time.sleep(0.001)
        self.live.add((address, length))
        return address, length

    def deregister(self, registration: Range) -> None:
        self.live.remove(registration)
        self.dropped.append(registration)


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture(params=Follow)
def cache(request: pytest.FixtureRequest, device: Device) -> Iterator[RegistrationCache[Range]]:
    try:
        made = RegistrationCache(device.register, device.deregister, entries=8, follow=request.param)
    except UnsupportedError as error:
        pytest.skip(f"lacks: {error}")
    with made:
        yield made
    assert not device.live


def hits(cache: RegistrationCache[Range], address: int, length: int) -> bool:
    with (cached := cache.get(address, length)) as (start, size):
        assert start <= address and address + length <= start + size
        assert (cached.address, cached.length) == (start, size)
        return cached.hit


def test_what_is_there_is_used_again(cache: RegistrationCache[Range], device: Device) -> None:
    with Mapping(4 * PAGE) as memory:
        memory.array[:] = 1
        assert not hits(cache, memory.address + 1, PAGE)
        assert hits(cache, memory.address, 2 * PAGE)
        assert not hits(cache, memory.address, 3 * PAGE)
        assert device.live == {(memory.address, 3 * PAGE)}
        stats = cache.stats()
        assert (stats.hits, stats.misses, stats.retired, stats.entries) == (1, 2, 1, 1)
        assert (stats.bytes, stats.in_use) == (3 * PAGE, 0)
        cache.trim()
        assert not device.live


def forget(address: int) -> None:
    calls.madvise(address, PAGE, Advice.DONTNEED)


def unmap(address: int) -> None:
    calls.munmap(address, PAGE)
    mapping.map_memory(PAGE, address=address, flags=PRIVATE_ANONYMOUS | MapFlag.FIXED_NOREPLACE)


def move(address: int) -> None:
    elsewhere = mapping.map_memory(PAGE)
    calls.mremap(address, PAGE, PAGE, flags=RemapFlag.MAYMOVE | RemapFlag.FIXED, new_address=elsewhere)
    mapping.map_memory(PAGE, address=address, flags=PRIVATE_ANONYMOUS | MapFlag.FIXED_NOREPLACE)
    mapping.unmap(elsewhere, PAGE)


def forget_raw(address: int) -> None:
    raw_madvise(address, PAGE, Advice.DONTNEED)


def unmap_raw(address: int) -> None:
    mapping.unmap(address, PAGE)
    mapping.map_memory(PAGE, address=address, flags=PRIVATE_ANONYMOUS | MapFlag.FIXED_NOREPLACE)


@pytest.mark.parametrize("change", [forget, unmap, move])
def test_what_changes_is_dropped_before_the_call_returns(
    cache: RegistrationCache[Range], device: Device, change: Callable[[int], None]
) -> None:
    with Mapping(4 * PAGE) as memory:
        memory.array[:] = 1
        pages = [memory.address + i * PAGE for i in range(4)]
        assert not any([hits(cache, page, PAGE) for page in pages])
        change(pages[1])
        assert (pages[1], PAGE) in device.dropped
        assert [hits(cache, page, PAGE) for page in pages] == [True, False, True, True]


@pytest.mark.parametrize("change", [forget_raw, unmap_raw])
def test_raw_calls_are_seen_by_the_next_lookup(device: Device, change: Callable[[int], None]) -> None:
    try:
        cache = RegistrationCache(device.register, device.deregister)
    except UnsupportedError as error:
        pytest.skip(f"lacks: {error}")
    with cache, Mapping(4 * PAGE) as memory:
        memory.array[:] = 1
        pages = [memory.address + i * PAGE for i in range(4)]
        assert not any([hits(cache, page, PAGE) for page in pages])
        change(pages[1])
        assert [hits(cache, page, PAGE) for page in pages] == [True, False, True, True]


def test_a_change_waits_until_the_user_puts_it_back(cache: RegistrationCache[Range], device: Device) -> None:
    with Mapping(PAGE) as memory:
        cached = cache.get(memory.address, PAGE)
        thread = threading.Thread(target=forget, args=(memory.address,))
        thread.start()
        while not cache.stats().invalidated:
            time.sleep(0.001)
        assert device.live, "in use"
        cached.put()
        cached.put()
        thread.join()
        assert device.dropped == [(memory.address, PAGE)]
        assert cache.stats().overtaken == 0


def test_what_the_functions_raise(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(address: int, length: int) -> Range:
        raise LookupError("no such device")

    def fail(registration: Range) -> None:
        raise LookupError("gone already")

    with Mapping(PAGE) as memory:
        with RegistrationCache(refuse, device.deregister, follow=Follow.CALLS) as cache:
            for _ in range(2):
                with pytest.raises(LookupError, match="no such device"):
                    cache.get(memory.address, PAGE)
            assert cache.stats().entries == 0
        with RegistrationCache(device.register, fail, follow=Follow.CALLS) as cache:
            hits(cache, memory.address, PAGE)
            forget(memory.address)
            assert cache.stats().failed == 1
            assert "gone already" in caplog.text


def test_arguments_that_cannot_be(device: Device) -> None:
    for arguments in ({"entries": 0}, {"wait_s": -1.0}, {"follow": 0}, {"max_bytes": -1}):
        with pytest.raises(InputError):
            RegistrationCache(device.register, device.deregister, **arguments)
    with pytest.raises(InputError):
        RegistrationCache(None, device.deregister)  # type: ignore[arg-type]
    with RegistrationCache(device.register, device.deregister, follow=Follow.CALLS) as cache:
        with pytest.raises(InputError):
            cache.get(PAGE, 0)
        cached = cache.get(PAGE, 1)
        with pytest.raises(InputError, match="1 registrations are in use"):
            cache.close()
        cached.put()
    with pytest.raises(InputError, match="closed"):
        cache.get(PAGE, 1)


def test_a_region_of_the_pager(device: Device) -> None:
    with Pager() as pager, pager.map(MemoryStore(bytes(8 * PAGE))) as region:
        region.array()[:] = 1
        with RegistrationCache(device.register, device.deregister, follow=Follow.CALLS) as cache:
            pages = [region.address + i * PAGE for i in range(8)]
            assert not any([hits(cache, page, PAGE) for page in pages])
            region.evict(2 * PAGE, 4 * PAGE)
            assert device.dropped == [(pages[2], PAGE), (pages[3], PAGE)]
            assert hits(cache, pages[4], PAGE) and not hits(cache, pages[2], PAGE)


def test_a_region_cannot_be_watched_and_is_not_kept(device: Device) -> None:
    with Pager() as pager, pager.map(MemoryStore(bytes(PAGE))) as region:
        try:
            cache = RegistrationCache(device.register, device.deregister)
        except UnsupportedError as error:
            pytest.skip(f"lacks: {error}")
        with cache:
            for _ in range(2):
                assert not hits(cache, region.address, PAGE)
                assert not device.live
            assert cache.stats().uncached == 2


def test_a_child_has_a_cache_of_its_own(cache: RegistrationCache[Range], device: Device) -> None:
    with Mapping(PAGE) as memory:
        memory.array[:] = 1
        held = cache.get(memory.address, PAGE)
        child = os.fork()
        if not child:
            try:
                device.live.clear()
                held.put()
                fine = not hits(cache, memory.address, PAGE) and hits(cache, memory.address, PAGE)
                cache.close()
                fine = fine and device.dropped == [(memory.address, PAGE)]
            finally:
                os._exit(0 if fine else 1)
        assert os.waitpid(child, 0)[1] == 0
        held.put()
        assert not hits(cache, memory.address, PAGE)
        assert device.dropped == [(memory.address, PAGE)]


EXIT = """
from uspace_mm.kernel.mapping import Mapping
from uspace_mm.notifier import Follow, RegistrationCache
memory = Mapping(1 << 20)
cache = RegistrationCache(lambda address, length: length, lambda length: print("dropped", length, flush=True),
                          follow=Follow.CALLS)
cache.get(memory.address, 1 << 16).put()
held = cache.get(memory.address + (1 << 16), 1 << 17)
"""


def test_exit_deregisters_everything_once() -> None:
    done = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"dropped {1 << 17}", f"dropped {1 << 16}"]
    assert done.stderr == ""
