"""Estimate the ids of a mount's recent requests.

The kernel numbers requests in order (``fuse_get_unique``, fs/fuse/dev.c), and libfuse does not pass on
the ids that it reads. So we sample an id now and then, and count messages.
"""

import os
import re
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from cleanfs.fuse.protocol import FUSE_REQ_ID_STEP

SAMPLE_SECONDS: Final = 0.25
"""How often to sample an id."""

KEPT_SECONDS: Final = 2.0
"""The age of the oldest request in the range."""

SINCE: Final = (5, 1)
"""The Linux from which on it does no harm to ask about any number (``Interrupts``)."""

UNREAD: Final = 1024
"""Requests that may have got a number and were taken back before anybody could read them."""

MAX_RECENT: Final = 1 << 18
"""The newest requests that the range has at most. In two seconds there are less."""


class Sample(NamedTuple):
    """What number the requests had reached."""

    at: float
    unique: int
    message: int
    """How many messages had been read."""


class RequestIds:
    """One mount's."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing was read. ``clock`` in seconds."""
        self.messages = 0
        """How many were read; whoever reads counts."""
        self.due_at = 0.0
        """When it is time to look at the next one, by the clock."""
        self._clock = clock
        self._samples: deque[Sample] = deque()  # oldest first

    def saw(self, unique: int) -> None:
        """The message that was just counted has this number."""
        now = self._clock()
        if now < self.due_at:
            return
        self.due_at = now + SAMPLE_SECONDS
        self._samples.append(Sample(now, unique, self.messages))
        while len(self._samples) > 1 and self._samples[1].at < now - KEPT_SECONDS:
            self._samples.popleft()

    def recent(self) -> range:
        """The numbers of all requests of late, and of some that there may not be; none if unknown."""
        if not self._samples or not unknown_ids_are_safe():
            return range(0)
        newest = self._samples[-1]
        end = newest.unique + FUSE_REQ_ID_STEP * (self.messages - newest.message + UNREAD)
        return range(
            max(self._samples[0].unique, end - FUSE_REQ_ID_STEP * MAX_RECENT), end, FUSE_REQ_ID_STEP
        )


def unknown_ids_are_safe() -> bool:
    """Whether the kernel refuses to be asked about a request that there is not."""
    return kernel_version() >= SINCE


def kernel_version() -> tuple[int, ...]:
    """Its first two numbers."""
    return tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
