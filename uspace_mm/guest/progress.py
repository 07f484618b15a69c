"""What long work says while it runs: a line that is rewritten on a terminal, nothing in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO


class Progress(Protocol):
    """Told what is being done; may be called from any thread."""

    def __call__(self, text: str, done: float | None = None) -> None:
        """`text` says what is happening now; `done` is the part finished, 0 to 1, None when unknown."""


def silent(text: str, done: float | None = None) -> None:
    """Says nothing."""


@contextmanager
def on_terminal(stream: TextIO | None = None) -> Iterator[Progress]:
    """A :class:`Progress` that rewrites one line of stderr, with the time it took; silent in a pipe."""
    out = stream or sys.stderr
    if not out.isatty():
        yield silent
        return
    started = time.monotonic()
    width = 100

    def show(text: str, done: float | None = None) -> None:
        share = "" if done is None else f" {100 * done:3.0f} %"
        line = f"[{time.monotonic() - started:4.0f} s]{share} {text}"
        out.write("\r\x1b[K" + line[:width])
        out.flush()

    try:
        yield show
    finally:
        out.write("\r\x1b[K")
        out.flush()
