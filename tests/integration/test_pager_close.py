"""Closing a region that another thread is using."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from uspace_mm.errors import InputError
from uspace_mm.pager import Pager, RegionBusy
from uspace_mm.stores import FunctionStore

SLOW = """
import time

def slow(offset, length):
    time.sleep(0.1)
    return bytes([offset // length % 251]) * length
"""


@pytest.fixture
def slow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FunctionStore:
    (tmp_path / "slow_pages.py").write_text(SLOW)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "slow_pages", raising=False)
    import slow_pages  # type: ignore[import-not-found]

    return FunctionStore(slow_pages.slow, "64k")


def test_a_region_is_not_closed_under_a_call_of_another_thread(slow_store: FunctionStore) -> None:
    with Pager() as pager, slow_store:
        region = pager.map(slow_store)
        started = threading.Event()

        def populate() -> None:
            started.set()
            region.populate()

        thread = threading.Thread(target=populate)
        thread.start()
        started.wait()
        while not region._calls:
            assert thread.is_alive()
        with pytest.raises(RegionBusy, match="another thread is using it"):
            region.close()
        thread.join()
        unit = region.unit
        data = region.array()
        assert all((data[at : at + unit] == at // unit % 251).all() for at in range(0, len(data), unit))
        del data
        region.close()
        with pytest.raises(InputError, match="closed"):
            region.stats()
