"""What pool and page cache may have: what the user promised them, less what memory pressure takes.

The user's limits are the ceiling, and what is told when they are asked for. The limits in force are at
most these; ``pressure.Policy`` says by how much less, ``memory.MemoryWatch`` what it goes by.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import trio

from cleanfs.cache.cleancache import Cleancache
from cleanfs.cache.pagecache import PageCache, max_files
from cleanfs.linux import syscalls
from cleanfs.memory.available import MemoryWatch, least_limit
from cleanfs.memory.least_sizes import check_sizes, least_sizes
from cleanfs.memory.policy import MIB, Headroom, Policy, Sizes, split, tightest
from cleanfs.sizes import format_size

log = logging.getLogger(__name__)

POOL_SLICE = 4 * MIB
PAGE_CACHE_SLICE = 1 * MIB
"""Bytes given up between two checkpoints: requests wait for no more than that (docs/pressure.md)."""

FLOOR = Sizes(4 * MIB, 1 * MIB)
"""What is never taken; unless a page size takes more to work at all."""

TRIM_EVERY = 4
"""Slices after which freed memory goes back to the system: what others wait for is not ours to keep."""

BETWEEN_EVENTS_SECONDS = 0.05
"""While file pages are reclaimed all the time the kernel would wake us all the time."""


@dataclass(frozen=True, slots=True)
class CacheLimitsStats:
    """A snapshot."""

    memory_pressure: str
    """``off``, or what is watched."""
    memory_spare_bytes: int
    """What the caches could take more, at the last look; negative: they had too much. 0 when off."""
    memory_withheld_bytes: int
    """What they may not have of the user's limits."""
    memory_pressure_events: int
    """Times that the kernel called for a look."""
    memory_pressure_shrinks: int
    """Times that the caches had to give up what they had."""
    memory_pressure_grows: int
    """Steps in which they got it back."""
    pool_limit: int
    """The user's."""
    pool_limit_now: int
    """The one in force."""


def too_large(promised: Sizes, *, yields: bool) -> str:
    """What is to be said of limits that memory can not hold; empty if there is nothing.

    That is no error: the caches take what they use and no more, and ``yields`` says that they give it
    up while memory is short.
    """
    limit = least_limit()
    if limit is None or promised.total <= limit.size:
        return ""
    parts = {"pool limit": promised.pool, "page cache": promised.page_cache}
    what = " and ".join(f"{name} {format_size(size)}" for name, size in parts.items() if size)
    follows = (
        "the caches will get less while memory is short"
        if yields
        else "without --memory-pressure the kernel may end the daemon for want of memory"
    )
    return f"{what} are more than the {format_size(limit.size)} of {limit.of}: {follows}"


class CacheLimits:
    """Owns the limits of both caches."""

    def __init__(
        self,
        cleancache: Cleancache,
        pagecache: PageCache,
        promised: Sizes,
        watch: MemoryWatch | None,
    ) -> None:
        """Both caches work with what was promised already. Without a watch that is how it stays."""
        self._cleancache = cleancache
        self._pagecache = pagecache
        self._promised = promised
        self._now = promised
        """In force. The pool's is for the next backend while there is none."""
        self._watch = watch
        self._policy = Policy()
        self._room: Headroom | None = None
        self._page_size = pagecache.page_size
        self._warn_of_too_much()

    @property
    def promised(self) -> Sizes:
        """The user's limits."""
        return self._promised

    @property
    def now(self) -> Sizes:
        """The limits in force."""
        return self._now

    def set_pool_limit(self, limit: int) -> None:
        """The user's; in force at once but for what is withheld. ValueError: nothing has changed."""
        check_sizes(limit, 0, self._page_size)
        before, self._promised = self._promised, Sizes(limit, self._promised.page_cache)
        self.look(time.monotonic())
        pool = self._wanted().pool
        backend = self._cleancache.backend
        if backend is not None:
            try:
                backend.resize(pool)
            except ValueError:
                self._promised = before
                raise
        self._now = Sizes(pool, self._now.page_cache)
        self._pagecache.max_files = max_files(pool)
        self._settle_at_once()
        self._warn_of_too_much()

    def set_page_cache(self, limit: int) -> None:
        """The same of the page cache."""
        check_sizes(self._promised.pool, limit, self._page_size)
        self._promised = Sizes(self._promised.pool, limit)
        self.look(time.monotonic())
        self._settle_at_once()
        self._warn_of_too_much()

    def backend_changed(self) -> None:
        """There is another one, with all that was promised and nothing in it yet, or none."""
        self._now = Sizes(self._promised.pool, self._now.page_cache)
        self.look(time.monotonic())
        self._settle_at_once()

    def stats(self) -> CacheLimitsStats:
        """A snapshot."""
        watch = self._watch
        return CacheLimitsStats(
            memory_pressure="off" if watch is None else ",".join(watch.watched),
            memory_spare_bytes=0 if self._room is None else self._room.spare,
            memory_withheld_bytes=self._promised.total - self._now.total,
            memory_pressure_events=0 if watch is None else watch.events,
            memory_pressure_shrinks=self._policy.shrinks,
            memory_pressure_grows=self._policy.grows,
            pool_limit=self._promised.pool,
            pool_limit_now=self._now.pool,
        )

    async def run(self) -> None:
        """Look, and do what follows, until cancelled."""
        watch = self._watch
        if watch is None:
            return
        try:
            while True:
                self.look(time.monotonic())
                await self._settle()
                begun = time.monotonic()
                await watch.wait(self._policy.look_again_after(self._room))
                if time.monotonic() - begun < BETWEEN_EVENTS_SECONDS:
                    await trio.sleep(BETWEEN_EVENTS_SECONDS)
        finally:
            watch.close()

    def look(self, now: float) -> None:
        """See how much memory there is and what that allows; nothing is done about it yet."""
        if self._watch is None:
            return
        self._room = room = tightest(self._watch.rooms())
        was_short = self._policy.short
        promised, floor = self._managed(), self._floor()
        self._policy.look(now, room, self._used(), promised.total, floor.total)
        if self._policy.short and not was_short and room is not None:
            log.info(
                "%s of %s: memory is short, the caches get less", room.name, format_size(room.limit)
            )
        elif was_short and not self._policy.short:
            log.info("memory is not short any more, the caches get what they were promised")

    def _warn_of_too_much(self) -> None:
        if complaint := too_large(self._managed(), yields=self._watch is not None):
            log.warning("%s", complaint)

    def _settle_at_once(self) -> None:
        """For the user, who finds in force what was asked for."""
        while self._slice():
            pass
        syscalls.trim_malloc()

    async def _settle(self) -> None:
        """Bring the limits in force to what is allowed, slice by slice.

        The user may change his between the slices.
        """
        slices = 0
        while self._slice():
            slices += 1
            if slices % TRIM_EVERY == 0:
                syscalls.trim_malloc()
            await trio.lowlevel.checkpoint()
        if slices:
            syscalls.trim_malloc()

    def _slice(self) -> bool:
        """A slice on the way; whether there is more to do. What nobody uses costs no slices."""
        wanted, now = self._wanted(), self._now
        if now.pool != wanted.pool:
            pool = max(wanted.pool, min(now.pool, self._pool_used()) - POOL_SLICE)
            self._resize_pool(pool)
            self._now = Sizes(pool, now.page_cache)
        elif now.page_cache != wanted.page_cache:
            used = min(now.page_cache, self._pagecache.used)
            page_cache = max(wanted.page_cache, used - PAGE_CACHE_SLICE)
            self._pagecache.resize(page_cache)
            self._now = Sizes(now.pool, page_cache)
        return self._now != wanted

    def _resize_pool(self, limit: int) -> None:
        backend = self._cleancache.backend
        if backend is not None and backend.pool_limit != limit:
            try:
                backend.resize(limit)
            except (ValueError, MemoryError) as exc:
                # As small as it works; what it has by then is no matter.
                log.debug("the backend stays at %d bytes: %s", backend.pool_limit, exc)
        self._pagecache.max_files = max_files(limit)

    def _wanted(self) -> Sizes:
        """The limits that the policy's last word makes of the user's."""
        managed = self._managed()
        share = split(self._policy.allowance(managed.total), managed, self._floor())
        return (
            share if self._cleancache.backend is not None else Sizes(self._now.pool, share.page_cache)
        )

    def _managed(self) -> Sizes:
        """What is promised to whom there is: without a backend nothing can be taken from a pool."""
        if self._cleancache.backend is None:
            return Sizes(0, self._promised.page_cache)
        return self._promised

    def _floor(self) -> Sizes:
        pool, page_cache = least_sizes(self._page_size)
        managed = self._managed()
        return Sizes(
            min(max(FLOOR.pool, pool), managed.pool),
            min(max(FLOOR.page_cache, page_cache), managed.page_cache),
        )

    def _used(self) -> int:
        """Bytes that the caches have."""
        return self._pool_used() + self._pagecache.used

    def _pool_used(self) -> int:
        """Bytes that the backend has. One that does not say has all that it may have."""
        backend = self._cleancache.backend
        if backend is None:
            return 0
        nothing: Mapping[str, int] = {}
        counters = self._cleancache.call(lambda ops: ops.counters(), nothing)
        return counters.get("pool_used", backend.pool_limit)
