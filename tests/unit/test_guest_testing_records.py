"""The report channel: records come out of whatever else is written to it."""

from __future__ import annotations

import json
import os
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uspace_mm.guest.testing.records import NOISE_MAX, Decoder, Record
from uspace_mm.guest.testing.reporter import Channel


def line(**fields: object) -> bytes:
    text = json.dumps(fields).encode()
    return b"\n@umm %08x %s\n" % (zlib.crc32(text), text)


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 50))
def test_records_survive_garbage_in_any_pieces(garbage: list[bytes], piece: int) -> None:
    stream = b"".join(part + line(kind="start", number=i) for i, part in enumerate(garbage))
    decoder = Decoder()
    found: list[Record] = []
    for start in range(0, len(stream), piece):
        found += decoder.feed(stream[start : start + piece])
    decoder.end()
    assert [record["number"] for record in found] == list(range(len(garbage)))


def test_damaged_records_are_noise() -> None:
    good = line(kind="start", id="a")
    decoder = Decoder()
    assert decoder.feed(good.replace(b'"a"', b'"b"')) == []
    assert decoder.feed(b"@umm zzzzzzzz {}\n@umm\n") == []
    assert "@umm zzzzzzzz {}" in decoder.take_noise()
    assert decoder.take_noise() == ""
    assert decoder.feed(good) == [{"kind": "start", "id": "a"}]


def test_json_that_is_no_record_is_noise() -> None:
    decoder = Decoder()
    for text in (b"[1]", b'"kind"', b'{"id": 1}', b'{"kind": 3}'):
        assert decoder.feed(b"@umm %08x %s\n" % (zlib.crc32(text), text)) == []
    assert decoder.noise_bytes > 0


def test_noise_is_bounded_and_keeps_its_end() -> None:
    decoder = Decoder()
    for _ in range(100):
        decoder.feed(b"x" * 10_000 + b"\n")
    decoder.feed(b"Fatal Python error\n")
    assert decoder.noise_bytes > 1_000_000
    noise = decoder.take_noise()
    assert len(noise) <= NOISE_MAX and noise.endswith("Fatal Python error")


def test_what_the_reporter_writes_is_read_back() -> None:
    reading, writing = os.pipe()
    try:
        channel = Channel(writing)
        channel.write("report", text="ünï \udcff \n@umm", number=3)
        os.write(writing, b"no newline")
        channel.write("end")
        found = Decoder().feed(os.read(reading, 1 << 16))
    finally:
        os.close(reading)
        os.close(writing)
    assert found == [{"kind": "report", "text": "ünï \udcff \n@umm", "number": 3}, {"kind": "end"}]


def test_a_forked_child_does_not_speak_for_its_parent() -> None:
    reading, writing = os.pipe()
    channel = Channel(writing)
    child = os.fork()
    if child == 0:
        channel.write("start", id="of the child")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    os.close(writing)
    assert os.read(reading, 100) == b""
    os.close(reading)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_closed_descriptor_ends_the_process(replaced: bool) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        channel = Channel(writing)
        if replaced:
            os.dup2(os.open(os.devnull, os.O_WRONLY), writing)
        else:
            os.close(writing)
        channel.write("end")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 71
    os.close(reading)
    os.close(writing)
