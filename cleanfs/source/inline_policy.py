"""Where a call to the source is made: at once, on the main thread, or in a worker thread.

A hop to a thread and back costs 50 us and more. A source that is as fast as memory answers sooner than
that, so there the hop is most of the time; on any other source, a call without the hop keeps everybody
waiting. Which one it is can only be told from what it did lately. Pure decisions: no I/O in here.
"""

import math
import time
from collections.abc import Callable
from typing import Final

FAST_SECONDS: Final = 50e-6
"""A call that takes no longer is not worth a hop."""

SECONDS_PER_BYTE: Final = 1 / (2 << 30)
"""What each byte may take on top: copying, at a pace that a busy machine still has."""

STREAK: Final = 8
"""Fast calls before the main thread makes them; a slow one takes two of them away."""

SLOW_SECONDS: Final = 1e-3
"""An inline call that slept and took longer waited for the source. What sleeps less costs no more than
a few hops."""

SHARE: Final = 100
"""After a wait on the main thread, calls go to threads for at least so many times its length: waits
take at most 1/100 of the main thread's time, however the source behaves."""

FIRST_HOLD_SECONDS: Final = 0.1
LONGEST_HOLD_SECONDS: Final = 60.0
"""The first wait also keeps calls in threads for at least the first, and each one that follows soon
for twice as long as the one before, up to the longest."""


RECENT_SECONDS: Final = 0.1
"""How long a call that came back speaks for the next one. A file system that was frozen meanwhile, or
whose disk does not answer any more, is met in a thread."""


class InlinePolicy:
    """Calls of one kind (reads, writes, calls on names) to one file system."""

    __slots__ = ("_clock", "_hold", "_not_before", "_returned", "_score", "_steps", "inline")

    def __init__(self, clock: Callable[[], float] = time.monotonic, steps: int = 1) -> None:
        """Nothing is known yet: in threads. ``clock`` in seconds; a call is so many ``steps``."""
        self._clock = clock
        self._steps = steps
        self._hold = FIRST_HOLD_SECONDS / 2
        self._not_before = 0.0
        self._returned = -math.inf
        self._score = 0
        self.inline = False
        """Whether the main thread makes calls that follow each other."""

    @property
    def recent(self) -> bool:
        """Whether a call has just come back: the file system is not frozen."""
        return self._clock() - self._returned < RECENT_SECONDS

    def returned(self) -> None:
        """A call has come back, wherever it was made."""
        self._returned = self._clock()

    def took(self, seconds: float, size: int) -> None:
        """A call for ``size`` bytes took so long in a thread, the hop not counted."""
        self.returned()
        if seconds > self._steps * FAST_SECONDS + size * SECONDS_PER_BYTE:
            self._score = max(self._score - 2, 0)
            return
        self._score = min(self._score + 1, STREAK)
        if self._score == STREAK and self._clock() >= self._not_before:
            self._score = 0
            self.inline = True

    def waited(self, seconds: float) -> None:
        """An inline call waited for so long: back to threads."""
        now = self._clock()
        calm = now - self._not_before > self._hold
        self._hold = FIRST_HOLD_SECONDS if calm else min(2 * self._hold, LONGEST_HOLD_SECONDS)
        self._not_before = now + max(self._hold, SHARE * seconds)
        self._score = 0
        self.inline = False


class NowaitProbe:
    """Whether to ask for something that a source may never have (RWF_NOWAIT on a cold disk).

    After ``PATIENCE`` refusals in a row only every ``STEP``-th call asks; one success, and all do.
    """

    PATIENCE: Final = 16
    STEP: Final = 8

    __slots__ = ("_refused",)

    def __init__(self) -> None:
        """Ask."""
        self._refused = 0

    def worthwhile(self) -> bool:
        """Whether this call should ask. One that does not counts as refused."""
        if self._refused < self.PATIENCE or self._refused % self.STEP == 0:
            return True
        self._refused += 1
        return False

    def answered(self, got: bool) -> None:
        """What came of asking."""
        self._refused = 0 if got else self._refused + 1
