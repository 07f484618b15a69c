"""Events as an iterator and as an asyncio stream."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from uspace_mm.errors import InputError
from uspace_mm.notifier import (
    Kind,
    Process,
    Reason,
    aevents,
    changed,
    events,
    invalidating,
    this_process,
    young,
)


@pytest.fixture
def memory() -> np.ndarray:
    return np.zeros(1 << 12, np.uint8)


def change(memory: np.ndarray, times: int = 1) -> None:
    for _ in range(times):
        with invalidating(memory):
            pass


def test_events_are_iterated_in_order(memory: np.ndarray) -> None:
    with events(memory, timeout_s=0.0) as stream:
        assert list(stream) == []
        change(memory[:10])
        changed(memory[:20])
        assert young(memory) == (False, 0), "nobody waits for a stream's answer"
        found = [(event.kind, event.length) for event in stream]
        assert found == [(Kind.START, 10), (Kind.END, 10), (Kind.CHANGE, 20)]
        change(memory[:5])
        assert next(stream).length == 5  # an end by timeout is not for good
    assert list(stream) == []
    stream.close()


def test_the_side_that_changes_memory_does_not_wait_for_a_reader(memory: np.ndarray) -> None:
    with events(memory, timeout_s=0.0, queue=8) as stream:
        change(memory, 1000)
        found = list(stream)
    assert len(found) <= 10
    assert [event.reason for event in found[-2:]] == [Reason.LOST, Reason.LOST]
    assert [event.kind for event in found[-2:]] == [Kind.START, Kind.END]


def test_a_waiting_reader_is_woken(memory: np.ndarray) -> None:
    with events(memory) as stream:
        changer = threading.Timer(0.05, change, [memory])
        changer.start()
        assert next(stream).kind is Kind.START
        changer.join()


def test_the_end_of_a_process_ends_the_stream() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with Process(child.pid, interval_s=None) as process, events(space=process) as stream:
        child.kill()
        child.wait()
        assert [(event.kind, event.reason) for event in stream] == [(Kind.RELEASE, Reason.EXIT)]


def test_an_asyncio_stream(memory: np.ndarray) -> None:
    async def read(count: int) -> list[Kind]:
        found = []
        async with aevents(memory) as stream:
            asyncio.get_running_loop().call_later(0.05, change, memory, count)
            async for event in stream:
                found.append(event.kind)
                if len(found) == 2 * count:
                    break
        return found

    async def both() -> tuple[list[Kind], list[Kind]]:
        return await asyncio.gather(read(1), read(3))

    first, second = asyncio.run(both())
    assert first == [Kind.START, Kind.END]
    assert second == [Kind.START, Kind.END] * 3


def test_an_asyncio_reader_that_is_cancelled_closed_or_not_alone(memory: np.ndarray) -> None:
    async def main() -> None:
        stream = aevents(memory)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(stream), 0.02)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.01)
        with pytest.raises(InputError, match="another task"):
            await anext(stream)
        change(memory)
        assert (await waiting).kind is Kind.START
        assert (await anext(stream)).kind is Kind.END
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.01)
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await waiting
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await stream.aclose()

    asyncio.run(main())
    assert this_process().registrations == 0


def test_ctrl_c_ends_a_waiting_iterator() -> None:
    # Who runs tests in the background has SIGINT ignored, and children inherit that.
    code = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from uspace_mm.notifier import events\nprint('waiting', flush=True)\nnext(events())"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(0.1)
    os.kill(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert err.rstrip().endswith("KeyboardInterrupt")
