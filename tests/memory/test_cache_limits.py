"""Test the effective limits of both caches, with simulated memory."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import trio
import trio.lowlevel

from cleanfs.backends.ops import FileKey
from cleanfs.backends.options import BackendOptions
from cleanfs.backends.reference import ReferenceZcache
from cleanfs.cache.cleancache import Cleancache
from cleanfs.cache.files import max_files
from cleanfs.cache.pagecache import PageCache
from cleanfs.cache.resident import make_resident
from cleanfs.memory import cache_limits
from cleanfs.memory.available import Limit, MemoryWatch
from cleanfs.memory.cache_limits import FLOOR, POOL_SLICE, CacheLimits, oversize_warning
from cleanfs.memory.policy import MIB, Headroom, Sizes
from tests.backends.pages import noise

PAGE_SIZE = 4096
KEY = FileKey(1, 2, b"")
CONFIGURED = Sizes(64 * MIB, 8 * MIB)


class Memory(MemoryWatch):
    """Simulates the spare memory; no event ever comes."""

    def __init__(self) -> None:
        super().__init__()
        self.spare: Callable[[], int] = lambda: 1 << 40
        self.looked = trio.Event()

    def headrooms(self) -> list[Headroom]:
        headroom = Headroom("test", 1024 * MIB, 0)
        return [Headroom("test", headroom.limit, self.spare() + headroom.reserve)]

    async def wait(self, seconds: float) -> None:
        self.looked.set()
        await trio.sleep_forever()


class Parts:
    """Holds cache limits and the caches that they apply to."""

    def __init__(self, backend: bool = True, watch: bool = True) -> None:
        self.memory = Memory()
        self.cleancache = Cleancache()
        self.fs = self.cleancache.init_fs(PAGE_SIZE)
        self.backend = ReferenceZcache(BackendOptions(CONFIGURED.pool))
        if backend:
            self.cleancache.register(self.backend)
        self.pagecache = PageCache(CONFIGURED.page_cache, self.fs, make_resident(PAGE_SIZE))
        self.limits = CacheLimits(
            self.cleancache, self.pagecache, CONFIGURED, self.memory if watch else None
        )

    def fill(self, mib: int) -> None:
        """Put this many bytes into the pool."""
        pages = mib * MIB // PAGE_SIZE
        self.fs.put_pages(KEY, [(i, noise(i)) for i in range(pages)])

    async def settle(self) -> None:
        """Run one measurement and apply its limits."""
        self.memory.looked = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.limits.run)
            with trio.fail_after(30):
                await self.memory.looked.wait()
            nursery.cancel_scope.cancel()


async def test_with_enough_memory_nothing_changes() -> None:
    parts = Parts()
    await parts.settle()
    assert parts.limits.effective == parts.limits.configured == CONFIGURED
    assert parts.backend.pool_limit == CONFIGURED.pool
    assert parts.limits.stats().memory_withheld_bytes == 0


async def test_while_memory_is_short_the_pool_shrinks_and_its_configured_limit_stays() -> None:
    parts = Parts()
    parts.fill(24)
    used = parts.backend.counters()["pool_used"]
    parts.memory.spare = lambda: -4 * MIB
    await parts.settle()
    stats = parts.limits.stats()
    assert parts.backend.counters()["pool_used"] <= used - 4 * MIB
    assert parts.backend.pool_limit == stats.pool_limit_now <= used - 4 * MIB
    assert stats.pool_limit == CONFIGURED.pool
    assert stats.memory_pressure_shrinks == 1
    assert stats.memory_withheld_bytes == CONFIGURED.total - parts.limits.effective.total
    assert parts.limits.effective.page_cache == CONFIGURED.page_cache, "the pool shrinks first"
    assert parts.pagecache.max_files == max_files(stats.pool_limit_now)


async def test_the_page_cache_shrinks_once_the_pool_is_at_its_floor() -> None:
    parts = Parts()
    parts.fill(10)
    parts.memory.spare = lambda: -100 * MIB
    await parts.settle()
    assert parts.limits.effective == FLOOR
    assert parts.pagecache.limit == FLOOR.page_cache
    assert parts.backend.pool_limit == FLOOR.pool


async def test_unused_memory_takes_few_slices() -> None:
    parts = Parts()
    parts.limits.set_pool_limit(1 << 62)
    parts.limits.set_page_cache(1 << 62)
    resized = []
    resize = parts.backend.resize
    parts.backend.resize = lambda limit: resized.append(limit) or resize(limit)  # type: ignore[method-assign,assignment]  # counts calls
    parts.memory.spare = lambda: 100 * MIB
    await parts.settle()
    assert parts.limits.effective.total <= 100 * MIB
    assert len(resized) < 4


@pytest.mark.parametrize(("yields", "follows"), [(True, "get less"), (False, "end the daemon")])
def test_limits_that_exceed_memory_cause_a_warning(
    monkeypatch: pytest.MonkeyPatch, yields: bool, follows: str
) -> None:
    monkeypatch.setattr(cache_limits, "least_limit", lambda: Limit(64 * MIB, "this machine"))
    assert oversize_warning(Sizes(60 * MIB, 4 * MIB), yields=yields) == ""
    warning = oversize_warning(Sizes(60 * MIB, 4 * MIB + 1), yields=yields)
    assert "pool limit 60.0 MiB and page cache 4.0 MiB are more than the 64.0 MiB" in warning
    assert follows in warning
    assert "page cache" not in oversize_warning(Sizes(65 * MIB, 0), yields=yields)
    monkeypatch.setattr(cache_limits, "least_limit", lambda: None)
    assert oversize_warning(Sizes(1 << 62, 1 << 62), yields=yields) == ""


async def test_other_tasks_run_between_the_slices() -> None:
    parts = Parts()
    parts.fill(48)
    used = parts.backend.counters()["pool_used"]
    parts.memory.spare = lambda: -24 * MIB
    limits = {used}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(parts.limits.run)
        with trio.fail_after(30):
            while not parts.memory.looked.is_set():
                limits.add(parts.backend.pool_limit)
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert len(limits) > 4
    ordered = sorted(limit for limit in limits if limit <= used)
    slack = 2 * PAGE_SIZE  # evicting down to a limit ends somewhat below it
    assert all(b - a <= 2 * (POOL_SLICE + slack) for a, b in pairwise(ordered))


async def test_effective_limits_stay_below_configured_limits_and_memory() -> None:
    parts = Parts()
    parts.memory.spare = lambda: 20 * MIB - parts.backend.counters()["pool_used"]
    await parts.settle()
    assert parts.limits.effective.total == 20 * MIB
    parts.limits.set_pool_limit(5 * MIB)
    assert (
        parts.backend.pool_limit
        == 5 * MIB
        == parts.limits.effective.pool
        == parts.limits.configured.pool
    )
    parts.limits.set_pool_limit(1024 * MIB)
    assert parts.limits.configured.pool == 1024 * MIB
    assert parts.backend.pool_limit == parts.limits.effective.pool <= 20 * MIB
    parts.limits.set_page_cache(16 * MIB)
    assert parts.limits.configured.page_cache == 16 * MIB
    assert parts.limits.effective.total <= 21 * MIB


async def test_a_refused_limit_changes_nothing() -> None:
    parts = Parts()
    with pytest.raises(ValueError, match="below"):
        parts.limits.set_pool_limit(1)
    with pytest.raises(ValueError, match="neither"):
        parts.limits.set_page_cache(1)
    assert parts.limits.effective == parts.limits.configured == CONFIGURED
    assert parts.backend.pool_limit == CONFIGURED.pool


async def test_a_backend_registered_later_gets_no_more_than_memory_allows() -> None:
    parts = Parts(backend=False)
    parts.memory.spare = lambda: 30 * MIB
    await parts.settle()
    assert parts.limits.effective == CONFIGURED, "without a backend there is no pool to shrink"
    parts.cleancache.register(parts.backend)
    parts.limits.backend_changed()
    assert parts.backend.pool_limit == parts.limits.effective.pool == 22 * MIB
    parts.cleancache.unregister()
    parts.limits.backend_changed()
    assert parts.limits.effective == CONFIGURED


async def test_without_a_watch_nothing_is_withheld() -> None:
    parts = Parts(watch=False)
    parts.memory.spare = lambda: -1024 * MIB
    await parts.limits.run()
    parts.limits.set_pool_limit(32 * MIB)
    parts.limits.backend_changed()
    assert parts.limits.effective == Sizes(32 * MIB, CONFIGURED.page_cache)
    assert parts.limits.stats().memory_pressure == "off"


async def test_a_backend_that_refuses_a_limit_keeps_its_own() -> None:
    parts = Parts()

    def refuse(pool_limit: int) -> None:
        raise ValueError(pool_limit)

    parts.backend.resize = refuse  # type: ignore[method-assign]  # fails on purpose
    parts.memory.spare = lambda: -100 * MIB
    await parts.settle()
    assert parts.backend.pool_limit == CONFIGURED.pool
    assert parts.limits.stats().memory_pressure_events == 0


async def test_the_kernels_ring_is_a_part_of_the_pools_limit_and_the_page_cache_goes() -> None:
    parts = Parts()
    parts.limits.leave_pages_to_kernel(8 * MIB)
    assert parts.backend.pool_limit == CONFIGURED.pool - 8 * MIB
    assert parts.limits.effective == Sizes(CONFIGURED.pool, 0)
    assert parts.limits.configured == CONFIGURED
    assert parts.pagecache.limit == parts.limits.stats().memory_withheld_bytes == 0
    parts.limits.set_page_cache(2 * MIB)
    assert parts.pagecache.limit == 0
    parts.limits.set_pool_limit(32 * MIB)
    assert parts.backend.pool_limit == 24 * MIB
    parts.fill(20)
    parts.memory.spare = lambda: -(1 << 40)
    await parts.settle()
    assert parts.limits.effective.pool == FLOOR.pool + 8 * MIB
    assert parts.backend.pool_limit == FLOOR.pool
    with pytest.raises(ValueError, match="is below"):
        parts.limits.set_pool_limit(8 * MIB)


async def test_a_backend_registered_later_leaves_the_ring_its_part() -> None:
    parts = Parts(backend=False)
    parts.limits.leave_pages_to_kernel(8 * MIB)
    parts.cleancache.register(parts.backend)
    parts.limits.backend_changed()
    assert parts.backend.pool_limit == CONFIGURED.pool - 8 * MIB
