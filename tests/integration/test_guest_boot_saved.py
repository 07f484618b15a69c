"""Guests that go on from a saved state: as good as booted ones, with their own clock and random numbers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.integration.guest_boot import SMALL, any_kernel, root, run
from uspace_mm.guest import cache
from uspace_mm.guest.boot import Deadlines, Guest, GuestError, Machine, saved
from uspace_mm.guest.boot.conversation import Conversation
from uspace_mm.guest.outcome import Exited, TimedOut


class Steps:
    """What was said while a guest was made ready."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def __call__(self, text: str, done: float | None = None) -> None:
        self.said.append(text)

    @property
    def boots(self) -> int:
        return sum(text.startswith("booting") for text in self.said)


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """States go to a cache of the test's own; kernel and root come from the user's before."""
    any_kernel(), root()
    monkeypatch.setattr(saved, "is_emulated", lambda: True)
    monkeypatch.setenv("UMM_GUEST_CACHE", str(tmp_path / "cache"))
    return Steps()


@pytest.fixture(scope="module")
def parts() -> tuple[object, object, object]:
    return *any_kernel(), root()


def resumed(parts: tuple[object, ...], steps: Steps, machine: Machine = SMALL) -> Guest:
    kernel, size, files = parts
    return saved.resume(kernel, size, files, machine, deadlines=Deadlines(), progress=steps)  # type: ignore[arg-type]


@pytest.mark.slow
def test_guests_from_one_state(parts: tuple[object, ...], steps: Steps) -> None:
    seen = []
    for _ in range(2):
        with resumed(parts, steps) as guest:
            assert guest.hello.page_size == parts[1].bytes  # type: ignore[attr-defined]
            assert "Linux version" in guest.console
            script = (
                "date +%s; getconf PAGESIZE; ls /tmp; head -c 16 /dev/urandom | od -An -tx1; touch /tmp/mark"
            )
            outcome, output = run(guest, "sh", "-c", script)
            assert outcome == Exited(0)
            now, page, *mark_and_random = output.out.decode().split()
            assert abs(int(now) - time.time()) < 60
            assert int(page) == guest.hello.page_size
            assert "mark" not in mark_and_random, "what one guest wrote is not there in the next"
            seen.append(mark_and_random)
            assert run(guest, "cat", stdin=b"input")[1].out == b"input"
    assert steps.boots == 1
    assert seen[0] != seen[1], "both had the same random numbers"


@pytest.mark.slow
def test_a_damaged_state_is_made_again(parts: tuple[object, ...], steps: Steps) -> None:
    resumed(parts, steps).close()
    (state,) = cache.cache_root().glob(f"{saved.KIND}/*/state")
    state.write_bytes(os.urandom(state.stat().st_size))
    with resumed(parts, steps) as guest:
        assert run(guest, "true")[0] == Exited(0)
    assert steps.boots == 2


@pytest.mark.slow
def test_a_state_that_leads_nowhere_is_booted_instead_and_forgotten(
    parts: tuple[object, ...], steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Conversation.set_clock

    def no_answer(self: Conversation, entropy: bytes, limit_s: float) -> None:
        monkeypatch.setattr(Conversation, "set_clock", real)
        raise GuestError(TimedOut("end", limit_s))

    monkeypatch.setattr(Conversation, "set_clock", no_answer)
    with resumed(parts, steps) as guest:
        assert run(guest, "true")[0] == Exited(0)
    assert steps.boots == 2
    assert not list(cache.cache_root().glob(f"{saved.KIND}/*/state"))


def test_a_state_belongs_to_what_it_was_made_of(parts: tuple[object, ...], tmp_path: Path) -> None:
    kernel, size, files = parts

    def inputs(**machine: int) -> object:
        return saved._inputs(kernel, size, files, Machine(**machine))  # type: ignore[arg-type]

    assert inputs() == inputs()
    assert len({str(inputs()), str(inputs(cpus=1)), str(inputs(memory_bytes=SMALL.memory_bytes))}) == 3
    before = tmp_path / "file"
    before.write_bytes(b"1")
    first = saved._identity(before)
    os.utime(before, ns=(first[2], first[2]))  # type: ignore[arg-type]
    before.write_bytes(b"2")
    assert saved._identity(before) != first


def test_a_cache_that_cannot_be_written_to_still_boots(
    parts: tuple[object, ...], steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UMM_GUEST_CACHE", "/proc/nowhere")
    with resumed(parts, steps) as guest:
        assert run(guest, "true")[0] == Exited(0)
