"""What this process takes, and giving back what malloc keeps.

Each request under way has a buffer for the largest that the kernel sends, 1 MiB, and often a second
one. When many were answered, malloc keeps what they took, below other things: after 64 writers of 1 MiB
at a time, 137 MiB of 176 were free. The limits of a mount are about what it really uses (RSS), so that
is given back.
"""

import resource
from collections.abc import Callable

import trio

from cleanfs.linux import syscalls

TRIM_SECONDS = 10.0
"""How often to look."""

TRIM_BYTES = 16 << 20
"""Free memory that is worth it: trimming takes some milliseconds."""


def rss_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


async def give_back(
    free_bytes: Callable[[], int] = syscalls.malloc_free_bytes,
    trim: Callable[[], None] = syscalls.trim_malloc,
) -> None:
    """Trim whenever malloc has come to have much that is free; never ends.

    What was given back counts as free until it is used again.
    """
    given_back = 0
    while True:
        await trio.sleep(TRIM_SECONDS)
        free = free_bytes()
        given_back = min(given_back, free)
        if free - given_back >= TRIM_BYTES:
            trim()
            given_back = free_bytes()
