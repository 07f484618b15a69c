"""Bad input ends in one typed error; what counts as memory."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from uspace_mm.errors import InputError, UspaceError
from uspace_mm.notifier import (
    Kind,
    NoProcess,
    Notifier,
    Process,
    Promise,
    Reason,
    Source,
    aevents,
    events,
    invalidating,
    register,
    young,
)
from uspace_mm.notifier.space import as_interval

TOP = (1 << 64) - 1


@pytest.mark.parametrize(
    "given",
    [
        (None, 5),
        (5, 5),
        (6, 5),
        (-1, 5),
        (0, 1 << 64),
        (1.5, 3),
        ("abc", None),
        (b"", None),
        (np.zeros(0), None),
        (np.zeros((3, 0, 2)), None),
        (bytearray(4), 9),
        (memoryview(bytearray(8))[::2], None),
        (object(), 3),
        ([1, 2], None),
        (TOP, None),
    ],
    ids=repr,
)
def test_ranges_that_are_none(given: tuple[Any, Any]) -> None:
    for call in (
        lambda: register(Notifier(), *given),
        lambda: events(*given),
        lambda: aevents(*given),
        lambda: young(*given),
        lambda: invalidating(*given).__enter__(),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"wait_s": -1}, "wait_s"),
        ({"wait_s": float("nan")}, "wait_s"),
        ({"wait_s": float("inf")}, "wait_s"),
        ({"wait_s": "soon"}, "wait_s"),
        ({"wait_s": True}, "wait_s"),
        ({"queue": 0}, "queue"),
        ({"queue": 7}, "queue"),
        ({"queue": 1 << 40}, "queue"),
        ({"queue": 9.5}, "queue"),
        ({"name": 5}, "name"),
        ({"name": "a\0b"}, "name"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        register(Notifier(**settings), bytearray(8))


def test_things_that_are_no_notifier_or_space() -> None:
    for wrong in (None, Notifier, object(), "name"):
        with pytest.raises(InputError, match="expected a Notifier"):
            register(wrong, bytearray(8))  # type: ignore[arg-type]
    for space in (5, "self", os.getpid()):
        with pytest.raises(InputError, match="expected None or a Process"):
            register(Notifier(), bytearray(8), space=space)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a Reason"), invalidating(0, 1, reason=3):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("pid", [0, -1, 1 << 40, "1", 1.0, None])
def test_numbers_that_are_no_process(pid: Any) -> None:
    with pytest.raises(InputError):
        Process(pid)


def test_a_process_that_is_not_there() -> None:
    with pytest.raises(NoProcess, match="there is none") as caught:
        Process(0x7FFFFFFE)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("interval_s", [0, 1e-9, -1, float("nan"), "1", True])
def test_intervals_that_cannot_be(interval_s: Any) -> None:
    with pytest.raises(UspaceError, match="interval_s"):
        Process(os.getpid(), interval_s=interval_s)


def test_memory_is_told_from_addresses() -> None:
    array = np.zeros((4, 6), np.uint32)
    start = array.ctypes.data
    assert as_interval(array, None) == (start, start + 96)
    assert as_interval(array[1:3, 2], None) == (start + 32, start + 60)  # with gaps
    assert as_interval(array[::-1, ::-1], None) == (start, start + 96)
    assert as_interval(array[2, 3:4].reshape(()), None) == (start + 60, start + 64)
    assert as_interval(array.data[1:2], None) == (start + 24, start + 48)
    assert as_interval(np.int64(16), np.uint8(20)) == (16, 20)
    assert as_interval(0, None) == as_interval(None, None) == (0, TOP)

    class Mapped:
        address, length = 4, 8

    assert as_interval(Mapped(), None) == (4, 12)
    data = bytearray(16)
    low, high = as_interval(data, None)
    assert high - low == 16
    data.extend(b"more")  # not held: a bytearray with a buffer out does not grow


def test_every_word_of_an_event_has_a_name_in_python() -> None:
    from uspace_mm._native import lib

    for words, prefix, last in (
        (Source, "UMM_SOURCE_", lib.UMM_SOURCES),
        (Reason, "UMM_REASON_", lib.UMM_REASONS),
        (Promise, "UMM_PROMISE_", lib.UMM_PROMISES),
        (Kind, "UMM_NOTIFY_", lib.UMM_NOTIFY_KINDS),
    ):
        assert [int(word) for word in words] == list(range(last))
        assert all(getattr(lib, prefix + word.name) == word for word in words)
