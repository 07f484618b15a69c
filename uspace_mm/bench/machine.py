"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import psutil


def _cpu_model() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def _thp_mode() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "absent"
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else text.strip()


def describe_machine() -> dict[str, Any]:
    """The properties of this machine that decide a figure; nothing that identifies it."""
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "page_bytes": os.sysconf("SC_PAGESIZE"),
        "thp": _thp_mode(),
        "python": platform.python_version(),
        "load_1min": os.getloadavg()[0],
    }
