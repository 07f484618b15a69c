"""io_uring's fixed buffers: what a pinned page means, and every refusal by name."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from uspace_mm.errors import InputError, KernelError
from uspace_mm.kernel import proc
from uspace_mm.kernel.io_uring import SLOTS_MAX, IoUring, IoUringUnavailable, update_slot
from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.kernel.mapping import Mapping, Protection

PAGE = proc.page_size()


@pytest.fixture
def ring() -> Iterator[IoUring]:
    try:
        made = IoUring()
    except IoUringUnavailable as error:
        pytest.skip(f"lacks: {error}")
    with made:
        made.register_slots(4)
        yield made


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)


def test_a_fixed_buffer_is_written_and_read(ring: IoUring, pipe: tuple[int, int]) -> None:
    with Mapping(2 * PAGE) as memory:
        update_slot(ring.fd, 1, memory.address, memory.length)
        memory.array[:PAGE] = 5
        assert ring.write_fixed(pipe[1], 1, memory.address, PAGE) == PAGE
        assert ring.read_fixed(pipe[0], 1, memory.address + PAGE, PAGE) == PAGE
        assert (memory.array == 5).all()


def test_the_pages_stay_those_of_the_registration(ring: IoUring, pipe: tuple[int, int]) -> None:
    with Mapping(PAGE) as memory:
        memory.array[:] = 1
        update_slot(ring.fd, 0, memory.address, PAGE)
        madvise(memory.address, PAGE, Advice.DONTNEED)
        memory.array[:] = 2
        ring.write_fixed(pipe[1], 0, memory.address, PAGE)
        assert set(os.read(pipe[0], PAGE)) == {1}
        update_slot(ring.fd, 0, memory.address, PAGE)
        ring.write_fixed(pipe[1], 0, memory.address, PAGE)
        assert set(os.read(pipe[0], PAGE)) == {2}


def test_refusals_name_what_is_wrong(ring: IoUring, pipe: tuple[int, int]) -> None:
    with Mapping(PAGE) as memory, Mapping(PAGE, protection=Protection.READ) as constant:
        with pytest.raises(KernelError, match=r"slot 9.*\[EINVAL\]; no such slot"):
            update_slot(ring.fd, 9, memory.address, PAGE)
        with pytest.raises(KernelError, match=r"\[EFAULT\]; not mapped, or not writable"):
            update_slot(ring.fd, 0, constant.address, PAGE)
        with pytest.raises(KernelError, match=r"\[EBUSY\]"):
            ring.register_slots(4)
        with pytest.raises(KernelError, match=r"WRITE_FIXED.*\[EFAULT\]; no buffer"):
            ring.write_fixed(pipe[1], 2, memory.address, PAGE)
        with pytest.raises(KernelError, match=r"\[E(OPNOTSUPP|NOTSUP)\]; not a descriptor of an io_uring"):
            update_slot(pipe[0], 0, memory.address, PAGE)
    ring.unregister_slots()
    with pytest.raises(KernelError, match=r"\[ENXIO\]"):
        update_slot(ring.fd, 0, 0, 0)
    for entries in (0, 1 << 20, "8"):
        with pytest.raises(InputError):
            IoUring(entries)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        update_slot(ring.fd, SLOTS_MAX + 1, 0, 0)
    ring.close()
    with pytest.raises(InputError, match="closed"):
        ring.register_slots(1)


def test_a_ring_for_one_thread_refuses_others() -> None:
    try:
        single = IoUring(single_issuer=True)
    except IoUringUnavailable as error:
        pytest.skip(f"lacks: {error}")
    except KernelError as error:
        pytest.skip(f"lacks: IORING_SETUP_SINGLE_ISSUER ({error})")
    answers: list[KernelError] = []

    def update() -> None:
        try:
            update_slot(single.fd, 0, 0, 0)
        except KernelError as error:
            answers.append(error)

    with single:
        single.register_slots(1)
        thread = threading.Thread(target=update)
        thread.start()
        thread.join()
    assert "SINGLE_ISSUER" in str(answers[0])
