"""Sizes as people write them: ``512M``, ``1.5G``, ``65536``. Units are powers of 1024."""

import bitmath

MAX_SIZE = 1 << 62
"""Bytes; more than any machine has."""


def parse_size(text: str) -> int:
    """Bytes. Raises ValueError, with a message for the user, for what is not a size."""
    number = text.strip()
    try:
        # bitmath computes in floats; plain bytes are kept to the last one.
        size = int(number) if number.isdecimal() else _with_unit(number)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a size (examples: 512M, 1.5G, 65536)") from None
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"size {text!r} is out of range")
    return size


def _with_unit(text: str) -> int:
    parsed = bitmath.parse_string(text, strict=False, system=bitmath.NIST)
    if isinstance(parsed, bitmath.Bit):
        raise ValueError(text)  # noqa: TRY004 - a user's mistake, not a type error
    return int(parsed.to_Byte())


def format_size(size: float) -> str:
    """A size for people: three digits or so and a unit."""
    if abs(size) < 1024:  # bitmath would go on to bits
        return f"{size:.0f} B"
    return str(bitmath.Byte(size).best_prefix(system=bitmath.NIST).format("{value:.1f} {unit}"))
