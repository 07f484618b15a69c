"""The report channel's other side: records out of a stream that tests may have written to as well."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from typing import Any

MARK = b"@umm "
_CRC_END = len(MARK) + 8
# Text between the records that is kept: a stack dump has a few thousand bytes.
NOISE_MAX = 64 << 10
# A line that is longer is no record of ours (a report has at most a few sections of reporter.SECTION_MAX).
LINE_MAX = 256 << 20

Record = dict[str, Any]


@dataclass
class Decoder:
    """Takes bytes as they come, gives whole records; what is no record is kept as :attr:`noise`."""

    noise_bytes: int = 0
    _rest: bytearray = field(default_factory=bytearray)
    _noise: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> list[Record]:
        """The records that `data` completes."""
        start = len(self._rest)
        self._rest += data
        if self._rest.find(b"\n", start) < 0:
            if len(self._rest) > LINE_MAX:
                self._keep(bytes(self._rest))
                self._rest.clear()
            return []
        *lines, rest = bytes(self._rest).split(b"\n")
        self._rest = bytearray(rest)
        return [record for line in lines if (record := self._decode(line)) is not None]

    def end(self) -> None:
        """The stream is at its end: an unfinished line is noise."""
        self._keep(bytes(self._rest))
        self._rest.clear()

    def take_noise(self) -> str:
        """What came since the last call and is no record, its last :data:`NOISE_MAX` bytes."""
        text = self._noise.decode(errors="replace").strip("\n")
        self._noise.clear()
        return text

    def _decode(self, line: bytes) -> Record | None:
        if not line:
            return None
        # A record that follows text without a newline begins a line of its own: the writer sees to that.
        if line.startswith(MARK):
            try:
                if int(line[len(MARK) : _CRC_END], 16) == zlib.crc32(line[_CRC_END + 1 :]):
                    record = json.loads(line[_CRC_END + 1 :])
                    if isinstance(record, dict) and isinstance(record.get("kind"), str):
                        return record
            except ValueError:
                pass
        self._keep(line + b"\n")
        return None

    def _keep(self, text: bytes) -> None:
        self.noise_bytes += len(text)
        self._noise += text
        if len(self._noise) > NOISE_MAX:
            del self._noise[:-NOISE_MAX]
