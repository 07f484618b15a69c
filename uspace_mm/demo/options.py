"""What the sides of the postcopy demo are told, and the named points where a test can hold them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from uspace_mm.errors import InputError

#: Called with a kind of event and its fields: progress for whoever shows it.
Emit = Callable[..., None]

PHASES = ("connect", "precopy", "switch", "postcopy", "verify")
SIDES = ("source", "destination")


@dataclass(frozen=True)
class Options:
    """Options of both sides. Sizes in bytes, times in seconds."""

    size: int = 512 << 20
    input: list[str] = field(default_factory=list)
    rounds: int = 5
    downtime_goal_s: float = 0.05
    seed: int = 1
    steps: int = 100
    timeout_s: float = 10.0
    #: how long the source waits for a destination
    accept_s: float = 60.0
    bulk_bytes_per_s: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    pause_at: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Options:
        return cls(**json.loads(text))

    def check_pause(self) -> None:
        """Raise :class:`InputError` unless ``pause_at`` is empty or ``SIDE:PHASE``."""
        side, _, phase = self.pause_at.partition(":")
        if self.pause_at and (side not in SIDES or phase not in PHASES):
            raise InputError(
                f"--pause-at {self.pause_at!r}: expected SIDE:PHASE, "
                f"a side of {SIDES} and a phase of {PHASES}"
            )

    def pause(self, side: str, phase: str) -> None:
        """Stay here for ever if this is the point where the run is to be held (tests kill it there)."""
        if self.pause_at == f"{side}:{phase}":
            print(f"{side} paused at {phase}, pid {os.getpid()}", file=sys.stderr, flush=True)
            while True:
                time.sleep(3600)


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``, ``[IPV6]:PORT`` or ``:PORT``; raises :class:`InputError`."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise InputError(f"address {text!r}: expected HOST:PORT with a port of 0 to 65535, e.g. 0.0.0.0:7000")
    return host.strip("[]"), int(port)


def ticker(period_s: float, action: Callable[[], Any], stopped: Callable[[float], bool]) -> None:
    """Call `action` every `period_s` until `stopped(period_s)` is true; the body of a thread."""
    while not stopped(period_s):
        action()
