"""How much memory the caches may have while memory is short: pure policy, no clock, no I/O.

What is kept is only a cache, so it yields: a daemon that is killed for memory takes the mount with it.
tmem says so of its pools: they are "of unknown and possibly time-varying size".

The measure is a level, not an alarm: how much more could be taken before anything but clean file pages
had to go (``Headroom``). Stalls (PSI) are no measure. A program that reads more through the mount than
RAM holds makes the kernel reclaim file pages all the time: a quarter of such a run were stalls, with
memory for everybody (docs/pressure.md). They only say when to look.

Two rules follow from the level. The *allowance* is what the caches may have together:

* It never exceeds what they use and the spare room together. So the caches can not fill memory that is
  not there, however fast they grow between two looks.
* Where the spare room is negative they give it up, and a little more, so that the next breath of
  somebody else does not evict again.

It grows back by a step at a time, after nothing was short for a while, and only into room for a whole
step. That is the hysteresis: what goes up and down by less than a step moves it down once, and not up.
"""

from collections.abc import Iterable
from dataclasses import dataclass

MIB = 1 << 20

RESERVE_SHARE = 32
MIN_RESERVE, MAX_RESERVE = 8 * MIB, 256 * MIB
"""Of a limit, 1/RESERVE_SHARE within these bounds is not for the caches: requests, page tables, tables
of the daemon, the pages of programs, and what others take until we have looked again."""

SLACK_SHARE = 4
"""Of the reserve, the part that is given up in addition when something must be."""

GROW_STEPS = 16
"""Steps from nothing to all."""

MIN_STEP = 4 * MIB

GROW_AFTER_SECONDS = 3.0
"""How long nothing must have been short before the first step up."""

GROW_EVERY_SECONDS = 1.0

FASTEST = 256 * MIB
"""Bytes per second that others are reckoned to take: with less room the next look comes sooner."""

SOONEST_SECONDS, LATEST_SECONDS = 0.05, 5.0
LATEST_SHORT_SECONDS = 1.0
"""The same while something is withheld, which is to be given back."""


@dataclass(frozen=True, slots=True)
class Headroom:
    """One place with a limit of memory that counts us: a control group, or the machine."""

    name: str
    limit: int
    """Bytes."""
    available: int
    """Bytes that could be taken before anything but clean file pages had to go; negative: too late."""

    @property
    def reserve(self) -> int:
        """Bytes that are not for the caches."""
        return min(max(self.limit // RESERVE_SHARE, MIN_RESERVE), MAX_RESERVE)

    @property
    def spare(self) -> int:
        """Bytes that the caches could take more; negative: they have too much."""
        return self.available - self.reserve


def tightest(rooms: Iterable[Headroom]) -> Headroom | None:
    """Where there is least room; None if nothing is known."""
    return min(rooms, key=lambda room: room.spare, default=None)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the caches may have, or have, or were promised. Bytes."""

    pool: int
    page_cache: int

    @property
    def total(self) -> int:
        """Both."""
        return self.pool + self.page_cache


def split(allowance: int, promised: Sizes, floor: Sizes) -> Sizes:
    """Share an allowance: the pool yields first, the page cache, which is smaller and faster, last."""
    pool = min(max(allowance - promised.page_cache, floor.pool), promised.pool)
    page_cache = min(max(allowance - pool, floor.page_cache), promised.page_cache)
    return Sizes(pool, page_cache)


class Policy:
    """The allowance over time. Starts at all that is promised."""

    def __init__(self) -> None:
        """Nothing is short."""
        self._cap: int | None = None
        """The allowance, if it is less than what is promised."""
        self.shrinks = 0
        """Times that the caches had to give up what they had."""
        self.grows = 0
        """Steps back up."""
        self._up_at = 0.0

    @property
    def short(self) -> bool:
        """Whether something is withheld."""
        return self._cap is not None

    def allowance(self, promised: int) -> int:
        """What the caches may have of what is promised, which may change between the looks."""
        return promised if self._cap is None else min(self._cap, promised)

    def look(self, now: float, room: Headroom | None, used: int, promised: int, floor: int) -> int:
        """The allowance: ``floor`` <= it <= ``promised`` (bytes, as is ``used``); ``now`` in seconds.

        A floor above what is promised is lowered to it.
        """
        floor = min(floor, promised)
        before = self.allowance(promised)
        allowance = max(before, floor)
        step = max(promised // GROW_STEPS, MIN_STEP)
        most = promised if room is None else used + room.spare
        if room is not None and most < allowance:
            if most < used:
                most -= room.reserve // SLACK_SHARE
                self.shrinks += max(most, floor) < before
            allowance = max(most, floor)
            self._up_at = now + GROW_AFTER_SECONDS
        elif now >= self._up_at and allowance < promised and most >= min(allowance + step, promised):
            allowance = min(allowance + step, promised)
            self.grows += 1
            self._up_at = now + GROW_EVERY_SECONDS
        self._cap = allowance if allowance < promised else None
        return allowance

    def look_again_after(self, room: Headroom | None) -> float:
        """Seconds until the next look, if nothing happens before."""
        latest = LATEST_SHORT_SECONDS if self.short else LATEST_SECONDS
        if room is None:
            return latest
        return min(max(room.spare / FASTEST, SOONEST_SECONDS), latest)
