"""Frames between the host and the agent in a guest: this side of ``native/guest/frame.h``.

Nothing here reads or writes: bytes go in and frames come out, and the other way round.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from zlib import crc32

from uspace_mm.errors import InputError, UspaceError

MAGIC = 0x314D4D55
PROTOCOL = 1
HEADER = struct.Struct("<6I")
HEADER_BYTES = HEADER.size
PAYLOAD_MAX = 1 << 20
STDIN_WINDOW = 256 << 10
START_TERMINAL = 1
START_NO_STDIN = 2

_U32 = struct.Struct("<I")
_SEQUENCES = 1 << 32


class FrameType(IntEnum):
    """What a frame is about; who sends it and when is said in ``frame.h``."""

    HELLO = 1
    STARTED = 2
    STDOUT = 3
    STDERR = 4
    REPORT = 5
    EXIT = 6
    FILE = 7
    FILE_DATA = 8
    FILE_END = 9
    GOT = 10
    PONG = 11
    FAULT = 12
    CREDIT = 13
    START = 32
    STDIN = 33
    SIGNAL = 34
    RESIZE = 35
    PUT = 36
    PUT_DATA = 37
    PUT_END = 38
    GET = 39
    PING = 40
    CLOCK = 41
    POWER_OFF = 42


class ExitHow(IntEnum):
    """``enum umm_exit``: what the second number of an EXIT frame is."""

    STATUS = 0
    SIGNAL = 1
    NOT_STARTED = 2


class InvalidCommand(InputError):
    """A command or a name that cannot be told to the agent."""


class ChannelError(UspaceError):
    """The bytes of the channel are not what the protocol says; the conversation cannot go on."""


class DamagedFrameError(ChannelError):
    """Wrong magic number, checksum, length or type."""


class OrderError(ChannelError):
    """A frame is missing, came twice, or came when it must not come."""


class TruncatedError(ChannelError):
    """The channel ended within a frame."""


@dataclass(frozen=True)
class Frame:
    """One frame as it was received."""

    type: FrameType
    id: int
    payload: bytes


class Encoder:
    """Turns frames of one direction into bytes, counting them."""

    def __init__(self) -> None:
        self._sequence = 0

    def encode(self, type: FrameType, payload: bytes | memoryview = b"", id: int = 0) -> bytes:
        """The bytes of the next frame; raises :class:`ValueError` above ``PAYLOAD_MAX`` bytes of payload."""
        if len(payload) > PAYLOAD_MAX:
            raise ValueError(f"payload of {len(payload)} bytes: a frame holds up to {PAYLOAD_MAX}")
        head = HEADER.pack(MAGIC, type, len(payload), id, self._sequence, 0)[: HEADER_BYTES - 4]
        self._sequence = (self._sequence + 1) % _SEQUENCES
        return b"".join((head, _U32.pack(crc32(payload, crc32(head))), payload))


class Decoder:
    """Turns the bytes of one direction into frames, and refuses what is damaged or out of order.

    `sequence` is the number of the first frame. After the first error every call raises it again: what
    follows a damaged frame has no meaning.
    """

    def __init__(self, sequence: int = 0) -> None:
        self._buffer = bytearray()
        self._sequence = sequence
        self._error: ChannelError | None = None

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        """The frames that `data` completes, in order; raises a :class:`ChannelError`.

        Frames that came whole before a damaged one are returned first, and the error by the next call.
        """
        if self._error is not None:
            raise self._error
        self._buffer += data
        frames: list[Frame] = []
        offset = 0
        try:
            while (frame := self._next(offset)) is not None:
                frames.append(frame)
                offset += HEADER_BYTES + len(frame.payload)
        except ChannelError as error:
            self._error = error
            if not frames:
                raise
        del self._buffer[:offset]
        return frames

    def finish(self) -> None:
        """The channel ended: raises :class:`TruncatedError` when that was within a frame."""
        if self._error is not None:
            raise self._error
        if self._buffer:
            raise TruncatedError(f"the channel ended {len(self._buffer)} bytes into a frame")

    def _next(self, offset: int) -> Frame | None:
        if len(self._buffer) - offset < HEADER_BYTES:
            return None
        magic, type_, length, id_, sequence, crc = HEADER.unpack_from(self._buffer, offset)
        # Each is checked before the payload is waited for: a damaged length must not make us wait for ever.
        if magic != MAGIC:
            raise DamagedFrameError(f"frame {self._sequence}: magic number {magic:#x}, expected {MAGIC:#x}")
        if length > PAYLOAD_MAX:
            raise DamagedFrameError(f"frame {self._sequence}: {length} bytes, more than {PAYLOAD_MAX}")
        if sequence != self._sequence:
            raise OrderError(f"frame {self._sequence}: it says that it is number {sequence}")
        begin = offset + HEADER_BYTES
        if len(self._buffer) < begin + length:
            return None
        with memoryview(self._buffer) as view:
            payload = bytes(view[begin : begin + length])
            found = crc32(payload, crc32(view[offset : begin - 4]))
        if found != crc:
            raise DamagedFrameError(
                f"frame {self._sequence}: checksum {found:#010x} of {length} bytes, it says {crc:#010x}"
            )
        try:
            kind = FrameType(type_)
        except ValueError:
            raise DamagedFrameError(f"frame {self._sequence}: type {type_} is not known") from None
        self._sequence = (self._sequence + 1) % _SEQUENCES
        return Frame(kind, id_, payload)


def texts(items: Iterable[str | bytes]) -> bytes:
    """NUL-terminated texts one after the other. Raises :class:`InvalidCommand` for one that holds a NUL."""
    parts = [item if isinstance(item, bytes) else item.encode("utf-8", "surrogateescape") for item in items]
    for part in parts:
        if b"\0" in part:
            raise InvalidCommand(f"{part!r} holds a NUL byte")
    return b"".join(part + b"\0" for part in parts)


def decode_text(data: bytes) -> str:
    """The text of `data`, up to a NUL; names that are no UTF-8 come as Python's file names do."""
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def start_payload(
    argv: list[str],
    *,
    cwd: str = "/",
    env: Mapping[str, str] | None = None,
    terminal: tuple[int, int] | None = None,
    stdin: bool = True,
) -> bytes:
    """The payload of START; `terminal` is (rows, columns). Raises :class:`InvalidCommand`."""
    if not argv:
        raise InvalidCommand("no command given")
    variables = [f"{name}={value}" for name, value in (env or {}).items()]
    rows, columns = terminal or (0, 0)
    flags = (START_TERMINAL if terminal else 0) | (0 if stdin else START_NO_STDIN)
    head = struct.pack("<5I", flags, rows, columns, len(argv), len(variables))
    payload = head + texts([cwd, *argv, *variables])
    if len(payload) > PAYLOAD_MAX:
        raise InvalidCommand(f"{len(payload)} bytes of arguments and environment, more than {PAYLOAD_MAX}")
    return payload


@dataclass(frozen=True)
class ExitInfo:
    """The payload of EXIT: ``number`` is a status, a signal or an errno."""

    how: ExitHow
    number: int
    core_dumped: bool
    out_of_memory: bool
    text: str


def parse_exit(payload: bytes) -> ExitInfo:
    """Raises :class:`DamagedFrameError` for a payload that is no EXIT."""
    how, number, flags = _unpack("<3I", payload, "EXIT")
    try:
        kind = ExitHow(how)
    except ValueError:
        raise DamagedFrameError(f"EXIT: {how} is no way to end") from None
    return ExitInfo(kind, number, bool(flags & 1), bool(flags & 2), decode_text(payload[12:]))


@dataclass(frozen=True)
class FileInfo:
    """The payload of FILE: ``mode`` as in stat(2), ``size`` in bytes when it was opened."""

    path: str
    mode: int
    size: int


def parse_file(payload: bytes) -> FileInfo:
    """Raises :class:`DamagedFrameError` for a payload that is no FILE."""
    mode, size = _unpack("<IQ", payload, "FILE")
    path = decode_text(payload[12:])
    if not path:
        raise DamagedFrameError("FILE: it names no file")
    return FileInfo(path, mode, size)


def parse_file_end(payload: bytes) -> tuple[int, int]:
    """CRC-32 of the file's bytes, and the errno that ended the reading (0: its end)."""
    crc, error = _unpack("<2I", payload, "FILE_END")
    return crc, error


def parse_number(payload: bytes, what: str) -> int:
    """The u32 at the start of a payload."""
    return _unpack("<I", payload, what)[0]


def parse_fault(payload: bytes) -> tuple[int, str]:
    """The errno and text of a FAULT."""
    return _unpack("<I", payload, "FAULT")[0], decode_text(payload[4:])


def put_payload(path: str, size: int, mode: int) -> bytes:
    """The payload of PUT for a file of `size` bytes."""
    return struct.pack("<IQ", mode, size) + texts([path])


def parse_hello(payload: bytes) -> dict[str, str]:
    """The lines NAME=VALUE of HELLO; raises :class:`ChannelError` when the agent speaks another protocol."""
    fields: dict[str, str] = {}
    for line in payload.decode("utf-8", "replace").splitlines():
        name, separator, value = line.partition("=")
        if not separator:
            raise DamagedFrameError(f"HELLO: {line!r} is not NAME=VALUE")
        fields[name] = value
    if fields.get("protocol") != str(PROTOCOL):
        raise ChannelError(f"the agent speaks protocol {fields.get('protocol')}, this package {PROTOCOL}")
    return fields


def _unpack(form: str, payload: bytes, what: str) -> tuple[int, ...]:
    try:
        return struct.unpack_from(form, payload)
    except struct.error:
        raise DamagedFrameError(f"{what}: a payload of {len(payload)} bytes is too short") from None
