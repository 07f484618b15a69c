"""What the two sides tell each other at the end, and the one result that both show."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from uspace_mm.postcopy.errors import ProtocolError
from uspace_mm.postcopy.receiver import FaultReport

MAP_BINS = 256
# Which state a group of pages shows when its pages differ: the most interesting one. Order of
# `enum umm_page_state`: untouched, sent, missing, urgent, bulk, lost.
_RANK = np.array([0, 1, 4, 3, 2, 5], np.uint8)
_STATE_OF_RANK = np.argsort(_RANK).astype(np.uint8)
STATE_NAMES = ("untouched", "precopied", "missing", "by fault", "streamed", "lost")


def page_map(states: npt.NDArray[np.uint8], bins: int = MAP_BINS) -> str:
    """One state per group of pages, as base64; at most `bins` groups."""
    if not states.size:
        return ""
    starts = np.unique(np.linspace(0, states.size, bins, endpoint=False).astype(np.int64))
    return base64.b64encode(_STATE_OF_RANK[np.maximum.reduceat(_RANK[states], starts)].tobytes()).decode()


def map_states(text: str) -> npt.NDArray[np.uint8]:
    """The states of :func:`page_map`."""
    return np.frombuffer(base64.b64decode(text), np.uint8)


def finish_message(
    steps: int, digest: str, stats: dict[str, int], faults: FaultReport, totals: dict[str, int]
) -> bytes:
    """The destination's FINISH: what it did after the switch, and how its faults went."""
    message = {
        "steps": steps,
        "digest": digest,
        "faults": faults.faults,
        "faults_overtaken": faults.overtaken,
        "fault_p50_ns": faults.p50_ns,
        "fault_p99_ns": faults.p99_ns,
        "fault_p999_ns": faults.p999_ns,
        "slowest_fault_ns": faults.slowest_ns,
        "slowest_fault_stage": faults.slowest_stage,
        "urgent_pages": stats["urgent_pages"],
        "bulk_pages": stats["bulk_pages"],
        "duplicate_pages": stats["duplicate_pages"],
        "last_page_ns": stats["last_page_ns"],
        "switch_ns": stats["switch_ns"],
        "words": totals["words"],
        "lines": totals["lines"],
    }
    return json.dumps(message).encode()


_FINISH_TEXT = ("digest", "slowest_fault_stage")
_FINISH_NUMBERS = (
    "steps", "faults", "faults_overtaken", "fault_p50_ns", "fault_p99_ns", "fault_p999_ns",
    "slowest_fault_ns", "urgent_pages", "bulk_pages", "duplicate_pages", "last_page_ns", "switch_ns",
    "words", "lines",
)  # fmt: skip


def _parse(text: bytes, what: str) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the peer's {what} is no JSON: {error}") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"the peer's {what} is no JSON object")
    return message


def _number(message: dict[str, Any], name: str, what: str, most: int) -> int:
    value = message.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ProtocolError(f"the peer's {what} has no usable {name!r}")
    return value


def parse_finish(text: bytes) -> dict[str, Any]:
    """What :func:`finish_message` made; raises :class:`ProtocolError` for anything else."""
    message = _parse(text, "FINISH")
    result: dict[str, Any] = {name: _number(message, name, "FINISH", 1 << 62) for name in _FINISH_NUMBERS}
    for name in _FINISH_TEXT:
        value = message.get(name)
        if not isinstance(value, str) or len(value) > 64 or not value.isascii() or not value.isprintable():
            raise ProtocolError(f"the peer's FINISH has no usable {name!r}")
        result[name] = value
    if result["steps"] > 1_000_000:
        raise ProtocolError(f"the destination claims {result['steps']} steps: too many to repeat")
    return result


def parse_state(text: bytes) -> dict[str, int]:
    """The state of the work in SWITCH's STATE; raises :class:`ProtocolError`."""
    message = _parse(text, "STATE")
    if message.get("version") != 1:
        raise ProtocolError(
            f"the state of the work has version {message.get('version')!r}, this side knows 1"
        )
    return {name: _number(message, name, "STATE", 1 << 40) for name in ("steps", "steps_after")}


def parse_verdict(text: bytes) -> dict[str, Any]:
    """The source's VERDICT: the result of :func:`combine`; raises :class:`ProtocolError`."""
    message = _parse(text, "VERDICT")
    for name in ("pages_total", "pages_verified", "pages_mismatched", "faults", "rounds", "bytes_sent"):
        _number(message, name, "VERDICT", 1 << 62)
    for name in ("downtime_ms", "total_s"):
        if not isinstance(message.get(name), (int, float)):
            raise ProtocolError(f"the peer's VERDICT has no usable {name!r}")
    if not isinstance(message.get("work_matches"), bool) or not isinstance(message.get("ok"), bool):
        raise ProtocolError("the peer's VERDICT does not say whether the work matches")
    return message


def combine(
    stats: dict[str, int], finish: dict[str, Any], *, work_matches: bool, total_s: float
) -> dict[str, Any]:
    """The result of a migration, from the sender's `stats` and the destination's `finish`."""
    result: dict[str, Any] = {
        "pages_total": stats["pages_total"],
        "page_size": stats["page_size"],
        "pages_verified": stats["verified"],
        "pages_mismatched": stats["mismatched"],
        "zero_pages": stats["zero_pages"],
        "rounds": stats["rounds"],
        "precopy_pages": stats["precopy_pages"],
        "missing_pages": stats["missing_pages"],
        "downtime_ms": round(stats["downtime_ns"] / 1e6, 3),
        "total_s": round(total_s, 4),
        "last_page_ms": round((stats["downtime_ns"] + finish["last_page_ns"]) / 1e6, 3),
        "bytes_sent": stats["bytes_sent"],
        "requests": stats["requests"],
        "work_matches": work_matches,
        "work_steps_after_switch": finish["steps"],
        "work_digest": finish["digest"],
    }
    result |= {name: finish[name] for name in _FINISH_NUMBERS if name not in ("steps", "last_page_ns")}
    result["slowest_fault_stage"] = finish["slowest_fault_stage"]
    result["ok"] = (
        work_matches and result["pages_mismatched"] == 0 and stats["verified"] == stats["pages_total"]
    )
    return result
