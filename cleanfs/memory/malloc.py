"""Measure this process's memory, and return what malloc holds free.

Each request in progress has a buffer for the largest request, 1 MiB, and often a second one. After many
requests, malloc keeps those buffers below other allocations: after 64 writers of 1 MiB at a time, 137
of 176 MiB were free. The limits of a mount apply to its real memory (RSS), so free memory is returned.
"""

import resource
from collections.abc import Callable

import trio

from cleanfs.linux import syscalls

TRIM_SECONDS = 10.0
"""How often to check malloc's free memory."""

TRIM_BYTES = 16 << 20
"""Free memory that justifies a trim, which takes some milliseconds."""


def rss_bytes() -> int:
    """Return this process's resident memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


async def trim_periodically(
    free_bytes: Callable[[], int] = syscalls.malloc_free_bytes,
    trim: Callable[[], None] = syscalls.trim_malloc,
) -> None:
    """Trim whenever malloc's free memory has grown enough; never returns.

    Trimmed memory still counts as free until it is used again.
    """
    trimmed = 0
    while True:
        await trio.sleep(TRIM_SECONDS)
        free = free_bytes()
        trimmed = min(trimmed, free)
        if free - trimmed >= TRIM_BYTES:
            trim()
            trimmed = free_bytes()
