"""Times as people write them: ``90``, ``90s``, ``5m``, ``1h``."""

from __future__ import annotations

import re

from uspace_mm.errors import InputError

_FACTORS = {"": 1, "s": 1, "m": 60, "h": 3600}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([smh]?)", re.IGNORECASE)


def parse_time(name: str, text: str) -> float:
    """Seconds meant by `text`, the value of the option `name`; raises :class:`InputError` for any other."""
    match = _TIME.fullmatch(text.strip())
    seconds = float(match[1]) * _FACTORS[match[2].lower()] if match else 0.0
    if not 0 < seconds < 1e7:
        raise InputError(f"{name} {text}: expected a time such as 90s, 5m or 1h")
    return seconds
