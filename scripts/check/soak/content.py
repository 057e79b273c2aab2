"""Make what a cell holds: bytes that say whose they are, and that nothing else could put together.

A file is a row of cells of 1024 bytes. The first one may be shorter, by the file's *shift*, so that
cells need not begin where pages do. Each cell has a version. What a version holds follows from the
file's serial number, the cell's number and the version alone: a header that says these, and a
stretch of a fixed pool of random or of compressible bytes, chosen by them. Odd versions are zeros:
what truncation and holes leave.
"""

import random
import struct
from functools import lru_cache

CELL = 1024

HEADER = struct.Struct("<4sIII")
MAGIC = b"soak"

TEXT, RANDOM, SAME = range(3)
FILLS = (TEXT, RANDOM, SAME)
"""How well the pages of a file compress: some, not at all, and much."""

_POOL = 1 << 16
_WORDS = (
    b"cache ",
    b"page ",
    b"clean ",
    b"evict ",
    b"pool ",
    b"put ",
    b"get ",
    b"flush ",
    b"{\n\t",
    b");\n",
)


def _text() -> bytes:
    choose = random.Random("text")
    words = [choose.choice(_WORDS) + b"%x" % choose.getrandbits(16) for _ in range(_POOL // 6)]
    return b"".join(words)[: _POOL + CELL].ljust(_POOL + CELL, b"~")


_POOLS = (_text(), random.Random("random").randbytes(_POOL + CELL))


def bound(cell: int, shift: int) -> int:
    """Return where a cell begins. ``shift`` is the length of the first one, 1 to CELL."""
    return max(0, shift + (cell - 1) * CELL)


def cell_at(offset: int, shift: int) -> int:
    """Return the cell that a byte is in."""
    return (offset - shift) // CELL + 1 if offset >= shift else 0


def is_zero(version: int) -> bool:
    """Tell whether a version is of zeros. Version 0 is what a cell holds before anybody wrote it."""
    return version == 0 or bool(version & 1)


@lru_cache(maxsize=1 << 14)
def cell_bytes(serial: int, cell: int, version: int, length: int) -> bytes:
    """Return all bytes of one version of one cell."""
    if is_zero(version):
        return bytes(length)
    header = HEADER.pack(MAGIC, serial, cell, version)
    fill = FILLS[serial % len(FILLS)]
    if fill == SAME:
        return (header * (CELL // len(header)))[:length]
    where = (serial * 0x9E3779B1 ^ cell * 0x85EBCA6B ^ version * 0xC2B2AE35) * 0x27D4EB2F % _POOL
    return (header + _POOLS[fill][where : where + CELL])[:length]


def cells_bytes(serial: int, shift: int, first: int, versions: "list[int] | range") -> bytes:
    """Return all bytes of some cells in a row."""
    parts = []
    for cell, version in enumerate(versions, first):
        parts.append(cell_bytes(serial, cell, version, shift if cell == 0 else CELL))
    return b"".join(parts)


def claim(data: bytes) -> tuple[int, int, int] | None:
    """Return whose the bytes say they are: (serial, cell, version), by the first header among them."""
    at = data.find(MAGIC)
    if at < 0 or at + HEADER.size > len(data):
        return None
    _, serial, cell, version = HEADER.unpack_from(data, at)
    return serial, cell, version
