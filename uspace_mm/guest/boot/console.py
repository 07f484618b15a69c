"""What a guest's console said: bounded, and the report of a crash found in it."""

from __future__ import annotations

import re

HEAD_BYTES = 256 << 10
TAIL_BYTES = 256 << 10

# Where the kernel's report of a crash begins (arch/arm64: traps.c, fault.c; lib/bug.c, kernel/panic.c).
_REPORT = re.compile(
    r"^.*(Unable to handle kernel|Internal error: |kernel BUG at|Oops|Bad mode in|SError Interrupt"
    r"|BUG: |Kernel panic - not syncing).*$",
    re.MULTILINE,
)
_PANIC = "Kernel panic - not syncing"


class Console:
    """The first and the last part of what was printed: a guest that prints for ever fills no memory here."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = bytearray()
        self._dropped = 0

    def add(self, data: bytes) -> None:
        """More of it."""
        room = HEAD_BYTES - len(self._head)
        self._head += data[:room]
        self._tail += data[max(room, 0) :]
        if len(self._tail) > 2 * TAIL_BYTES:
            surplus = len(self._tail) - TAIL_BYTES
            del self._tail[:surplus]
            self._dropped += surplus

    def prepend(self, data: bytes) -> None:
        """What was printed before all else."""
        self._head[:0] = data[:HEAD_BYTES]

    @property
    def is_empty(self) -> bool:
        return not self._head

    @property
    def text(self) -> str:
        """What there is, with a line that says how much was left out in the middle."""
        gap = f"\n[... {self._dropped} bytes left out ...]\n".encode() if self._dropped else b""
        return (bytes(self._head) + gap + bytes(self._tail)).decode(errors="replace").replace("\r\n", "\n")


def panicked(text: str) -> bool:
    """Whether the kernel says that it panicked: for kernels without a driver that tells QEMU of it."""
    return _PANIC in text


def halted(text: str) -> bool:
    """Whether the kernel's last words are that it halted, which QEMU does not hear of."""
    return "reboot: System halted" in text[-2000:]


def crash_report(text: str) -> str:
    """The kernel's report from its first line on; all of the end of the console when there is none."""
    end = text.rfind(_PANIC)
    # The report that led to the panic, not one of a warning long before it.
    begin = max(0, end - 16_000) if end >= 0 else 0
    match = _REPORT.search(text, begin)
    return text[match.start() :] if match else text[-2000:]
