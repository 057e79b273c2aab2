"""Page codecs by name: what ``--compression`` accepts.

``lz4`` or ``lz4:N``: the fast compressor with acceleration N (1 to 65537; more is faster and looser).
``lz4hc`` or ``lz4hc:N``: the slow one at level N (1 to 12). Both decompress alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import lz4.block

LZ4_MAX_ACCELERATION = 65537
LZ4HC_MAX_LEVEL = 12
LZ4HC_DEFAULT_LEVEL = 9

CorruptError = lz4.block.LZ4BlockError
"""What a decompressor raises when the bytes are not what a compressor made."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A pair of functions over whole pages."""

    name: str
    compress: Callable[[bytes], bytes]

    @staticmethod
    def decompressor(page_size: int) -> Callable[[bytes], bytes]:
        """The inverse of ``compress``, for pages of ``page_size`` bytes; raises CorruptError."""
        return partial(lz4.block.decompress, uncompressed_size=page_size)


def parse(spec: str) -> Codec:
    """The codec that ``spec`` names. Raises ValueError with a message for the user."""
    name, colon, level = spec.partition(":")
    number = int(level) if level.isdecimal() else None
    if colon and number is None:
        raise ValueError(f"compression {spec!r}: {level!r} is not a number")
    if name == "lz4":
        acceleration = 1 if number is None else number
        if not 1 <= acceleration <= LZ4_MAX_ACCELERATION:
            raise ValueError(f"compression {spec!r}: acceleration is 1 to {LZ4_MAX_ACCELERATION}")
        compress = partial(lz4.block.compress, mode="fast", acceleration=acceleration, store_size=False)
    elif name == "lz4hc":
        level_hc = LZ4HC_DEFAULT_LEVEL if number is None else number
        if not 1 <= level_hc <= LZ4HC_MAX_LEVEL:
            raise ValueError(f"compression {spec!r}: level is 1 to {LZ4HC_MAX_LEVEL}")
        compress = partial(
            lz4.block.compress, mode="high_compression", compression=level_hc, store_size=False
        )
    else:
        raise ValueError(f"unknown compression {spec!r} (lz4[:ACCELERATION] or lz4hc[:LEVEL])")
    return Codec(spec, compress)
