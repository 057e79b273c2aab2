"""Pending writes: requested by programs, not yet in the source. Reads of their range wait for them.

The kernel copies what a program writes into its own pages, and then sends it. It may drop such a page
before the source has the bytes: when cleanfs notifies it, or because memory is short. It then reads the
page again, and would keep the source's old bytes for good. So such a read waits.

That cannot deadlock: a later write of the same page waits for the read in the kernel, and no write
waits for a read here. Main thread only.
"""

import trio

from cleanfs.eager import before_wait


class PendingWrite:
    """A write of the bytes ``start <= i < stop``, to the end of the file if ``stop`` is None."""

    __slots__ = ("_done", "_ended", "start", "stop")

    def __init__(self, start: int, stop: int | None) -> None:
        """Describe a write that has just been requested."""
        self.start = start
        self.stop = stop
        self._done: trio.Event | None = None
        self._ended = False

    def overlaps(self, offset: int, size: int) -> bool:
        """Tell whether a read of that range may find bytes that are about to change."""
        return self.start < offset + size and (self.stop is None or offset < self.stop)

    async def wait(self) -> None:
        """Wait until the source has the bytes, or has refused them.

        The write may already have ended while the caller waited for an earlier one.
        """
        if self._ended:
            return
        if self._done is None:
            self._done = trio.Event()
        await before_wait()
        await self._done.wait()

    def end(self) -> None:
        """Release the readers that wait: the source has the bytes, or has refused them."""
        self._ended = True
        if self._done is not None:
            self._done.set()
