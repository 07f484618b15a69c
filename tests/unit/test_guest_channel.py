"""Frames between host and agent: what goes in comes out, and whatever is not so is refused, never misread."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uspace_mm.guest import channel
from uspace_mm.guest.channel import (
    HEADER,
    HEADER_BYTES,
    MAGIC,
    PAYLOAD_MAX,
    ChannelError,
    DamagedFrameError,
    Decoder,
    Encoder,
    ExitHow,
    Frame,
    FrameType,
    OrderError,
    TruncatedError,
)

FRAME_H = (Path(__file__).resolve().parents[2] / "native/guest/frame.h").read_text()

frames = st.lists(
    st.builds(Frame, st.sampled_from(list(FrameType)), st.integers(0, 2**32 - 1), st.binary(max_size=200)),
    max_size=12,
)


def encoded(items: list[Frame]) -> bytes:
    encoder = Encoder()
    return b"".join(encoder.encode(frame.type, frame.payload, frame.id) for frame in items)


def constants(prefix: str) -> dict[str, int]:
    code = re.sub(r"/\*.*?\*/", "", FRAME_H, flags=re.DOTALL)
    found = re.findall(rf"\b{prefix}(\w+)\s*=\s*(0x[0-9a-f]+|\d+(?:\s*<<\s*\d+)?)", code)
    return {name: eval(value) for name, value in found}


def test_both_sides_name_the_same_numbers() -> None:
    types = constants("UMM_FRAME_")
    assert types.pop("MAGIC") == MAGIC
    assert types.pop("HEADER") == HEADER_BYTES
    assert types.pop("PAYLOAD_MAX") == PAYLOAD_MAX
    assert types == {kind.name: kind.value for kind in FrameType}
    assert constants("UMM_AGENT_")["PROTOCOL"] == channel.PROTOCOL
    assert constants("UMM_STDIN_")["WINDOW"] == channel.STDIN_WINDOW
    starts = {"TERMINAL": channel.START_TERMINAL, "NO_STDIN": channel.START_NO_STDIN}
    assert constants("UMM_START_") == starts
    assert constants("UMM_EXIT_") == {how.name: how.value for how in ExitHow}


@given(frames, st.lists(st.integers(1, 100), min_size=1))
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(
    items: list[Frame], cuts: list[int]
) -> None:
    data = encoded(items)
    decoder, found, offset, turn = Decoder(), list[Frame](), 0, 0
    while offset < len(data):
        size = cuts[turn % len(cuts)]
        found += decoder.feed(data[offset : offset + size])
        offset, turn = offset + size, turn + 1
    decoder.finish()
    assert found == items


@given(frames.filter(bool), st.data())
def test_one_changed_bit_is_never_taken_for_a_frame(items: list[Frame], data: st.DataObject) -> None:
    stream = bytearray(encoded(items))
    position = data.draw(st.integers(0, len(stream) * 8 - 1))
    stream[position // 8] ^= 1 << position % 8
    decoder, found = Decoder(), list[Frame]()
    with pytest.raises(ChannelError):
        found += decoder.feed(bytes(stream))
        found += decoder.feed(b"")
        decoder.finish()
    assert found == items[: len(found)]
    assert len(found) < len(items)


@given(st.binary(min_size=HEADER_BYTES, max_size=400))
def test_garbage_is_refused_at_once(garbage: bytes) -> None:
    if garbage.startswith(struct.pack("<I", MAGIC)):
        return
    with pytest.raises(DamagedFrameError, match="magic"):
        Decoder().feed(garbage)


@given(frames.filter(bool), st.data())
def test_an_end_within_a_frame_is_noticed(items: list[Frame], data: st.DataObject) -> None:
    stream = encoded(items)
    borders, position = {0}, 0
    for item in items:
        position += HEADER_BYTES + len(item.payload)
        borders.add(position)
    cut = data.draw(st.integers(0, len(stream)).filter(lambda n: n not in borders))
    decoder = Decoder()
    decoder.feed(stream[:cut])
    with pytest.raises(TruncatedError):
        decoder.finish()


def test_a_missing_and_a_repeated_frame_are_noticed() -> None:
    encoder = Encoder()
    first, second, third = (encoder.encode(FrameType.STDOUT, bytes([n])) for n in range(3))
    decoder = Decoder()
    assert len(decoder.feed(first)) == 1
    with pytest.raises(OrderError):
        decoder.feed(third)
    with pytest.raises(OrderError):  # and it stays so
        decoder.feed(second)
    decoder = Decoder()
    decoder.feed(first)
    with pytest.raises(OrderError):
        decoder.feed(first)


def test_a_length_above_the_limit_is_refused_before_its_bytes_are_waited_for() -> None:
    head = HEADER.pack(MAGIC, FrameType.STDOUT, PAYLOAD_MAX + 1, 0, 0, 0)
    with pytest.raises(DamagedFrameError, match="more than"):
        Decoder().feed(head)
    with pytest.raises(ValueError, match="payload"):
        Encoder().encode(FrameType.STDIN, bytes(PAYLOAD_MAX + 1))
    assert Decoder().feed(Encoder().encode(FrameType.STDIN, bytes(PAYLOAD_MAX)))


def test_an_unknown_type_is_refused() -> None:
    head = HEADER.pack(MAGIC, 999, 0, 0, 0, 0)[:-4]
    with pytest.raises(DamagedFrameError, match="type 999"):
        Decoder().feed(head + struct.pack("<I", crc32(head)))


@given(st.binary(max_size=40))
def test_short_payloads_are_damage_and_not_a_crash(payload: bytes) -> None:
    for parse in (channel.parse_exit, channel.parse_file, channel.parse_file_end, channel.parse_fault):
        try:
            parse(payload)
        except DamagedFrameError:
            pass
    try:
        channel.parse_hello(payload)
    except ChannelError:
        pass


def test_payloads_hold_what_they_are_made_of() -> None:
    payload = channel.start_payload(["sh", "-c", "é"], cwd="/tmp", env={"A": "b=c"}, terminal=(24, 80))
    assert struct.unpack_from("<5I", payload) == (1, 24, 80, 3, 1)
    assert payload[20:].split(b"\0") == [b"/tmp", b"sh", b"-c", "é".encode(), b"A=b=c", b""]
    found = channel.parse_file(channel.put_payload("/a\udcff", 1 << 33, 0o755))
    assert found == channel.FileInfo("/a\udcff", 0o755, 1 << 33)
    assert channel.parse_hello(b"protocol=1\npage_size=16384\n")["page_size"] == "16384"
    with pytest.raises(ChannelError, match="protocol 2"):
        channel.parse_hello(b"protocol=2\n")
    with pytest.raises(channel.InvalidCommand, match="NUL"):
        channel.start_payload(["a\0b"])
    with pytest.raises(channel.InvalidCommand, match="no command"):
        channel.start_payload([])
