"""What the kernel keeps of a file in its page cache."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

MAP_LOCKED: Final = 0x2000
"""As mlock(2) of a new mapping (``asm-generic/mman.h``)."""


@contextmanager
def not_reclaimed(fd: int, size: int) -> Iterator[None]:
    """Have the kernel keep the pages of an open file, but for those that it is told to drop.

    Reclaim takes single pages also while memory is plenty: DAMON pages out what was cold for a minute,
    and a new page can lie in a cold region.
    """
    with mmap.mmap(fd, size, mmap.MAP_SHARED | MAP_LOCKED, mmap.PROT_READ):
        yield
