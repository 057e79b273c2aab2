"""Decide whether a call to the source is made inline, on the main thread, or in a worker thread.

A hop to a thread and back costs at least 50 us. A source that is as fast as memory replies sooner than
that, so there the hop is most of the time. On any other source an inline call makes every request wait.
Only the source's recent calls tell which kind it is. Pure decisions: no I/O in here.
"""

import time
from collections.abc import Callable
from typing import Final

from cleanfs.cache.state import InlineState, NowaitState

FAST_SECONDS: Final = 50e-6
"""A call that takes no longer is not worth a hop."""

SECONDS_PER_BYTE: Final = 1 / (2 << 30)
"""The additional time for each byte: copying, at a rate that a busy machine still reaches."""

STREAK: Final = 8
"""Fast calls until the next one is made inline; a slow one takes two of them away."""

SLOW_SECONDS: Final = 1e-3
"""An inline call that slept and took longer waited for the source. A shorter sleep costs no more than a
few hops."""

SHARE: Final = 100
"""After a wait on the main thread, calls go to threads for at least so many times its length. So waits
take at most 1/100 of the main thread's time, however the source behaves."""

FIRST_HOLD_SECONDS: Final = 0.1
LONGEST_HOLD_SECONDS: Final = 60.0
"""The first wait also keeps calls in threads for at least the first of these times. Each wait that
follows soon doubles the time, up to the longest."""

RECENT_SECONDS: Final = 0.1
"""How long a call that returned vouches for the next one. So a call that meets a frozen file system, or
a dead disk, is made in a thread."""


class InlinePolicy(InlineState):
    """Calls of one kind (reads, writes, calls on names) to one file system."""

    __slots__ = ("_clock", "_hold", "_not_before", "_score", "_steps")

    def __init__(self, clock: Callable[[], float] = time.monotonic, steps: int = 1) -> None:
        """Begin in threads. ``clock`` in seconds; a call may take ``steps`` times FAST_SECONDS."""
        super().__init__()
        self._clock = clock
        self._steps = steps
        self._hold = FIRST_HOLD_SECONDS / 2
        self._not_before = 0.0
        self._score = 0

    @property
    def recent(self) -> bool:
        """Tell whether a call has just returned: the file system is not frozen."""
        self._hear_of_waits()
        return self._clock() - self.returned_at < RECENT_SECONDS

    def returned(self) -> None:
        """Note that a call has returned, wherever it was made."""
        self.returned_at = self._clock()

    def took(self, seconds: float, size: int) -> None:
        """Note how long a call for ``size`` bytes took in a thread, without the hop."""
        self._hear_of_waits()
        self.returned()
        if seconds > self._steps * FAST_SECONDS + size * SECONDS_PER_BYTE:
            self._score = max(self._score - 2, 0)
            return
        self._score = min(self._score + 1, STREAK)
        if self._score == STREAK and self._clock() >= self._not_before:
            self._score = 0
            self.inline = True

    def _hear_of_waits(self) -> None:
        """Take account of an inline call of the channel that waited."""
        if self.waited_seconds:
            seconds, self.waited_seconds = self.waited_seconds, 0.0
            self.waited(seconds)

    def waited(self, seconds: float) -> None:
        """Go back to threads: an inline call waited for so long."""
        now = self._clock()
        calm = now - self._not_before > self._hold
        self._hold = FIRST_HOLD_SECONDS if calm else min(2 * self._hold, LONGEST_HOLD_SECONDS)
        self._not_before = now + max(self._hold, SHARE * seconds)
        self._score = 0
        self.inline = False


class NowaitProbe:
    """Decide whether to try RWF_NOWAIT, which a cold disk refuses again and again.

    After ``MAX_REFUSALS`` refusals in a row only each ``STEP``-th call tries; after a success all do.
    """

    MAX_REFUSALS: Final = 16
    STEP: Final = 8

    __slots__ = ("_state",)

    def __init__(self, state: NowaitState) -> None:
        """Count refusals in ``state``."""
        self._state = state

    def worthwhile(self) -> bool:
        """Tell whether this call should try. One that does not counts as refused."""
        if self._state.refused < self.MAX_REFUSALS or self._state.refused % self.STEP == 0:
            return True
        self._state.refused += 1
        return False

    def tried(self, succeeded: bool) -> None:
        """Note the outcome of a try."""
        self._state.refused = 0 if succeeded else self._state.refused + 1
