"""The frames of postcopy as seen from Python: whatever a peer sends, the codec answers and never crashes."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uspace_mm._native import ffi, lib

from uspace_mm.errors import KernelError, UnsupportedError
from uspace_mm.postcopy.errors import (
    ConnectionLost,
    PeerFailed,
    PeerTimeout,
    PostcopyError,
    ProtocolError,
    Stopped,
    raise_for,
)

HEADER = 32
U8, U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
FIELDS = st.fixed_dictionaries(
    {"type": U8, "flags": U16, "first": U64, "count": U32, "length": U32, "payload_check": U32}
)
PAGE = 1 << 14


def encode(fields: dict[str, int]) -> bytes:
    header = ffi.new(f"uint8_t[{HEADER}]")
    lib.umm_frame_encode(ffi.new("struct umm_frame *", fields), header)
    return bytes(header)


def decode(header: bytes) -> tuple[int, Any]:
    frame = ffi.new("struct umm_frame *")
    return lib.umm_frame_decode(header, frame), frame


@given(FIELDS)
def test_a_frame_comes_back(fields: dict[str, int]) -> None:
    result, frame = decode(encode(fields))
    assert result == 0
    assert {name: getattr(frame, name) for name in fields} == fields


@given(st.binary(min_size=HEADER, max_size=HEADER))
def test_rubbish_is_no_frame(header: bytes) -> None:
    result, _ = decode(header)
    assert result in (-errno.EPROTO, -errno.EBADMSG)


@given(FIELDS, st.integers(0, 28 * 8 - 1))
def test_a_flipped_bit_is_noticed(fields: dict[str, int], bit: int) -> None:
    header = bytearray(encode(fields))
    header[bit // 8] ^= 1 << bit % 8
    assert decode(bytes(header))[0] < 0


@given(FIELDS, st.integers(0, 5), st.integers(0, 1), st.integers(0, 1), st.integers(0, 1 << 34))
def test_what_is_let_through_is_bounded(
    fields: dict[str, int], phase: int, side: int, connection: int, pages: int
) -> None:
    """The promise that readers build on: lengths follow from the type, ranges are inside the memory."""
    protocol = ffi.new(
        "struct umm_protocol *",
        {"side": side, "connection": connection, "phase": phase, "page_size": PAGE, "pages": pages},
    )
    frame = ffi.new("struct umm_frame *", fields)
    result = lib.umm_protocol_check(protocol, frame)
    assert result in (0, -errno.EPROTO, -errno.EMSGSIZE)
    if result == 0 and fields["type"] in (3, 8, 10):
        assert 0 < fields["count"] <= pages - fields["first"]
    if result == 0 and fields["type"] != 6:
        assert fields["length"] <= (1 << 20) + 8 * (1 << 16)


@given(st.integers(1, 15), st.integers(0, 5), st.integers(0, 1), st.integers(0, 1))
def test_no_frame_may_come_to_both_sides_but_alive_and_error(
    type_: int, phase: int, side: int, connection: int
) -> None:
    lengths = {1: 16, 2: 24, 3: PAGE + 8, 6: 1, 10: 8, 11: 16}
    counts = {3: 1, 8: 1, 10: 1}
    frame = ffi.new(
        "struct umm_frame *", {"type": type_, "length": lengths.get(type_, 0), "count": counts.get(type_, 0)}
    )

    def may_come(to: int) -> bool:
        fields = {"side": to, "connection": connection, "phase": phase, "page_size": PAGE, "pages": 8}
        return bool(lib.umm_protocol_check(ffi.new("struct umm_protocol *", fields), frame) == 0)

    if type_ not in (14, 15):
        assert not (may_come(side) and may_come(1 - side))
    else:
        assert may_come(side) == may_come(1 - side)


def test_names() -> None:
    names = [ffi.string(lib.umm_frame_name(type_)).decode() for type_ in range(18)]
    assert names[1] == "HELLO" and names[15] == "ERROR" and names[16] == names[0] == "unknown"
    assert len(set(names[1:16])) == 15
    assert ffi.string(lib.umm_phase_name(2)) == b"postcopy"
    assert ffi.string(lib.umm_phase_name(-1)) == b"unknown"


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (errno.ECONNRESET, ConnectionLost, 1),
        (errno.ETIMEDOUT, PeerTimeout, 1),
        (errno.EPROTO, ProtocolError, 1),
        (errno.EMSGSIZE, ProtocolError, 1),
        (errno.EBADMSG, ProtocolError, 1),
        (errno.EREMOTEIO, PeerFailed, 1),
        (errno.ECANCELED, Stopped, 1),
        (errno.EOPNOTSUPP, UnsupportedError, 3),
        (errno.EPERM, UnsupportedError, 3),
        (errno.ENOMEM, KernelError, 1),
    ],
)
def test_each_errno_has_its_class(error: int, kind: type[Exception], status: int) -> None:
    with pytest.raises(kind) as caught:
        raise_for(-error, "umm_sender_round", "words of the core")
    assert getattr(caught.value, "exit_status") == status  # noqa: B009
    assert "\n" not in str(caught.value)
    if isinstance(caught.value, PostcopyError):
        assert (str(caught.value), caught.value.errno) == ("words of the core", error)
    raise_for(0, "umm_sender_round", "")
