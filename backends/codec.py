"""Page codecs by name: what ``--compression`` accepts.

* ``lz4`` or ``lz4:N``: the fast compressor with acceleration N (1 to 65537; more is faster and looser).
* ``lz4hc`` or ``lz4hc:N``: the slow one at level N (1 to 12). It decompresses as fast.
* ``zstd`` or ``zstd:N``: denser and slower, at level N (1 to 19); with ``+dict`` at the end it trains
  a dictionary from the pages that it is given.
* ``none``: pages are kept as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import lz4.block

LEVELS = {"none": range(1), "lz4": range(1, 65538), "lz4hc": range(1, 13), "zstd": range(1, 20)}
"""Methods, and what the number after the colon may be."""

DEFAULT_LEVEL = {"none": 0, "lz4": 1, "lz4hc": 9, "zstd": 3}

CHOICES = "lz4[:ACCELERATION], lz4hc[:LEVEL], zstd[:LEVEL][+dict] or none"

NEEDS_NATIVE = "needs the native engine (scripts/setup builds it; CLEANFS_PUREPYTHON=1 switches it off)"

CorruptError = lz4.block.LZ4BlockError
"""What a decompressor raises when the bytes are not what a compressor made."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How pages are compressed."""

    spec: str
    method: str
    level: int
    """Acceleration in the case of lz4."""
    dictionary: bool = False


def parse(spec: str) -> Codec:
    """The codec that ``spec`` names. Raises ValueError with a message for the user."""
    base, plus, extra = spec.partition("+")
    method, colon, number = base.partition(":")
    if method not in LEVELS:
        raise ValueError(f"unknown compression {spec!r} ({CHOICES})")
    if plus and (method != "zstd" or extra != "dict"):
        raise ValueError(f"compression {spec!r}: only zstd[:LEVEL]+dict has something after a +")
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
    """The codec over whole pages, in Python. Raises ValueError if it is neither lz4 nor lz4hc."""
    compress = partial(lz4.block.compress, store_size=False)
    if codec.method == "lz4":
        return partial(compress, mode="fast", acceleration=codec.level)
    if codec.method == "lz4hc":
        return partial(compress, mode="high_compression", compression=codec.level)
    raise ValueError(f"--compression {codec.spec} {NEEDS_NATIVE}")


def lz4_decompressor(page_size: int) -> Callable[[bytes], bytes]:
    """The inverse of both, for pages of ``page_size`` bytes; raises CorruptError."""
    return partial(lz4.block.decompress, uncompressed_size=page_size)
