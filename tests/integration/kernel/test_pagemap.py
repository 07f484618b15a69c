"""pagemap, PAGEMAP_SCAN, smaps, mincore and page flags held against each other."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.integration.kernel.huge import collapse, huge_page_size
from uspace_mm.errors import InputError, KernelError
from uspace_mm.kernel import mapping as m
from uspace_mm.kernel import proc
from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.kernel.pagemap import (
    COMMON_CATEGORIES,
    PFN_MASK,
    Category,
    KPageFlag,
    Pagemap,
    PagemapBit,
    ScanFlag,
    has_bits,
    page_flags,
)
from uspace_mm.kernel.userfaultfd import Feature, RegisterMode, UserfaultfdBuilder, probe_features

PAGE = proc.page_size()
PMD = proc.pmd_size()


@pytest.fixture
def huge() -> Iterator[m.Mapping]:
    """Two PMDs of which the first was collapsed."""
    size = huge_page_size()
    with m.Mapping(2 * size, align=size) as mapping:
        madvise(mapping.address, 2 * size, Advice.NOHUGEPAGE)
        mapping.array[::PAGE] = 1
        # The second stays as it is, or khugepaged might come by.
        madvise(mapping.address, size, Advice.HUGEPAGE)
        collapse(mapping.address, size)
        yield mapping


@pytest.fixture
def touched(memory: m.Mapping) -> NDArray[np.bool_]:
    """Which of the pages of `memory` were touched."""
    pages = np.zeros(64, np.bool_)
    pages[[0, 1, 5, 6, 7, 40, 63]] = True
    for page in np.flatnonzero(pages):
        memory.array[page * PAGE] = 1
    return pages


def test_pagemap_agrees_with_mincore(memory: m.Mapping, touched: NDArray[np.bool_], pagemap: Pagemap) -> None:
    assert (pagemap.present(memory.address, memory.length) == touched).all()
    assert (m.mincore(memory.address, memory.length) == touched).all()


def test_a_scan_agrees_with_what_was_touched(
    memory: m.Mapping, touched: NDArray[np.bool_], scanner: Pagemap
) -> None:
    result = scanner.scan(memory.address, memory.length, any_of=Category.PRESENT)
    assert result.walk_end == memory.address + memory.length
    scanned = np.zeros(64, np.bool_)
    for region in result:
        assert region.categories == Category.PRESENT
        scanned[(region.start - memory.address) // PAGE : (region.end - memory.address) // PAGE] = True
    assert (scanned == touched).all()
    assert result.total_bytes == touched.sum() * PAGE
    absent = scanner.scan(
        memory.address,
        memory.length,
        all_of=Category.PRESENT,
        inverted=Category.PRESENT,
        returned=Category.FILE,
    )
    assert absent.total_bytes == (~touched).sum() * PAGE


def test_a_scan_of_more_regions_than_fit_in_one_call(scanner: Pagemap) -> None:
    pages = 3 * 2048 * 2
    with m.Mapping(pages * PAGE, flags=m.PRIVATE_ANONYMOUS | m.MapFlag.NORESERVE) as mapping:
        if PMD is not None:
            madvise(mapping.address, mapping.length, Advice.NOHUGEPAGE)
        mapping.array[:: 2 * PAGE] = 1
        result = scanner.scan(mapping.address, mapping.length, any_of=Category.PRESENT)
        assert len(result) == pages // 2
        assert (result.regions["start"] == mapping.address + np.arange(pages // 2) * 2 * PAGE).all()


def test_a_scan_with_a_page_limit_goes_on_where_it_stopped(memory: m.Mapping, scanner: Pagemap) -> None:
    memory.array[::PAGE] = 1
    first = scanner.scan(memory.address, memory.length, any_of=Category.PRESENT, max_pages=10)
    assert first.total_bytes == 10 * PAGE
    rest = memory.address + memory.length - first.walk_end
    second = scanner.scan(first.walk_end, rest, any_of=Category.PRESENT)
    assert first.total_bytes + second.total_bytes == memory.length


def test_zero_pages_and_written_ones_differ(memory: m.Mapping, scanner: Pagemap) -> None:
    assert memory.array[0] == 0
    memory.array[PAGE] = 1
    found = list(
        scanner.scan(
            memory.address, 2 * PAGE, any_of=Category.PRESENT, returned=Category.PRESENT | Category.PFNZERO
        )
    )
    assert [Category.PFNZERO in region.categories for region in found] == [True, False]


def test_huge_pages_in_scan_smaps_and_page_flags(huge: m.Mapping, scanner: Pagemap) -> None:
    assert PMD is not None
    found = list(scanner.scan(huge.address, 2 * PMD, any_of=Category.HUGE, returned=COMMON_CATEGORIES))
    assert [(region.start, region.length) for region in found] == [(huge.address, PMD)]
    assert proc.mapping_at(huge.address).anon_huge_bytes == PMD
    frames = scanner.entries(huge.address, 2 * PMD) & np.uint64(PFN_MASK)
    if not frames.all():
        pytest.skip("lacks: CAP_SYS_ADMIN, for frame numbers")
    flags = page_flags(frames)
    thp = (flags & np.uint64(KPageFlag.THP)) != 0
    assert thp[: PMD // PAGE].all() and not thp[PMD // PAGE :].any()
    assert flags[0] & np.uint64(KPageFlag.COMPOUND_HEAD)
    assert (np.diff(frames[: PMD // PAGE]) == 1).all(), "a huge page is contiguous"
    assert ((flags & np.uint64(KPageFlag.ANON)) != 0).all()


def test_smaps_resident_agrees_with_pagemap(huge: m.Mapping, pagemap: Pagemap) -> None:
    assert PMD is not None
    present = int(pagemap.present(huge.address, PMD).sum()) * PAGE
    assert proc.mapping_at(huge.address).rss_bytes == present == PMD


def test_exclusive_is_lost_to_a_child(memory: m.Mapping, pagemap: Pagemap) -> None:
    memory.array[0] = 1
    assert has_bits(pagemap.entries(memory.address, PAGE), PagemapBit.EXCLUSIVE).all()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        assert not has_bits(pagemap.entries(memory.address, PAGE), PagemapBit.EXCLUSIVE).any()
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(child, 0)


def test_written_pages_are_found_once(memory: m.Mapping, scanner: Pagemap) -> None:
    wanted = Feature.WP_ASYNC | Feature.WP_UNPOPULATED
    if wanted & ~probe_features():
        pytest.skip("lacks: UFFD_FEATURE_WP_ASYNC")
    memory.array[::PAGE] = 1

    def written() -> list[int]:
        result = scanner.scan(
            memory.address,
            memory.length,
            all_of=Category.WRITTEN | Category.PRESENT,
            flags=ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC,
        )
        return [
            page
            for region in result
            for page in range((region.start - memory.address) // PAGE, (region.end - memory.address) // PAGE)
        ]

    with pytest.raises(KernelError, match="not registered with WP and WP_ASYNC"):
        written()
    with UserfaultfdBuilder().require(wanted).open() as uffd:
        uffd.register(memory.address, memory.length, RegisterMode.WP)
        assert written() == list(range(64))
        assert written() == []
        memory.array[3 * PAGE] = 2
        memory.array[4 * PAGE] = 2
        memory.array[60 * PAGE] = 2
        assert written() == [3, 4, 60]
        assert written() == []
        assert uffd.read() is None


@pytest.mark.parametrize("regions", [512, 2048, 3000])
def test_many_written_regions_are_each_found_once(scanner: Pagemap, regions: int) -> None:
    """More than fit in one of the kernel's inner rounds (512) or one call (2048)."""
    wanted = Feature.WP_ASYNC | Feature.WP_UNPOPULATED
    if wanted & ~probe_features():
        pytest.skip("lacks: UFFD_FEATURE_WP_ASYNC")
    with m.Mapping(2 * regions * PAGE) as place, UserfaultfdBuilder().require(wanted).open() as uffd:
        if PMD is not None:
            madvise(place.address, place.length, Advice.NOHUGEPAGE)
        place.array[::PAGE] = 1
        uffd.register(place.address, place.length, RegisterMode.WP)

        def written() -> NDArray[np.uint64]:
            result = scanner.scan(
                place.address,
                place.length,
                all_of=Category.WRITTEN | Category.PRESENT,
                flags=ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC,
            )
            starts: NDArray[np.uint64] = (result.regions["start"] - place.address) // PAGE
            return starts

        written()
        for first in (0, 1):
            place.array[first * PAGE :: 2 * PAGE] = 2
            assert (written() == np.arange(first, 2 * regions, 2)).all()
        assert not len(written())


def test_guard_pages_are_told_from_holes(memory: m.Mapping, pagemap: Pagemap) -> None:
    try:
        madvise(memory.address, PAGE, Advice.GUARD_INSTALL)
    except KernelError:
        pytest.skip("lacks: MADV_GUARD_INSTALL")
    entries = pagemap.entries(memory.address, 2 * PAGE)
    if not has_bits(entries, PagemapBit.GUARD).any():
        pytest.skip("lacks: guards in pagemap (Linux 6.15)")
    assert has_bits(entries, PagemapBit.GUARD).tolist() == [True, False]
    found = list(pagemap.scan(memory.address, 2 * PAGE, any_of=Category.GUARD))
    assert [(region.start, region.length) for region in found] == [(memory.address, PAGE)]
    reader, writer = os.pipe()
    with pytest.raises(OSError), open(writer, "wb", buffering=0) as pipe:
        pipe.write(memory.array[:1].data)
    os.close(reader)
    madvise(memory.address, PAGE, Advice.GUARD_REMOVE)
    assert memory.array[0] == 0


def test_a_scan_without_a_category_says_why_not(memory: m.Mapping, scanner: Pagemap) -> None:
    with pytest.raises(KernelError, match="a category this kernel lacks") as caught:
        scanner.scan(memory.address, PAGE, any_of=Category(1 << 40))
    assert caught.value.errno == errno.EINVAL


def test_the_pagemap_ends_with_the_address_space(pagemap: Pagemap) -> None:
    top = (1 << 64) - PAGE
    with pytest.raises(KernelError, match="the address space ends before"):
        pagemap.entries(top, PAGE)


def test_a_closed_pagemap_is_an_input_error() -> None:
    opened = Pagemap()
    opened.close()
    opened.close()
    with pytest.raises(InputError, match="closed"):
        opened.entries(0, PAGE)
