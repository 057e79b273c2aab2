"""Keep pages of a file in the kernel's page cache."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

MAP_LOCKED: Final = 0x2000
"""Locks a new mapping like mlock(2) (``asm-generic/mman.h``)."""


@contextmanager
def not_reclaimed(fd: int, size: int) -> Iterator[None]:
    """Make the kernel keep the pages of an open file, except those that are invalidated.

    Reclaim takes single pages even while memory is free: DAMON reclaims regions that were cold for a
    minute, and a new page can lie in a cold region.
    """
    with mmap.mmap(fd, size, mmap.MAP_SHARED | MAP_LOCKED, mmap.PROT_READ):
        yield
