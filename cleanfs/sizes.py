"""Parse and format sizes: ``512M``, ``1.5G``, ``65536``. Units are powers of 1024."""

import re

import bitmath

MAX_SIZE = 1 << 62
"""The largest size in bytes, more than any machine has."""

_SIZE = re.compile(r"[0-9]+|(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+) ?[A-Za-z]+")
"""Matches bytes, or a number and a unit: no signs, no exponents, no digits of other scripts."""

_BITS = re.compile(r"b$|(?i:bits?)$")
"""Matches a unit of bits. bitmath 2.1.1, when not strict, reads `8Mb` and `8Mib` as bytes."""


def parse_size(text: str) -> int:
    """Return a size in bytes. Raises ValueError, with a message for the user, if it is none."""
    stripped = text.strip(" \t\r\n")
    if _SIZE.fullmatch(stripped) and _BITS.search(stripped):
        raise ValueError(f"{text!r} is a number of bits, not a size: bytes are B (512M, 512MB, 512MiB)")
    try:
        size = _parse(stripped)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a size (examples: 512M, 1.5G, 65536)") from None
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"size {text!r} is out of range")
    return size


def _parse(text: str) -> int:
    if not _SIZE.fullmatch(text):
        raise ValueError(text)
    # bitmath computes in floats; a plain number of bytes stays exact.
    return int(text) if text.isdecimal() else _with_unit(text)


def _with_unit(text: str) -> int:
    size = bitmath.parse_string(text, strict=False, system=bitmath.NIST).to_Byte()
    if 0 < size < 1:  # would become 0 bytes, which has a meaning of its own
        raise ValueError(text)
    return int(size)


def format_size(size: float) -> str:
    """Format a size with one decimal and a unit."""
    if abs(size) < 1024:  # bitmath would write bits
        return f"{size:.0f} B"
    return str(bitmath.Byte(size).best_prefix(system=bitmath.NIST).format("{value:.1f} {unit}"))
