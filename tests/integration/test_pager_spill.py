"""Modified units of a store that must not be written to: they come back from the spill."""

from __future__ import annotations

from uspace_mm.kernel import proc
from uspace_mm.pager import Pager, guard
from uspace_mm.stores import ZeroStore

PAGE = proc.page_size()


def test_the_only_modified_unit_is_evicted_again_and_again() -> None:
    with Pager() as pager, pager.map(ZeroStore(4 * PAGE)) as region:
        for value in range(1, 6):
            region.array()[:PAGE] = value
            region.evict()
            with guard():
                assert (region.array()[:PAGE] == value).all()
        assert region.stats().counters.pages_lost == 0


def test_the_last_modified_unit_goes_back_to_its_store_and_another_comes() -> None:
    with Pager() as pager, pager.map(ZeroStore(4 * PAGE)) as first, pager.map(ZeroStore(PAGE)) as second:
        first.array()[:] = 1
        first.evict()
        first.close()
        second.array()[:] = 2
        second.evict()
        assert (second.array() == 2).all()
