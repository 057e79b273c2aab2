"""Set the effective cache limits: the configured limits minus what memory pressure withholds.

The configured limits of pool and page cache are the ceiling, and are what the control files show.
``policy.Policy`` decides how much to withhold, from what ``available.MemoryWatch`` measures.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import trio

from cleanfs.cache.cleancache import Cleancache
from cleanfs.cache.files import max_files
from cleanfs.cache.pagecache import PageCache
from cleanfs.linux import syscalls
from cleanfs.memory.available import MemoryWatch, least_limit
from cleanfs.memory.least_sizes import check_sizes, least_sizes
from cleanfs.memory.policy import MIB, Headroom, Policy, Sizes, split, tightest
from cleanfs.sizes import format_size

log = logging.getLogger(__name__)

POOL_SLICE = 4 * MIB
PAGE_CACHE_SLICE = 1 * MIB
"""Bytes freed between two checkpoints, so that requests never wait for more (docs/pressure.md)."""

FLOOR = Sizes(4 * MIB, 1 * MIB)
"""The sizes that memory pressure leaves, or more where the page size needs more."""

TRIM_EVERY = 4
"""Slices after which malloc is trimmed, so that other processes get the freed memory early."""

BETWEEN_EVENTS_SECONDS = 0.05
"""The least pause between two measurements. Constant reclaim of file pages would wake us all the
time."""


@dataclass(frozen=True, slots=True)
class CacheLimitsStats:
    """Holds a snapshot of the limits and of memory pressure."""

    memory_pressure: str
    """``off``, or what is watched."""
    memory_spare_bytes: int
    """How much the caches could grow, at the last measurement; negative: they were too large. 0 when
    off."""
    memory_withheld_bytes: int
    """The part of the configured limits that is withheld."""
    memory_pressure_events: int
    """How often a pressure event woke us."""
    memory_pressure_shrinks: int
    """How often the caches had to free memory."""
    memory_pressure_grows: int
    """How many steps they have grown back."""
    pool_limit: int
    """The configured limit."""
    pool_limit_now: int
    """The effective limit."""


def oversize_warning(configured: Sizes, *, yields: bool) -> str:
    """Return a warning about limits that exceed memory; empty if they do not.

    That is no error: the caches take only what they use. If ``yields``, they also shrink while memory
    is short.
    """
    limit = least_limit()
    if limit is None or configured.total <= limit.size:
        return ""
    parts = {"pool limit": configured.pool, "page cache": configured.page_cache}
    what = " and ".join(f"{name} {format_size(size)}" for name, size in parts.items() if size)
    follows = (
        "the caches will get less while memory is short"
        if yields
        else "without --memory-pressure the kernel may end the daemon for want of memory"
    )
    return f"{what} are more than the {format_size(limit.size)} of {limit.of}: {follows}"


class CacheLimits:
    """Sets the limits of both caches."""

    def __init__(
        self,
        cleancache: Cleancache,
        pagecache: PageCache,
        configured: Sizes,
        watch: MemoryWatch | None,
    ) -> None:
        """Start with the configured limits, which both caches already have.

        Without a watch those stay in force.
        """
        self._cleancache = cleancache
        self._pagecache = pagecache
        self._configured = configured
        self._effective = configured
        """The effective limits. While there is no backend, the pool's is for the next one."""
        self._reserved = 0
        self._kernel_keeps_pages = False
        self._watch = watch
        self._policy = Policy()
        self._headroom: Headroom | None = None
        self._page_size = pagecache.page_size
        self._warn_if_oversize()

    @property
    def configured(self) -> Sizes:
        """Return the limits that the user configured."""
        return self._configured

    @property
    def effective(self) -> Sizes:
        """Return the effective limits."""
        return self._effective

    def leave_pages_to_kernel(self, ring_bytes: int) -> None:
        """Keep no page cache. The memory of the ring counts against the pool's limit."""
        self._kernel_keeps_pages = True
        self._reserved = ring_bytes
        self._resize_pool(self._effective.pool)
        self._apply_at_once()

    def set_pool_limit(self, limit: int) -> None:
        """Configure the pool's limit, in force at once except for what is withheld.

        Raises ValueError; nothing has changed then.
        """
        check_sizes(limit - self._reserved, 0, self._page_size)
        before, self._configured = self._configured, Sizes(limit, self._configured.page_cache)
        self.measure(time.monotonic())
        pool = self._target().pool
        backend = self._cleancache.backend
        if backend is not None:
            try:
                backend.resize(pool - self._reserved)
            except ValueError:
                self._configured = before
                raise
        self._effective = Sizes(pool, self._effective.page_cache)
        self._pagecache.max_files = max_files(pool)
        self._apply_at_once()
        self._warn_if_oversize()

    def set_page_cache(self, limit: int) -> None:
        """Configure the page cache's limit, likewise."""
        check_sizes(self._configured.pool, limit, self._page_size)
        self._configured = Sizes(self._configured.pool, limit)
        self.measure(time.monotonic())
        self._apply_at_once()
        self._warn_if_oversize()

    def backend_changed(self) -> None:
        """Adapt to another backend, which is empty and has the configured limit, or to none."""
        self._effective = Sizes(self._configured.pool, self._effective.page_cache)
        self._resize_pool(self._effective.pool)
        self.measure(time.monotonic())
        self._apply_at_once()

    def stats(self) -> CacheLimitsStats:
        """Return a snapshot."""
        watch = self._watch
        return CacheLimitsStats(
            memory_pressure="off" if watch is None else ",".join(watch.watched),
            memory_spare_bytes=0 if self._headroom is None else self._headroom.spare,
            memory_withheld_bytes=self._wanted().total - self._effective.total,
            memory_pressure_events=0 if watch is None else watch.events,
            memory_pressure_shrinks=self._policy.shrinks,
            memory_pressure_grows=self._policy.grows,
            pool_limit=self._configured.pool,
            pool_limit_now=self._effective.pool,
        )

    async def run(self) -> None:
        """Measure memory and apply the limits, until cancelled."""
        watch = self._watch
        if watch is None:
            return
        try:
            while True:
                self.measure(time.monotonic())
                await self._apply()
                begun = time.monotonic()
                await watch.wait(self._policy.next_update_after(self._headroom))
                if time.monotonic() - begun < BETWEEN_EVENTS_SECONDS:
                    await trio.sleep(BETWEEN_EVENTS_SECONDS)
        finally:
            watch.close()

    def measure(self, now: float) -> None:
        """Measure memory and update the policy, without applying it yet."""
        if self._watch is None:
            return
        self._headroom = headroom = tightest(self._watch.headrooms())
        was_short = self._policy.short
        configured, floor = self._managed(), self._floor()
        self._policy.update(now, headroom, self._used(), configured.total, floor.total)
        if self._policy.short and not was_short and headroom is not None:
            log.info(
                "%s of %s: memory is short, the caches get less",
                headroom.name,
                format_size(headroom.limit),
            )
        elif was_short and not self._policy.short:
            log.info("memory is not short any more, the caches get their configured limits")

    def _warn_if_oversize(self) -> None:
        if warning := oversize_warning(self._managed(), yields=self._watch is not None):
            log.warning("%s", warning)

    def _apply_at_once(self) -> None:
        """Apply the limits before returning, because the user has just set one."""
        while self._apply_slice():
            pass
        syscalls.trim_malloc()

    async def _apply(self) -> None:
        """Apply the limits slice by slice.

        The user may change the configured ones between two slices.
        """
        slices = 0
        while self._apply_slice():
            slices += 1
            if slices % TRIM_EVERY == 0:
                syscalls.trim_malloc()
            await trio.lowlevel.checkpoint()
        if slices:
            syscalls.trim_malloc()

    def _apply_slice(self) -> bool:
        """Apply one slice, and return whether there are more. Unused memory takes no slices."""
        target, now = self._target(), self._effective
        if now.pool != target.pool:
            pool = max(target.pool, min(now.pool, self._pool_used()) - POOL_SLICE)
            self._resize_pool(pool)
            self._effective = Sizes(pool, now.page_cache)
        elif now.page_cache != target.page_cache:
            used = min(now.page_cache, self._pagecache.used)
            page_cache = max(target.page_cache, used - PAGE_CACHE_SLICE)
            self._pagecache.resize(page_cache)
            self._effective = Sizes(now.pool, page_cache)
        return self._effective != target

    def _resize_pool(self, limit: int) -> None:
        backend = self._cleancache.backend
        own = limit - self._reserved
        if backend is not None and backend.pool_limit != own:
            try:
                backend.resize(own)
            except (ValueError, MemoryError) as exc:
                # The backend refuses a limit that it cannot work with, and keeps its own.
                log.debug("the backend stays at %d bytes: %s", backend.pool_limit, exc)
        self._pagecache.max_files = max_files(limit)

    def _target(self) -> Sizes:
        """Return the limits that the policy allows now."""
        managed = self._managed()
        share = split(self._policy.allowance(managed.total), managed, self._floor())
        return (
            share
            if self._cleancache.backend is not None
            else Sizes(self._effective.pool, share.page_cache)
        )

    def _managed(self) -> Sizes:
        """Return the configured limits of the caches there are: without a backend there is no pool."""
        wanted = self._wanted()
        return Sizes(0, wanted.page_cache) if self._cleancache.backend is None else wanted

    def _wanted(self) -> Sizes:
        """Return the configured limits, without a page cache that the kernel makes needless."""
        return Sizes(self._configured.pool, 0) if self._kernel_keeps_pages else self._configured

    def _floor(self) -> Sizes:
        pool, page_cache = least_sizes(self._page_size)
        managed = self._managed()
        return Sizes(
            min(max(FLOOR.pool, pool) + self._reserved, managed.pool),
            min(max(FLOOR.page_cache, page_cache), managed.page_cache),
        )

    def _used(self) -> int:
        """Return the bytes that the caches use."""
        return self._pool_used() + self._pagecache.used

    def _pool_used(self) -> int:
        """Return the bytes that the backend uses; its limit if it has no such counter."""
        backend = self._cleancache.backend
        if backend is None:
            return 0
        nothing: Mapping[str, int] = {}
        counters = self._cleancache.call(lambda ops: ops.counters(), nothing)
        return counters.get("pool_used", backend.pool_limit) + self._reserved
