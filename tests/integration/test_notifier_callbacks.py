"""Notifiers of Python: what they are told, and what their callbacks may do, or do wrong."""

from __future__ import annotations

import logging
import threading
import time

import numpy as np
import pytest

from uspace_mm.notifier import (
    Event,
    Kind,
    Notifier,
    Promise,
    ReadTimeout,
    Reason,
    Registration,
    Source,
    TryAgain,
    WouldDeadlock,
    changed,
    in_callback,
    invalidate_page,
    invalidating,
    register,
    this_process,
    young,
)


class Recorder(Notifier):
    """Keeps what it is told."""

    def __init__(self) -> None:
        # Without super().__init__: a subclass may forget it.
        self.events: list[Event] = []
        self.threads: set[str] = set()
        self.used = False

    def _keep(self, event: Event) -> None:
        assert in_callback() or event.reason is Reason.UNREGISTER
        self.events.append(event)
        self.threads.add(threading.current_thread().name)

    release = invalidate_range_start = invalidate_range_end = invalidate_page = change = _keep

    def age(self, event: Event) -> bool:
        self._keep(event)
        return self.used

    def settle(self) -> list[Event]:
        """All events, those included that nobody waits for: ends."""
        while (stats := self.stats()).queued or stats.busy_s:
            time.sleep(0.001)
        return self.events

    def kinds(self) -> list[Kind]:
        return [event.kind for event in self.settle()]


@pytest.fixture
def memory() -> np.ndarray:
    return np.zeros(1 << 16, np.uint8)


def test_start_comes_before_and_end_after(memory: np.ndarray) -> None:
    recorder = Recorder()
    with register(recorder, memory) as registration:
        before = this_process().generation
        with invalidating(memory[100:200], reason=Reason.MOVE) as change:
            assert [event.kind for event in recorder.events] == [Kind.START]
            change.moved_to = 77
        assert this_process().generation > before
        assert recorder.kinds() == [Kind.START, Kind.END]
        assert not registration.released
    start, end, release = recorder.events
    address = memory.ctypes.data
    assert (start.start, start.end, start.length) == (address + 100, address + 200, 100)
    assert (start.source, start.reason, start.promise) == (Source.USER, Reason.MOVE, Promise.ORDERED)
    assert start.ordered
    assert start.blockable
    assert not start.voluntary
    assert (start.to, end.to, end.error) == (None, 77, 0)
    assert (start.id, start.registration) == (end.id, registration)
    assert (release.kind, release.reason, release.source) == (
        Kind.RELEASE,
        Reason.UNREGISTER,
        Source.LIBRARY,
    )
    assert registration.released
    assert registration.closed
    # All but that last one, which ran where the registration was closed, in its own thread.
    assert recorder.threads == {"umm Recorder", threading.current_thread().name}


def test_pages_changes_and_ages(memory: np.ndarray) -> None:
    recorder, other = Recorder(), Recorder()
    with register(recorder, memory), register(other, memory):
        invalidate_page(memory[:1], reason=Reason.POISON)
        changed(memory[:1])
        assert recorder.kinds() == [Kind.PAGE, Kind.CHANGE]
        assert [event.reason for event in recorder.events] == [Reason.POISON, Reason.BACKING]
        assert young(memory) == (False, 2)
        other.used = True
        assert young(memory) == (True, 2)
    assert young(memory) == (False, 0)


def test_a_change_elsewhere_is_not_told(memory: np.ndarray) -> None:
    recorder = Recorder()
    with register(recorder, memory[1000:2000]) as registration:
        seq = registration.read_begin()
        for elsewhere in (memory[:1000], memory[2000:], memory[999:1000], memory[2000:2001]):
            with invalidating(elsewhere):
                pass
        assert recorder.events == []
        assert not registration.read_retry(seq)
        with invalidating(memory[1999:2000]):
            assert registration.read_retry(seq)
            with pytest.raises(ReadTimeout, match="0.15 s"):
                registration.read_begin(0.15)
        assert registration.read_retry(seq)
        assert not registration.read_retry(registration.read_begin(1.0))


def test_a_failed_change_has_its_end_with_the_errno(memory: np.ndarray) -> None:
    recorder = Recorder()
    with register(recorder, memory):
        with pytest.raises(OSError, match="full"), invalidating(memory):
            raise OSError(28, "full")
        with pytest.raises(ZeroDivisionError), invalidating(memory):
            raise ZeroDivisionError
        recorder.settle()
    assert [event.error for event in recorder.events if event.kind is Kind.END] == [28, 5]


def test_nested_changes_are_paired(memory: np.ndarray) -> None:
    recorder = Recorder()
    with register(recorder, memory):
        with invalidating(memory), invalidating(memory[5:9]):
            pass
        recorder.settle()
    ids = [(event.kind, event.id) for event in recorder.events[:4]]
    outer, inner = ids[0][1], ids[1][1]
    assert ids == [(Kind.START, outer), (Kind.START, inner), (Kind.END, inner), (Kind.END, outer)]


@pytest.mark.parametrize("fault", [ValueError("of the test"), SystemExit(3), KeyboardInterrupt()])
def test_an_exception_is_reported_and_counted_and_loses_nothing(
    memory: np.ndarray, caplog: pytest.LogCaptureFixture, fault: BaseException
) -> None:
    class Faulty(Recorder):
        def invalidate_range_start(self, event: Event) -> None:
            super().invalidate_range_start(event)
            raise fault

        def age(self, event: Event) -> bool:
            raise fault

    faulty, other = Faulty(), Recorder()
    with (
        caplog.at_level(logging.ERROR, "uspace_mm.notifier"),
        register(faulty, memory),
        register(other, memory),
    ):
        for _ in range(3):
            with invalidating(memory):
                pass
        assert young(memory) == (True, 2), "what cannot be asked counts as used"
        assert other.kinds() == [Kind.START, Kind.END] * 3 + [Kind.AGE]
    assert [event.kind for event in faulty.events] == [Kind.START, Kind.END] * 3 + [Kind.RELEASE]
    assert faulty.stats().failed == 4
    assert faulty.stats().calls[Kind.START] == 3
    assert other.stats().failed == 0
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 4
    assert messages[0].startswith("notifier Faulty: start other 0x")
    assert f"raised {type(fault).__name__}" in messages[0]
    assert all("\n" not in message for message in messages)
    assert "test_notifier_callbacks.py:" in messages[0]


class Slow(Recorder):
    """Answers when it may."""

    name = "the slow one"
    wait_s: float | None = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.may_go = threading.Event()
        self.entered = threading.Event()

    def invalidate_range_start(self, event: Event) -> None:
        super().invalidate_range_start(event)
        self.entered.set()
        self.may_go.wait()


def test_a_late_callback_is_reported_by_name_and_gone_past(
    memory: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    slow, other = Slow(), Recorder()
    with (
        caplog.at_level(logging.WARNING, "uspace_mm.notifier"),
        register(slow, memory),
        register(other, memory),
    ):
        with invalidating(memory):
            assert other.settle()[-1].kind is Kind.START
        with invalidating(memory):  # while it still has not answered: not even waited for
            pass
        while not caplog.records:
            time.sleep(0.01)
        slow.may_go.set()
        with invalidating(memory):
            pass
        slow.settle()
        other.settle()
    message = caplog.records[0].getMessage()
    assert message.startswith("notifier the slow one: no answer for 0.")
    assert "start other" in message
    assert len(caplog.records) == 1, "once for each time it is stuck"
    assert slow.stats().late >= 1
    assert other.kinds() == [Kind.START, Kind.END] * 3 + [Kind.RELEASE]
    assert Reason.LOST in [event.reason for event in slow.events]
    starts, ends = slow.stats().calls[Kind.START], slow.stats().calls[Kind.END]
    assert starts == ends


def test_who_keeps_what_it_has_puts_voluntary_changes_off(memory: np.ndarray) -> None:
    slow = Slow()
    slow.keep = True
    with register(slow, memory):
        with pytest.raises(TryAgain, match="late"), invalidating(memory, voluntary=True):
            pytest.fail("the change was made")
        slow.may_go.set()
        slow.wait_s = 1.0
        with invalidating(memory):
            pass


def test_who_cannot_wait_is_told_to_try_again(memory: np.ndarray) -> None:
    recorder = Recorder()
    with register(recorder, memory):
        with pytest.raises(TryAgain, match="would have to wait"), invalidating(memory, blockable=False):
            pytest.fail("the change was made")
        assert recorder.stats().again == 1
    with invalidating(memory, blockable=False):
        pass


@pytest.mark.parametrize("wait_s", [None, 0])
def test_nobody_waits_for_who_does_not_ask_for_it(memory: np.ndarray, wait_s: float | None) -> None:
    slow = Slow()
    slow.wait_s = wait_s
    with register(slow, memory):
        with invalidating(memory):
            pass
        with invalidating(memory, blockable=False):
            pass
        slow.entered.wait()
        assert slow.stats().late == 0
        slow.may_go.set()
    assert slow.stats().lost == 0


def test_a_full_queue_is_told_as_lost(memory: np.ndarray) -> None:
    slow = Slow()
    slow.wait_s, slow.queue = None, 8
    with register(slow, memory) as registration:
        for page in range(100):
            with invalidating(memory[page : page + 1]):
                pass
        assert slow.stats().lost > 0
        slow.may_go.set()
        while not any(event.reason is Reason.LOST and event.kind is Kind.END for event in slow.events):
            time.sleep(0.01)
        assert not registration.closed
    lost = next(event for event in slow.events if event.reason is Reason.LOST)
    told = {event.start - memory.ctypes.data for event in slow.events if event.reason is Reason.OTHER}
    covered = range(lost.start - memory.ctypes.data, lost.end - memory.ctypes.data)
    assert told | set(covered) == set(range(100))
    assert lost.source is Source.LIBRARY


def test_a_callback_may_close_its_own_registration_and_make_others(memory: np.ndarray) -> None:
    made: list[Registration] = []

    class Once(Recorder):
        def invalidate_range_start(self, event: Event) -> None:
            super().invalidate_range_start(event)
            assert event.registration is not None
            made.append(register(other, memory))
            event.registration.close()

    once, other = Once(), Recorder()
    registration = register(once, memory)
    for _ in range(3):
        with invalidating(memory):
            pass
    assert once.kinds() == [Kind.START, Kind.RELEASE]
    assert registration.closed
    assert other.kinds()[-4:] == [Kind.START, Kind.END] * 2
    made[0].close()


def test_release_may_close_other_registrations(memory: np.ndarray) -> None:
    recorder = Recorder()
    second = register(recorder, memory)

    class Both(Recorder):
        def release(self, event: Event) -> None:
            super().release(event)
            second.close()

    both = Both()
    first = register(both, memory)
    first.close()
    assert (both.kinds(), recorder.kinds()) == ([Kind.RELEASE], [Kind.RELEASE])


def test_what_would_wait_for_the_callback_itself_is_refused(memory: np.ndarray) -> None:
    class Reading(Recorder):
        def invalidate_range_start(self, event: Event) -> None:
            assert event.registration is not None
            with pytest.raises(WouldDeadlock, match="read_begin in a callback"):
                event.registration.read_begin(1.0)
            super().invalidate_range_start(event)

    reading = Reading()
    with register(reading, memory):
        with invalidating(memory):
            pass
        reading.settle()
    assert len(reading.events) == 3


def test_two_callbacks_that_close_each_other(memory: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    both_in = threading.Barrier(2)

    class Closing(Recorder):
        wait_s = 10.0
        victim: Registration

        def invalidate_range_start(self, event: Event) -> None:
            super().invalidate_range_start(event)
            both_in.wait()
            self.victim.close()

    first, second = Closing(), Closing()
    one, two = register(first, memory[:10]), register(second, memory[10:20])
    first.victim, second.victim = two, one

    def change(where: np.ndarray) -> None:
        with invalidating(where):
            pass

    threads = [threading.Thread(target=change, args=(where,)) for where in (memory[:10], memory[10:20])]
    with caplog.at_level(logging.ERROR, "uspace_mm.notifier"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        while not caplog.records:  # of a callback that the changes did not wait for to its end
            time.sleep(0.01)
    assert one.closed
    assert two.closed
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "raised uspace_mm.notifier.errors.WouldDeadlock" in messages[0]


def test_closing_waits_for_the_callback_that_runs(memory: np.ndarray) -> None:
    slow = Slow()
    registration = register(slow, memory)
    closers = [threading.Thread(target=registration.close) for _ in range(3)]

    def change() -> None:
        with invalidating(memory):
            pass

    changer = threading.Thread(target=change)
    changer.start()
    slow.entered.wait()
    for thread in closers:
        thread.start()
    closers[0].join(0.05)
    assert all(thread.is_alive() for thread in closers)
    slow.may_go.set()
    for thread in [changer, *closers]:
        thread.join()
    assert slow.kinds().count(Kind.RELEASE) == 1


def test_ten_thousand_intervals_on_one_notifier() -> None:
    memory = np.zeros(10_000 * 16, np.uint8)
    recorder = Recorder()
    recorder.queue = 1 << 12
    registrations = [register(recorder, memory[16 * n : 16 * n + 8]) for n in range(10_000)]
    try:
        threads = threading.active_count()
        with invalidating(memory[16 * 700 + 3 : 16 * 703]):
            pass
        starts = [event.registration for event in recorder.events if event.kind is Kind.START]
        assert starts == registrations[700:703]
        recorder.settle()
        with invalidating(memory[16 * 700 + 8 : 16 * 701]):  # between two
            pass
        assert len(recorder.events) == 6
        assert this_process().registrations == 10_000
        assert threads == threading.active_count()
    finally:
        for registration in registrations:
            registration.close()
    assert recorder.kinds().count(Kind.RELEASE) == 10_000
    assert this_process().registrations == 0


def test_a_notifier_serves_again_after_its_last_registration(memory: np.ndarray) -> None:
    recorder = Recorder()
    for count in (1, 2, 3):
        with register(recorder, memory), register(recorder, memory[:10]), invalidating(memory):
            pass
        assert recorder.stats().calls[Kind.START] == 2 * count
        assert threading.active_count() == 1
    assert recorder.stats().calls[Kind.RELEASE] == 6
