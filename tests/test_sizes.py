"""Test sizes as people write them."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleanfs.sizes import MAX_SIZE, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("65536", 65536),
        ("4k", 4096),
        ("4K", 4096),
        ("512M", 512 << 20),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
        ("10 MiB", 10 << 20),
        ("10MB", 10 << 20),
        (" 7 ", 7),
        ("4E", MAX_SIZE),
    ],
)
def test_units_are_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "M", "abc", "12x", "0x10", "nan", "inf", "1,5G", "-1", "5E", "1e400", "1e30"],
)
def test_a_text_that_is_not_a_size_is_refused_and_named(text: str) -> None:
    with pytest.raises(ValueError, match="size") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@given(st.integers(0, 1 << 53))  # above 2**53 (8 PiB) a float rounds
def test_plain_numbers_are_bytes_exactly(size: int) -> None:
    assert parse_size(str(size)) == size


@given(st.text(max_size=8))
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert 0 <= parse_size(text) <= MAX_SIZE


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 << 30, "5.0 GiB"),
    ],
)
def test_sizes_are_written_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    "text", ["8 bit", "8b", "4b", "8Mb", "8Mib", "8mb", "1.5 Gb", "8kib", "8 bits", "8 Bit", "8 Mbit"]
)
def test_a_number_of_bits_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="bits, not a size") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)
