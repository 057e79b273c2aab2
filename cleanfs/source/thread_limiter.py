"""A limiter of the threads that wait for the source, which does not count hung calls.

A bound is needed, as each call takes a thread. But a source that hangs in one file would use it up, and
requests for other files would wait, too. So a call that takes long no longer counts: its slot is given
to another call, up to a second bound that only a source with hundreds of hung calls reaches.
"""

import time
from collections.abc import Callable
from itertools import islice
from typing import Final

import trio

MAX_THREADS: Final = 64
"""Calls that may wait for the source at one time, without those that hang."""

MAX_HUNG: Final = 1024
"""Calls beyond that, one for each that hangs."""

HUNG_SECONDS: Final = 0.5
"""A call that takes longer hangs: a busy disk does not explain it."""


class ThreadLimiter:
    """A limiter for ``trio.to_thread.run_sync``. Main thread only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start without calls. ``clock`` in seconds."""
        self._clock = clock
        self._running: dict[object, float] = {}  # since when; oldest first
        self._turnstile = trio.Lock()
        self._freed = trio.Event()
        self._taken = trio.Event()

    @property
    def oldest_seconds(self) -> float:
        """Return how long the oldest call has waited; 0 if there is none."""
        for since in self._running.values():
            return self._clock() - since
        return 0.0

    @property
    def hung(self) -> int:
        """Count the calls that hang."""
        late = self._clock() - HUNG_SECONDS
        return sum(since <= late for since in self._running.values())

    async def in_use(self) -> None:
        """Wait until there is a call."""
        while not self._running:
            self._taken = trio.Event()
            await self._taken.wait()

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        """Wait for a slot, first come, first served."""
        if self._turnstile.locked() or self._seconds_to_free() > 0:
            async with self._turnstile:
                while (seconds := self._seconds_to_free()) > 0:
                    self._freed = trio.Event()
                    with trio.move_on_after(seconds):
                        await self._freed.wait()
                self._running[borrower] = self._clock()
        else:
            self._running[borrower] = self._clock()
        self._taken.set()

    def release_on_behalf_of(self, borrower: object) -> None:
        """Note that the call has returned."""
        del self._running[borrower]
        self._freed.set()

    def _seconds_to_free(self) -> float:
        """Return 0 if another call may be made now, else in how many seconds at the latest."""
        number = len(self._running)
        if number < MAX_THREADS:
            return 0.0
        if number >= MAX_THREADS + MAX_HUNG:
            return float("inf")
        # The oldest calls beyond the bound must all hang: then the last of them does.
        last = next(islice(self._running.values(), number - MAX_THREADS, None))
        return max(last + HUNG_SECONDS - self._clock(), 0.0)
