"""What every stage of scripts/test uses: the tally, running a command to its end, telling what happened."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# A stage that takes longer hangs; a test that hangs is ended long before by run_pytest.py or meson.
STAGE_LIMIT_S = 30 * 60


@dataclass
class Tally:
    """What ran: names of the passed, the failed with what was seen, the skipped with their reasons."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def check(self, name: str, ok: bool) -> None:
        (self.passed if ok else self.failed).append(name)


@dataclass
class Outcome:
    """How a command ended. ``status`` is negative for a signal, None when it was out of time."""

    status: int | None
    output: str

    @property
    def ok(self) -> bool:
        return self.status == 0


def say(text: str) -> None:
    print(text, flush=True)


def run(
    *command: str | Path,
    capture: bool = True,
    limit_s: float = STAGE_LIMIT_S,
    env: dict[str, str] | None = None,
) -> Outcome:
    """Run `command` in the tree's root; whatever it leaves behind in its process group is killed."""
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.STDOUT if capture else None,
        text=True,
        errors="replace",
        start_new_session=True,
        env=None if env is None else os.environ | env,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        return Outcome(process.returncode, output or "")
    except subprocess.TimeoutExpired as expired:
        seen = expired.output or b""
        text = seen.decode(errors="replace") if isinstance(seen, bytes) else seen
        return Outcome(None, f"{text}\nout of time: {limit_s:.0f} s")
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # nobody left
    process.wait()


@contextmanager
def stage(name: str, tally: Tally) -> Iterator[None]:
    """Print the stage's name, its counts and its duration."""
    started = time.monotonic()
    before = len(tally.passed), len(tally.failed), len(tally.skipped)
    say(f"== {name}")
    yield
    passed, failed, skipped = (
        after - then
        for after, then in zip(
            (len(tally.passed), len(tally.failed), len(tally.skipped)), before, strict=True
        )
    )
    counts = (
        f"{passed} passed"
        + (f", {failed} FAILED" if failed else "")
        + (f", {skipped} skipped" if skipped else "")
    )
    say(f"   {counts} ({time.monotonic() - started:.1f} s)")


def report(name: str, output: str) -> None:
    say(f"-- FAILED: {name}")
    say("\n".join("   " + line for line in output.strip().splitlines()[-60:]))
