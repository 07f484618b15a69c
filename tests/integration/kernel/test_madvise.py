"""madvise with every advice, on memory of this process."""

from __future__ import annotations

import errno
import os

import pytest

from uspace_mm.errors import KernelError
from uspace_mm.kernel import mapping as m
from uspace_mm.kernel import proc
from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.kernel.memfd import memfd_create

PAGE = proc.page_size()
PMD = proc.pmd_size()


HARMLESS = [
    advice
    for advice in Advice
    if advice not in (Advice.HWPOISON, Advice.SOFT_OFFLINE, Advice.REMOVE, Advice.COLLAPSE)
]


@pytest.mark.parametrize("advice", HARMLESS, ids=lambda advice: advice.name)
def test_the_kernel_takes_every_advice(memory: m.Mapping, advice: Advice) -> None:
    memory.array[:] = 1
    try:
        madvise(memory.address, memory.length, advice)
    except KernelError as error:
        if error.errno == errno.EINVAL:
            pytest.skip(f"lacks: madvise({advice.name})")
        raise
    if advice is Advice.WIPEONFORK:
        assert "wf" in proc.mapping_at(memory.address).vm_flags
    if advice in (Advice.DONTNEED, Advice.DONTNEED_LOCKED, Advice.GUARD_INSTALL):
        assert not m.mincore(memory.address, memory.length).any()


def test_remove_punches_a_hole_into_shared_memory() -> None:
    fd = memfd_create("holes", 4 * PAGE)
    try:
        with m.Mapping(4 * PAGE, flags=m.MapFlag.SHARED, fd=fd) as mapping:
            mapping.array[:] = 1
            madvise(mapping.address + PAGE, PAGE, Advice.REMOVE)
            assert os.fstat(fd).st_blocks * 512 == 3 * PAGE
            assert os.pread(fd, 1, PAGE) == b"\0"
    finally:
        os.close(fd)


def test_populate_makes_pages_present(memory: m.Mapping) -> None:
    madvise(memory.address, 8 * PAGE, Advice.POPULATE_WRITE)
    assert m.mincore(memory.address, memory.length).sum() == 8


def test_madvise_on_a_hole_names_the_range() -> None:
    with m.Mapping(PAGE) as mapping:
        address = mapping.address
    with pytest.raises(KernelError, match="not mapped") as caught:
        madvise(address, PAGE, Advice.WILLNEED)
    assert (caught.value.call, caught.value.address, caught.value.length) == (
        "madvise(WILLNEED)",
        address,
        PAGE,
    )
