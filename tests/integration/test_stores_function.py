"""Stores whose bytes a Python function computes in a process of its own, and how that can go wrong."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from uspace_mm.errors import InputError, KernelError
from uspace_mm.kernel.proc import page_size
from uspace_mm.pager import PageLost, Pager, RegionBusy, guard
from uspace_mm.stores import FunctionStore, Mode

PAGE = page_size()
PAGES = 40
TAIL = 123
SIZE = PAGES * PAGE + TAIL
FILL = 0xBD

MODULE = f"""
import time
from pathlib import Path

CALLS = Path(__file__).with_name("calls")
BAD = 3 * {PAGE}

def _called(offset, length):
    with CALLS.open("a") as calls:
        calls.write(f"{{offset}} {{length}}\\n")

def good(offset, length):
    _called(offset, length)
    return bytes((i * 131 + (i >> 8)) & 255 for i in range(offset, offset + length))

def loud(offset, length):
    print("ready", "set", offset, flush=True)
    return bytearray(good(offset, length))

def raises(offset, length):
    data = good(offset, length)
    if offset == BAD:
        raise OSError("no such luck")
    return data

def raises_once(offset, length):
    first = not CALLS.exists() or f"{{offset}} " not in CALLS.read_text()
    data = good(offset, length)
    if first:
        raise ValueError("not yet")
    return data

def short(offset, length):
    data = good(offset, length)
    return data[:-1] if offset == BAD else data

def long(offset, length):
    data = good(offset, length)
    return data + b"x" if offset == BAD else data

def no_bytes(offset, length):
    data = good(offset, length)
    return None if offset == BAD else data

def hangs(offset, length):
    data = good(offset, length)
    if offset == BAD:
        time.sleep(600)
    return data

class Shelf:
    @staticmethod
    def book(offset, length):
        return memoryview(good(offset, length))

NOTHING = 3
"""
EXPECTED = np.array([(i * 131 + (i >> 8)) & 255 for i in range(SIZE)], np.uint8)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "umm_test_functions.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield importlib.import_module("umm_test_functions")
    del sys.modules["umm_test_functions"]


def calls(module: ModuleType) -> list[tuple[int, int]]:
    lines = module.CALLS.read_text().splitlines()
    return [(int(line.split()[0]), int(line.split()[1])) for line in lines]


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("name", ["good", "loud", "Shelf.book"])
def test_every_byte_comes_from_the_function(module: Any, name: str) -> None:
    function = module.Shelf.book if "." in name else getattr(module, name)
    with Pager() as pager:
        store = FunctionStore(function, SIZE)
        pid = store.worker_pid
        with pager.map(store) as region:
            assert bytes(region.view()) == EXPECTED.tobytes()
        asked = calls(module)
        assert sorted(asked) == [(i * PAGE, PAGE) for i in range(PAGES)] + [(PAGES * PAGE, TAIL)]
        store.close()
        assert is_gone(pid)


def test_units_larger_than_a_page(module: Any) -> None:
    unit = 4 * PAGE
    with Pager() as pager, FunctionStore(module.good, SIZE, unit=unit) as store:
        with pager.map(store, unit=unit) as region:
            array = region.array()
            assert (array[::-1] == EXPECTED[::-1]).all()
            del array
        assert {length for _, length in calls(module)} == {unit, TAIL}
        with pytest.raises((InputError, KernelError)), pager.map(store, unit=2 * unit) as region:
            region.populate()


def test_what_was_written_stays_although_the_function_is_never_told(module: Any) -> None:
    expected = EXPECTED.copy()
    with Pager(8 * PAGE) as pager, FunctionStore(module.good, SIZE) as store, pager.map(store) as region:
        array = region.array()
        array[:: 2 * PAGE] = 0x5A
        expected[:: 2 * PAGE] = 0x5A
        region.evict()
        assert (array == expected).all()
        del array


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("raises", errno.EIO),
        ("no_bytes", errno.EIO),
        ("short", errno.ENODATA),
        ("long", errno.ENODATA),
        ("hangs", errno.ETIMEDOUT),
    ],
)
def test_a_failed_call_loses_its_unit_and_no_other(module: Any, name: str, error: int) -> None:
    store = FunctionStore(getattr(module, name), SIZE, retries=2, timeout_s=0.7 if name == "hangs" else 10)
    pid = store.worker_pid
    with Pager() as pager, store, pager.map(store) as region:
        array = region.array()
        before = 3 * PAGE
        assert (array[:before] == EXPECTED[:before]).all()
        with pytest.raises(PageLost) as caught, guard():
            lost = array[before : before + PAGE].copy()
        assert (lost == FILL).all()
        assert (caught.value.errno, caught.value.offset, caught.value.units) == (error, before, 1)
        counters = region.stats().counters
        assert (counters.pages_lost, counters.store_errors) == (1, 3)
        if name != "hangs":  # whose worker is still in that call
            after = before + PAGE
            assert (array[after:] == EXPECTED[after:]).all()
            assert calls(module).count((before, PAGE)) == 3
        del array
    assert is_gone(pid)


def test_a_call_that_fails_once_is_tried_again(module: Any) -> None:
    store = FunctionStore(module.raises_once, SIZE, retries=1)
    with Pager() as pager, store, pager.map(store) as region:
        assert bytes(region.view()) == EXPECTED.tobytes()
        counters = region.stats().counters
        assert (counters.pages_lost, counters.store_errors) == (0, PAGES + 1)


def test_populate_says_which_error(module: Any) -> None:
    with Pager() as pager, FunctionStore(module.raises, SIZE) as store, pager.map(store) as region:
        with pytest.raises(KernelError) as caught:
            region.populate()
        assert caught.value.errno == errno.EIO


def test_when_the_worker_is_killed_what_was_not_fetched_is_lost(module: Any) -> None:
    with Pager() as pager, FunctionStore(module.good, SIZE, retries=3) as store, pager.map(store) as region:
        array = region.array()
        half = PAGES // 2 * PAGE
        assert (array[:half] == EXPECTED[:half]).all()
        os.kill(store.worker_pid, signal.SIGKILL)
        for offset in (half, SIZE - 1):
            with pytest.raises(PageLost) as caught, guard():
                assert array[offset] == FILL
            assert (caught.value.errno, caught.value.offset) == (errno.EPIPE, offset)
        assert (array[:half] == EXPECTED[:half]).all()
        del array


def test_a_worker_that_is_killed_in_a_call_leaves_nobody_waiting(module: Any) -> None:
    store = FunctionStore(module.hangs, SIZE, timeout_s=600)
    with Pager() as pager, store, pager.map(store) as region:
        array = region.array()
        killer = os.fork()
        if killer == 0:
            while not module.CALLS.exists():
                os.sched_yield()
            os.kill(store.worker_pid, signal.SIGKILL)
            os._exit(0)
        with pytest.raises(PageLost) as caught, guard():
            assert (array[3 * PAGE : 4 * PAGE] == FILL).all()
        assert caught.value.errno == errno.EPIPE
        os.waitpid(killer, 0)
        del array


def test_functions_that_cannot_be(module: Any) -> None:
    def local(offset: int, length: int) -> bytes:
        return bytes(length)

    def of_a_script(offset: int, length: int) -> bytes:
        return bytes(length)

    of_a_script.__module__, of_a_script.__qualname__ = "__main__", "of_a_script"

    def stray(offset: int, length: int) -> bytes:
        return bytes(length)

    stray.__module__, stray.__qualname__ = "no_such_module", "stray"

    def renamed(offset: int, length: int) -> bytes:
        return bytes(length)

    renamed.__module__, renamed.__qualname__ = "umm_test_functions", "absent"

    def number(offset: int, length: int) -> bytes:
        return bytes(length)

    number.__module__, number.__qualname__ = "umm_test_functions", "NOTHING"
    for function, message in [
        (lambda offset, length: bytes(length), "lambda"),
        (local, "local"),
        (3, "function"),
        (of_a_script, "script that is running"),
        (stray, "no_such_module"),
        (renamed, "absent"),
        (number, "not callable"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            FunctionStore(function, SIZE)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_arguments_that_cannot_be(module: Any) -> None:
    for arguments in ({"mode": Mode.WRITEBACK}, {"timeout_s": 0}, {"retries": -1}, {"unit": "0"}):
        with pytest.raises(InputError):
            FunctionStore(module.good, SIZE, **arguments)
    with pytest.raises(InputError):
        FunctionStore(module.good, 0)


def test_the_worker_stays_until_the_last_region_is_closed(module: Any) -> None:
    with Pager() as pager:
        store = FunctionStore(module.good, SIZE)
        pid = store.worker_pid
        one, two = pager.map(store), pager.map(store)
        store.close()
        one.close()
        array = two.array()
        assert (array == EXPECTED).all()
        with pytest.raises(RegionBusy):
            two.close()
        del array
        assert not is_gone(pid)
        two.close()
        assert is_gone(pid)


def test_a_faulting_thread_that_serves_itself_cannot_ask_a_process(module: Any) -> None:
    store = FunctionStore(module.good, SIZE)
    with store, Pager(in_thread=True) as pager, pytest.raises(InputError, match="in-thread"):
        pager.map(store)
