"""A notifier on a region of the pager: told of evictions and closing, kept from deadlocks."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator

import numpy as np
import pytest

from uspace_mm.kernel.madvise import Advice, madvise
from uspace_mm.notifier import (
    Event,
    Kind,
    Notifier,
    NotifierError,
    Promise,
    Reason,
    Source,
    WouldDeadlock,
    events,
    invalidating,
    register,
)
from uspace_mm.pager import Pager, Region
from uspace_mm.stores import MemoryStore, ZeroStore

PAGE = mmap.PAGESIZE
PAGES = 64


@pytest.fixture
def region() -> Iterator[Region]:
    with Pager() as pager, pager.map(ZeroStore(PAGES * PAGE)) as region:
        yield region


class Recorder(Notifier):
    def __init__(self) -> None:
        self.events: list[Event] = []

    def _keep(self, event: Event) -> None:
        self.events.append(event)

    release = invalidate_range_start = invalidate_range_end = invalidate_page = _keep

    def settle(self) -> list[Event]:
        while (stats := self.stats()).queued or stats.busy_s:
            time.sleep(0.001)
        return self.events


def test_an_eviction_is_told_before_the_pages_leave(region: Region) -> None:
    class Copying(Recorder):
        """Holds a copy of the first page that must be dropped in time; reads no memory of the region."""

        copy: bytes | None = None

        def invalidate_range_start(self, event: Event) -> None:
            super().invalidate_range_start(event)
            self.copy = None

    array = region.array()
    array[:PAGE] = 7
    copying = Copying()
    with register(copying, region) as registration:
        assert registration.range == (region.address, region.address + PAGES * PAGE)
        seq = registration.read_begin(10.0)
        copying.copy = bytes(array[:PAGE])
        assert not registration.read_retry(seq)
        region.evict()
        assert copying.copy is None
        assert registration.read_retry(seq)
        told = copying.settle()
    evicted = [event for event in told if event.reason is Reason.EVICT]
    assert {event.source for event in evicted} == {Source.PAGER}
    assert {event.promise for event in evicted} == {Promise.ORDERED}
    starts = [event for event in evicted if event.kind is Kind.START]
    assert starts
    assert min(event.start for event in starts) == region.address
    assert sorted(event.id for event in starts) == sorted(
        event.id for event in evicted if event.kind is Kind.END
    )
    assert (array[:PAGE] == 7).all()
    del array


def test_what_the_program_does_itself_is_told_as_the_kernel_tells_it(region: Region) -> None:
    array = region.array()
    array[:] = 1
    with events(region, timeout_s=10.0) as stream:
        madvise(region.address, 4 * PAGE, Advice.DONTNEED)
        start, end = next(stream), next(stream)
    assert (start.kind, end.kind) == (Kind.START, Kind.END)
    assert (start.source, start.reason, start.promise) == (Source.KERNEL, Reason.REMOVE, Promise.BEFORE)
    assert not start.ordered
    assert (start.start, start.end) == (region.address, region.address + 4 * PAGE)
    assert not array[: 4 * PAGE].any()
    del array


def test_closing_a_region_is_told_while_its_memory_is_there() -> None:
    recorder = Recorder()
    with Pager() as pager:
        region = pager.map(MemoryStore(np.ones(PAGES * PAGE, np.uint8)))
        with register(recorder, region):
            region.close()
            told = recorder.settle()
    closing = [event for event in told if event.reason is Reason.UNMAP]
    assert [event.kind for event in closing] == [Kind.START, Kind.END]
    assert closing[0].ordered
    assert closing[0].source is Source.PAGER


def test_the_pager_cannot_be_used_against_itself_in_a_callback(region: Region) -> None:
    refused: list[NotifierError] = []

    class Reaching(Notifier):
        wait_s = 10.0

        def invalidate_range_start(self, event: Event) -> None:
            for use in (region.close, region.evict):
                try:
                    use()
                except WouldDeadlock as error:
                    refused.append(error)

    array = region.array()
    array[:] = 1
    del array
    with register(Reaching(), region), invalidating(region):
        pass
    assert len(refused) == 2
    assert "not in a callback" in str(refused[0])
    assert not region.closed


def test_a_budget_evicts_under_a_notifier() -> None:
    recorder = Recorder()
    with Pager(budget=16 * PAGE) as pager, pager.map(ZeroStore(PAGES * PAGE)) as region:
        array = region.array()
        with register(recorder, region):
            for page in range(PAGES):
                array[page * PAGE] = page
            total = int(array[::PAGE].sum())
        assert total == sum(range(PAGES))
        del array
    assert any(event.reason is Reason.EVICT for event in recorder.events)
    assert recorder.stats().late == 0
