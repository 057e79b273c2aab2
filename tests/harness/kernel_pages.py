"""Keep pages of a file in the kernel's page cache, or read past it."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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


def read_uncached(path: Path, times: int) -> None:
    """Make reads of a page, one after the other, that all reach the daemon."""
    fd = os.open(path, os.O_RDONLY)
    try:
        for _ in range(times):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.pread(fd, 4096, 0)
    finally:
        os.close(fd)
