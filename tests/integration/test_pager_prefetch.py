"""Reading ahead: runs that are recognised, those that are not, and what is asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from uspace_mm.errors import InputError
from uspace_mm.kernel.proc import page_size
from uspace_mm.pager import Pager, Region
from uspace_mm.stores import MemoryStore

PAGE = page_size()
PAGES = 2048
DATA = np.random.default_rng(7).integers(0, 256, PAGES * PAGE, np.uint8)


@pytest.fixture
def region() -> Iterator[Region]:
    with Pager() as pager, pager.map(MemoryStore(DATA)) as region:
        yield region


def touch(region: Region, pages: NDArray[np.intp]) -> None:
    """Reads the pages in turn, slowly enough for the prefetcher to go in front."""
    array = region.array()
    for number, page in enumerate(pages.tolist()):
        start = page * PAGE
        assert array[start : start + PAGE].tobytes() == DATA[start : start + PAGE].tobytes()
        if number % 4 == 0:
            time.sleep(0.0001)
    del array


@pytest.mark.parametrize(
    "pages",
    [
        np.arange(PAGES),
        np.arange(PAGES)[::-1],
        np.arange(0, PAGES, 3),
        np.arange(0, PAGES, 5)[::-1],
    ],
    ids=["sequential", "backward", "every 3rd", "every 5th backward"],
)
def test_a_run_is_recognised(region: Region, pages: NDArray[np.intp]) -> None:
    touch(region, pages)
    counters = region.stats().counters
    assert counters.prefetch_hits > 0
    assert counters.prefetch_installed >= counters.prefetch_hits
    assert counters.faults_missing < len(pages)
    assert counters.faults_missing + counters.prefetch_installed >= len(pages)


def test_sequential_advice_needs_no_run(region: Region) -> None:
    region.advise("sequential")
    touch(region, np.array([100]))
    deadline = time.monotonic() + 10
    while not region.stats().counters.prefetch_installed and time.monotonic() < deadline:
        time.sleep(0.001)
    assert region.stats().counters.prefetch_installed > 0


def test_random_advice_reads_nothing_ahead(region: Region) -> None:
    region.advise("random")
    touch(region, np.arange(PAGES))
    counters = region.stats().counters
    assert (counters.prefetch_issued, counters.prefetch_installed, counters.prefetch_hits) == (0, 0, 0)
    assert counters.faults_missing == PAGES


def test_advice_that_cannot_be(region: Region) -> None:
    with pytest.raises(InputError, match="advice"):
        region.advise("backward")  # type: ignore[arg-type]


def test_what_is_asked_for_comes_without_a_fault(region: Region) -> None:
    region.prefetch(10 * PAGE, 500 * PAGE)
    deadline = time.monotonic() + 10
    while region.stats().counters.prefetch_installed < 490 and time.monotonic() < deadline:
        time.sleep(0.001)
    touch(region, np.arange(10, 500))
    counters = region.stats().counters
    assert (counters.prefetch_installed, counters.faults) == (490, 0)
    assert counters.resident_bytes == 490 * PAGE


def test_what_is_populated_is_there(region: Region) -> None:
    region.populate(PAGE, (PAGES - 1) * PAGE)
    assert region.stats().counters.resident_bytes == (PAGES - 2) * PAGE
    touch(region, np.arange(1, PAGES - 1))
    assert region.stats().counters.faults == 0
    touch(region, np.array([0, PAGES - 1]))
    assert region.stats().counters.faults == 2
