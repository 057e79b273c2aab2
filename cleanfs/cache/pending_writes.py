"""Writes that programs have asked for and the source does not have yet. Reads of their range wait.

The kernel puts what a program writes into its own pages, and then sends it. It may drop such a page
before the source has the bytes: upon a notification of ours, or because memory is short. It then reads
the page again, and would keep for good what the source had before. So such a read waits.

That cannot deadlock: a later write of the same page waits for the read in the kernel, and no write
waits for a read here. Main thread only.
"""

import trio


class PendingWrite:
    """A write of the bytes ``start <= i < stop``, to the end of the file if ``stop`` is None."""

    __slots__ = ("_done", "_ended", "start", "stop")

    def __init__(self, start: int, stop: int | None) -> None:
        """It has just been asked for."""
        self.start = start
        self.stop = stop
        self._done: trio.Event | None = None
        self._ended = False

    def overlaps(self, offset: int, size: int) -> bool:
        """Whether a read of that range may find what is about to change."""
        return self.start < offset + size and (self.stop is None or offset < self.stop)

    async def wait(self) -> None:
        """Return when the source has it, or refused it.

        The write may already have ended while the caller waited for an earlier one.
        """
        if self._ended:
            return
        if self._done is None:
            self._done = trio.Event()
        await self._done.wait()

    def end(self) -> None:
        """The source has it, or refused it."""
        self._ended = True
        if self._done is not None:
            self._done.set()
