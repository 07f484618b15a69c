"""io_uring's fixed buffers are an outside reference that goes stale; with IoUringBuffers they do not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from uspace_mm.errors import InputError, KernelError, UnsupportedError
from uspace_mm.kernel import mapping, proc
from uspace_mm.kernel.io_uring import IoUring, IoUringUnavailable, update_slot
from uspace_mm.kernel.madvise import Advice
from uspace_mm.kernel.mapping import PRIVATE_ANONYMOUS, MapFlag, Mapping, RemapFlag
from uspace_mm.kernel.userfaultfd import Feature, OutcomeKind, RegisterMode, UserfaultfdBuilder
from uspace_mm.notifier import IoUringBuffers, calls
from uspace_mm.pager import Pager, Region
from uspace_mm.stores import MemoryStore

PAGE = proc.page_size()
SLOTS = 4


@pytest.fixture
def ring() -> Iterator[IoUring]:
    try:
        made = IoUring()
    except IoUringUnavailable as error:
        pytest.skip(f"lacks: {error}")
    with made:
        made.register_slots(SLOTS)
        yield made


@pytest.fixture
def buffers(ring: IoUring) -> Iterator[IoUringBuffers]:
    with IoUringBuffers(ring.fd, slots=SLOTS, wait_s=10.0) as made:
        yield made


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Not a file, the first write to which may be left to a thread of the kernel's that stays for seconds."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def delivered(ring: IoUring, pipe: tuple[int, int], slot: int, address: int) -> set[int]:
    """The bytes that a page of the buffer has, as the ring sees it."""
    assert ring.write_fixed(pipe[1], slot, address, PAGE) == PAGE
    return set(os.read(pipe[0], PAGE))


def forget(address: int) -> None:
    calls.madvise(address, PAGE, Advice.DONTNEED)


def map_again(address: int) -> None:
    mapping.map_memory(PAGE, address=address, flags=PRIVATE_ANONYMOUS | MapFlag.FIXED_NOREPLACE)


def unmap_and_map(address: int) -> None:
    calls.munmap(address, PAGE)
    map_again(address)


def map_over(address: int) -> None:
    calls.mmap(PAGE, address=address, flags=PRIVATE_ANONYMOUS | MapFlag.FIXED)


def move_away(address: int) -> None:
    elsewhere = mapping.map_memory(PAGE)
    calls.mremap(address, PAGE, PAGE, flags=RemapFlag.MAYMOVE | RemapFlag.FIXED, new_address=elsewhere)
    map_again(address)
    mapping.unmap(elsewhere, PAGE)


CHANGES = [forget, unmap_and_map, map_over, move_away]


@pytest.mark.parametrize("change", CHANGES)
def test_without_it_the_old_bytes_are_delivered(
    ring: IoUring, pipe: tuple[int, int], change: Callable[[int], None]
) -> None:
    with Mapping(PAGE) as memory:
        memory.array[:] = 1
        update_slot(ring.fd, 0, memory.address, PAGE)
        change(memory.address)
        memory.array[:] = 2
        assert delivered(ring, pipe, 0, memory.address) == {1}


@pytest.mark.parametrize("change", CHANGES)
def test_with_it_the_right_bytes_arrive(
    ring: IoUring, buffers: IoUringBuffers, pipe: tuple[int, int], change: Callable[[int], None]
) -> None:
    with Mapping(PAGE) as memory:
        memory.array[:] = 1
        slot = buffers.add(memory.address, PAGE)
        with buffers.using(slot) as before:
            assert delivered(ring, pipe, slot, memory.address) == {1}
        change(memory.address)
        memory.array[:] = 2
        with buffers.using(slot) as after:
            assert after > before
            assert delivered(ring, pipe, slot, memory.address) == {2}
        assert buffers.stats().kept_pinned == 0


@pytest.fixture
def region() -> Iterator[Region]:
    data = b"".join(bytes([7 + i]) * PAGE for i in range(4))
    with Pager() as pager, pager.map(MemoryStore(data)) as mapped:
        yield mapped


def test_a_buffer_in_a_region_follows_evictions(
    ring: IoUring, buffers: IoUringBuffers, pipe: tuple[int, int], region: Region
) -> None:
    slot = buffers.add(region.address, 2 * PAGE)
    for value in (20, 30, 40):
        with buffers.using(slot):
            delivered(ring, pipe, slot, region.address)
        region.evict()
        assert not buffers.look(slot).registered, "its own buffer would bring the pages back"
        region.array()[:PAGE] = value
        with buffers.using(slot):
            assert delivered(ring, pipe, slot, region.address) == {value}
            assert delivered(ring, pipe, slot, region.address + PAGE) == {8}, "from the store"
    assert (region.array()[:PAGE] == 40).all()


def test_without_it_a_pinned_page_cannot_be_moved(ring: IoUring) -> None:
    with Mapping(2 * PAGE) as memory:
        try:
            uffd = UserfaultfdBuilder().require(Feature.MOVE).open()
        except UnsupportedError as error:
            pytest.skip(f"lacks: {error}")
        with uffd:
            memory.array[:PAGE] = 1
            update_slot(ring.fd, 0, memory.address, PAGE)
            uffd.register(memory.address + PAGE, PAGE, RegisterMode.MISSING)
            assert uffd.move(memory.address + PAGE, memory.address, PAGE).kind is OutcomeKind.BUSY
            update_slot(ring.fd, 0, 0, 0)
            uffd.move(memory.address + PAGE, memory.address, PAGE).require()


def test_memory_that_is_gone(ring: IoUring, buffers: IoUringBuffers, pipe: tuple[int, int]) -> None:
    address = mapping.map_memory(PAGE)
    slot = buffers.add(address, PAGE)
    calls.munmap(address, PAGE)
    with pytest.raises(KernelError, match=r"use slot \d+: .*\[EFAULT\]; the memory is not mapped now"):
        buffers.use(slot)
    assert not buffers.look(slot).registered
    with pytest.raises(KernelError, match=r"\[EFAULT\]"):
        buffers.add(address, PAGE)
    buffers.remove(slot)
    with pytest.raises(KernelError, match=r"\[EINVAL\]; no such slot"):
        buffers.look(slot)


def test_refusals(ring: IoUring) -> None:
    with pytest.raises(KernelError, match="fewer slots"):
        IoUringBuffers(ring.fd, slots=SLOTS + 1)
    for arguments in ({"slots": 0}, {"slots": 1, "first": -1}, {"slots": 1, "wait_s": -1.0}):
        with pytest.raises(InputError):
            IoUringBuffers(ring.fd, **arguments)
    with IoUring(single_issuer=True) as single:
        single.register_slots(1)
        with pytest.raises(UnsupportedError, match="SINGLE_ISSUER"):
            IoUringBuffers(single.fd, slots=1)
    with Mapping(PAGE) as memory, IoUringBuffers(ring.fd, slots=1, first=2) as buffers:
        assert buffers.add(memory.address, PAGE) == 2
        with pytest.raises(KernelError, match=r"\[ENOSPC\]; every slot is taken"):
            buffers.add(memory.address, PAGE)
        with buffers.using(2), pytest.raises(KernelError, match=r"\[EBUSY\]; requests are in flight"):
            buffers.close()
    with pytest.raises(InputError, match="closed"):
        buffers.stats()
