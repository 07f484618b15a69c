"""Fixtures of the kernel layer's tests: memory of small pages, and this process's page map."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from uspace_mm.errors import KernelError
from uspace_mm.kernel import mapping as m
from uspace_mm.kernel import proc
from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.kernel.pagemap import Category, Pagemap

PAGE = proc.page_size()
PMD = proc.pmd_size()


@pytest.fixture
def memory() -> Iterator[m.Mapping]:
    """64 base pages, never huge."""
    with m.Mapping(64 * PAGE) as mapping:
        if PMD is not None:
            madvise(mapping.address, mapping.length, Advice.NOHUGEPAGE)
        yield mapping


@pytest.fixture
def pagemap() -> Iterator[Pagemap]:
    with Pagemap() as opened:
        yield opened


@pytest.fixture
def scanner(pagemap: Pagemap, memory: m.Mapping) -> Pagemap:
    """This process's page map, with PAGEMAP_SCAN."""
    try:
        pagemap.scan(memory.address, PAGE, any_of=Category.PRESENT)
    except KernelError as error:
        if error.errno == errno.ENOTTY:
            pytest.skip("lacks: PAGEMAP_SCAN (Linux 6.7)")
        raise
    return pagemap
