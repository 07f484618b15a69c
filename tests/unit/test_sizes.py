"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uspace_mm.errors import InputError
from uspace_mm.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("16k", 16 << 10),
        ("16K", 16 << 10),
        ("512M", 512 << 20),
        ("2G", 2 << 30),
        ("1.5G", 3 << 29),
        ("1T", 1 << 40),
        ("512MiB", 512 << 20),
        ("512 MB", 512 << 20),
        (" 64k ", 64 << 10),
        (4096, 4096),
    ],
)
def test_parses_what_people_write(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "k", "0", "0M", "-1", "-5M", "1X", "1 0", "1e3", "0x10", "nan", "0.0001k", 0, -1]
)
def test_refuses_the_rest_and_says_what_it_was(text: str | int) -> None:
    with pytest.raises(InputError) as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)
    assert caught.value.exit_status == 2


@given(st.integers(1, 1 << 50))
def test_bytes_stay_bytes(size: int) -> None:
    assert parse_size(str(size)) == parse_size(size) == size


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_an_input_error(text: str) -> None:
    try:
        size = parse_size(text)
    except InputError:
        return
    assert size > 0


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 << 20, "1.5 GiB"),
        (5 << 40, "5.0 TiB"),
        (1 << 60, "1048576.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_formats_for_people(size: int, text: str) -> None:
    assert format_size(size) == text
