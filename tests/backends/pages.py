"""Define the keys and contents of the pages that the backends' tests put."""

from random import Random
from uuid import UUID

from cleanfs.backends.ops import FileKey

MIB = 1 << 20
PAGE_SIZE = 4096
PAGE_SIZES = [1 << bits for bits in range(12, 21)]
KEY = FileKey(64, 1001, b"generation")
OTHER_KEYS = [
    FileKey(65, 1001, b"generation"),
    FileKey(64, 1002, b"generation"),
    FileKey(64, 1001, b"another"),
]
UUID_A, UUID_B = UUID(int=1), UUID(int=2)
LAST_INDEX = (1 << 51) - 1
"""Page index of the last byte that a file can have, in pages of 4096."""


def text(tag: object, page_size: int = PAGE_SIZE) -> bytes:
    """Make a page that compresses well, unique to its tag."""
    line = f"page of {tag}; ".encode()
    return (line * (page_size // len(line) + 1))[:page_size]


def noise(seed: int, page_size: int = PAGE_SIZE) -> bytes:
    """Make a page that does not compress."""
    return Random(seed).randbytes(page_size)


def same(word: int, page_size: int = PAGE_SIZE) -> bytes:
    """Make a same-filled page."""
    return word.to_bytes(8, "little") * (page_size // 8)


_NOISE = noise(0)


def half(i: int) -> bytes:
    """Make a unique page that compresses to slightly more than 1900 bytes."""
    return (i.to_bytes(8, "little") + _NOISE[8:1900]).ljust(PAGE_SIZE, b"\0")


def halves(indices: range) -> list[tuple[int, bytes]]:
    """Make pages that compress to about half, with their indices, for a put."""
    return [(i, half(i)) for i in indices]


FILLER = FileKey(1, 2, b"filler")
"""A file whose pages only use memory; no test gets them."""

FILLER_PAGES = [noise(i)[: 1000 + 27 * i % 2000].ljust(PAGE_SIZE, b"\0") for i in range(300)]
"""Pages that compress to 1000 to 3000 bytes."""
