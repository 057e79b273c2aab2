"""Parse the names of page codecs, which ``--compression`` accepts.

* ``lz4`` or ``lz4:N``: the fast compressor with acceleration N (1 to 65537; faster and less dense).
* ``lz4hc`` or ``lz4hc:N``: the slow compressor at level N (1 to 12). It decompresses as fast as lz4.
* ``zstd`` or ``zstd:N``: denser and slower, at level N (1 to 19). With ``+dict`` at the end, zstd
  trains a dictionary from the pages that it compresses.
* ``none``: pages are stored uncompressed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import lz4.block

LEVELS = {"none": range(1), "lz4": range(1, 65538), "lz4hc": range(1, 13), "zstd": range(1, 20)}
"""The range of the number after the colon, by method."""

DEFAULT_LEVEL = {"none": 0, "lz4": 1, "lz4hc": 9, "zstd": 3}

CHOICES = "lz4[:ACCELERATION], lz4hc[:LEVEL], zstd[:LEVEL][+dict] or none"

NEEDS_NATIVE = "needs the native engine (scripts/setup builds it; CLEANFS_PUREPYTHON=1 switches it off)"

CorruptError = lz4.block.LZ4BlockError
"""Raised by a decompressor for bytes that no compressor made."""


@dataclass(frozen=True, slots=True)
class Codec:
    """Describes how pages are compressed."""

    spec: str
    method: str
    level: int
    """The acceleration, for lz4."""
    dictionary: bool = False


def parse(spec: str) -> Codec:
    """Parse the name of a codec. Raises ValueError with a message for the user."""
    base, plus, extra = spec.partition("+")
    method, colon, number = base.partition(":")
    if method not in LEVELS:
        raise ValueError(f"unknown compression {spec!r} ({CHOICES})")
    if plus and (method != "zstd" or extra != "dict"):
        raise ValueError(f"compression {spec!r}: only zstd takes a suffix, +dict")
    if not colon:
        return Codec(spec, method, DEFAULT_LEVEL[method], bool(plus))
    if not (number.isascii() and number.isdecimal()):
        raise ValueError(f"compression {spec!r}: {number!r} is not a number")
    levels = LEVELS[method]
    if method == "none" or int(number) not in levels:
        what = "acceleration" if method == "lz4" else "level"
        raise ValueError(f"compression {spec!r}: the {what} is {levels[0]} to {levels[-1]}")
    return Codec(spec, method, int(number), bool(plus))


def lz4_compressor(codec: Codec) -> Callable[[bytes], bytes]:
    """Return a function that compresses a page. Raises ValueError for any codec but lz4 and lz4hc."""
    compress = partial(lz4.block.compress, store_size=False)
    if codec.method == "lz4":
        return partial(compress, mode="fast", acceleration=codec.level)
    if codec.method == "lz4hc":
        return partial(compress, mode="high_compression", compression=codec.level)
    raise ValueError(f"--compression {codec.spec} {NEEDS_NATIVE}")


def lz4_decompressor(page_size: int) -> Callable[[bytes], bytes]:
    """Return the inverse of both, for pages of ``page_size`` bytes; it raises CorruptError."""
    return partial(lz4.block.decompress, uncompressed_size=page_size)
