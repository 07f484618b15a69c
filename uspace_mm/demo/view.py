"""The postcopy demo on a terminal: pages by state, faults, latency, while it happens."""

from __future__ import annotations

import sys
import time
from collections import Counter
from socket import gethostname
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from uspace_mm.demo.options import SIDES
from uspace_mm.demo.report import STATE_NAMES, map_states
from uspace_mm.sizes import format_size

STATE_COLOURS = ("grey30", "green4", "red3", "gold1", "deep_sky_blue1", "magenta")
_PHASES = {
    "text": "filling memory with text",
    "listening": "waiting for the destination",
    "connected": "precopy: the source works, pages go over",
    "switched": "the switch: the source has stopped",
    "running": "postcopy: the destination works, pages follow",
    "verified": "every page compared; the destination works on",
    "complete": "every page compared; the destination works on",
}


def microseconds(ns: float) -> str:
    """`ns` nanoseconds for people: ``12.3 us`` or ``4.5 ms``."""
    return f"{ns / 1e3:.1f} us" if ns < 1e6 else f"{ns / 1e6:.2f} ms"


def _bar(states: str, width: int) -> Text:
    cells = map_states(states)
    bar = Text()
    for cell in range(width if cells.size else 0):
        group = cells[
            cell * cells.size // width : max((cell + 1) * cells.size // width, cell * cells.size // width + 1)
        ]
        bar.append("█", STATE_COLOURS[Counter(group.tolist()).most_common(1)[0][0]])
    return bar


def _announce(host: str, port: int) -> None:
    """Tell people what to start on the other host."""
    reachable = gethostname() if host in ("", "0.0.0.0", "::") else host
    listening, connect = (f"[{name}]" if ":" in name else name for name in (host, reachable))
    text = f"listening on {listening}:{port}; start the destination with --connect {connect}:{port}"
    print(text, file=sys.stderr, flush=True)


class View:
    """Collects the events of both sides; draws them if stderr is a terminal.

    `announce`: say where the source listens, for whoever starts the destination by hand.
    """

    def __init__(self, live: bool | None = None, announce: bool = False) -> None:
        self.announce = announce
        self.console = Console(stderr=True)
        self.live = sys.stderr.isatty() if live is None else live
        self.phase = "starting"
        self.progress: dict[str, dict[str, Any]] = {}
        self.rounds: list[dict[str, Any]] = []
        self.details: dict[str, Any] | None = None
        self.source_timeline: list[tuple[float, str]] = []
        self._began = time.monotonic()
        self._fault_rate = 0.0
        self._faults_before = (0.0, 0)
        self._display: Live | None = None

    def __enter__(self) -> View:
        if self.live:
            self._display = Live(
                self.render(),
                console=self.console,
                refresh_per_second=10,
                transient=True,
                redirect_stderr=False,
            )
            self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None

    def show(self, event: dict[str, Any]) -> None:
        """Take one event of a side."""
        kind = event["event"]
        self.phase = _PHASES.get(kind, self.phase)
        match kind:
            case "progress":
                self._take_progress(event)
            case "round":
                self.rounds.append(event)
            case "listening" if event["side"] == "source" and self.announce:
                _announce(event["host"], event["port"])
            case "details":
                self.details = event
        if self._display is not None:
            self._display.update(self.render())

    def emit(self, side: str) -> Any:
        """A function that a side in this process can emit events with."""
        return lambda kind, **fields: self.show({"event": kind, "side": side, **fields})

    def _take_progress(self, event: dict[str, Any]) -> None:
        now = time.monotonic() - self._began
        self.progress[event["side"]] = event
        if event["side"] == "source":
            self.source_timeline.append((now, event["map"]))
        else:
            then, before = self._faults_before
            if now > then:
                self._fault_rate = (event["faults"] - before) / (now - then)
            self._faults_before = (now, event["faults"])

    def render(self) -> RenderableType:
        """What is on the screen now."""
        width = max(min(self.console.width - 20, 120), 10)
        lines: list[Text] = [Text(self.phase, "bold")]
        if self.rounds:
            last = self.rounds[-1]
            text = f"round {last['number']}: {last['pages']:,} pages, {last['rest']:,} written meanwhile"
            lines.append(Text(text))
        for side in (side for side in SIDES if side in self.progress):
            event = self.progress[side]
            stats = event["stats"]
            sends = side == "source"
            moved = f"{format_size(stats['bytes_sent'])} sent" if sends else ""
            moved = moved or f"{format_size(stats['bytes_received'])} received"
            lines.append(Text(f"{side:<12}", "bold") + _bar(event["map"], width))
            text = f"{'':<12}step {event['steps']:,}, {moved}"
            if side == "destination" and stats["missing_pages"]:
                text += f", {stats['arrived_pages']:,} of {stats['missing_pages']:,} missing pages here"
                text += f"\n{'':<12}{event['faults']:,} faults ({self._fault_rate:,.0f}/s), "
                text += f"p50 {microseconds(event['p50_ns'])}, p99 {microseconds(event['p99_ns'])}"
            lines.append(Text(text))
        legend = Text(" " * 12)
        for name, colour in zip(STATE_NAMES, STATE_COLOURS, strict=True):
            legend.append("█ ", colour)
            legend.append(f"{name}  ")
        return Panel(Group(*lines, legend), title="postcopy", title_align="left")
