"""Decide how much memory the caches may use while memory is short: pure policy, no clock, no I/O.

The caches yield, because they hold nothing of their own, and a daemon killed for memory takes the mount
with it. tmem describes its pools likewise: they are "of unknown and possibly time-varying size".

The input is a level, not an alarm: how much more memory could be allocated before the kernel has to
reclaim anything but clean file pages (``Headroom``). Stalls (PSI) are no such measure. A program that
reads more than RAM holds makes the kernel reclaim file pages all the time. Stalls took a quarter of
such a run, although no process lacked memory (docs/pressure.md). They only trigger a measurement.

Two rules follow from the level. The *allowance* limits both caches together:

* It never exceeds what they use plus the spare memory. So the caches cannot grow beyond the memory
  there is, however fast they grow between two measurements.
* When the spare memory is negative, they free that much and a little more, so that a small allocation
  elsewhere does not evict again.

The allowance grows back in steps, after memory was not short for a while, and only if a whole step
fits. That is the hysteresis: demand that oscillates by less than a step lowers it once and never raises
it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

MIB = 1 << 20

RESERVE_SHARE = 32
MIN_RESERVE, MAX_RESERVE = 8 * MIB, 256 * MIB
"""The caches leave 1/RESERVE_SHARE of a limit, within these bounds, to requests, page tables, the
daemon's tables, programs' pages, and what others allocate before the next measurement."""

SLACK_SHARE = 4
"""1/SLACK_SHARE of the reserve is freed in addition whenever the caches must shrink."""

GROW_STEPS = 16
"""Steps from nothing to the configured limits."""

MIN_STEP = 4 * MIB

GROW_AFTER_SECONDS = 3.0
"""How long memory must not have been short before the first step up."""

GROW_EVERY_SECONDS = 1.0

ASSUMED_RATE = 256 * MIB
"""Bytes per second that others may allocate: with less spare memory the next measurement is sooner."""

SOONEST_SECONDS, LATEST_SECONDS = 0.05, 5.0
LATEST_SHORT_SECONDS = 1.0
"""The latest time of the next measurement while memory is withheld, so that it is restored soon."""


@dataclass(frozen=True, slots=True)
class Headroom:
    """Measures the memory left under one limit that counts us: a cgroup's, or the machine's."""

    name: str
    limit: int
    """Bytes."""
    available: int
    """Bytes that could be allocated before the kernel reclaims more than clean file pages; may be <
    0."""

    @property
    def reserve(self) -> int:
        """Return the bytes that the caches leave to others."""
        return min(max(self.limit // RESERVE_SHARE, MIN_RESERVE), MAX_RESERVE)

    @property
    def spare(self) -> int:
        """Return the bytes by which the caches could grow; negative: they must shrink."""
        return self.available - self.reserve


def tightest(headrooms: Iterable[Headroom]) -> Headroom | None:
    """Return the headroom with the least spare memory; None if nothing is known."""
    return min(headrooms, key=lambda headroom: headroom.spare, default=None)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Holds the sizes or limits of both caches, in bytes."""

    pool: int
    page_cache: int

    @property
    def total(self) -> int:
        """Return the sum of both."""
        return self.pool + self.page_cache


def split(allowance: int, configured: Sizes, floor: Sizes) -> Sizes:
    """Split an allowance: the pool shrinks first, the page cache, smaller and faster, last."""
    pool = min(max(allowance - configured.page_cache, floor.pool), configured.pool)
    page_cache = min(max(allowance - pool, floor.page_cache), configured.page_cache)
    return Sizes(pool, page_cache)


class Policy:
    """Decides the allowance over time, which starts at the configured limits."""

    def __init__(self) -> None:
        """Start with enough memory."""
        self._cap: int | None = None
        """The allowance, if it is less than the configured limits."""
        self.shrinks = 0
        """How often the caches had to free memory."""
        self.grows = 0
        """How many steps the allowance has grown back."""
        self._grow_at = 0.0

    @property
    def short(self) -> bool:
        """Tell whether memory is withheld from the caches."""
        return self._cap is not None

    def allowance(self, configured: int) -> int:
        """Return the allowance under configured limits that may have changed since the update."""
        return configured if self._cap is None else min(self._cap, configured)

    def update(
        self, now: float, headroom: Headroom | None, used: int, configured: int, floor: int
    ) -> int:
        """Return the allowance, between ``floor`` and ``configured`` (bytes, as is ``used``).

        ``now`` is in seconds. A floor above ``configured`` is lowered to it.
        """
        floor = min(floor, configured)
        before = self.allowance(configured)
        allowance = max(before, floor)
        step = max(configured // GROW_STEPS, MIN_STEP)
        most = configured if headroom is None else used + headroom.spare
        if headroom is not None and most < allowance:
            if most < used:
                most -= headroom.reserve // SLACK_SHARE
                self.shrinks += max(most, floor) < before
            allowance = max(most, floor)
            self._grow_at = now + GROW_AFTER_SECONDS
        elif (
            now >= self._grow_at
            and allowance < configured
            and most >= min(allowance + step, configured)
        ):
            allowance = min(allowance + step, configured)
            self.grows += 1
            self._grow_at = now + GROW_EVERY_SECONDS
        self._cap = allowance if allowance < configured else None
        return allowance

    def next_update_after(self, headroom: Headroom | None) -> float:
        """Return the seconds until the next measurement, unless an event comes before."""
        latest = LATEST_SHORT_SECONDS if self.short else LATEST_SECONDS
        if headroom is None:
            return latest
        return min(max(headroom.spare / ASSUMED_RATE, SOONEST_SECONDS), latest)
