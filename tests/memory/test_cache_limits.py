"""What both caches may have, with a memory that is made up."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import trio
import trio.lowlevel

from cleanfs.backends.ops import FileKey
from cleanfs.backends.options import BackendOptions
from cleanfs.backends.reference import ReferenceZcache
from cleanfs.cache.cleancache import Cleancache
from cleanfs.cache.pagecache import PageCache, max_files
from cleanfs.cache.resident import make_resident
from cleanfs.memory import cache_limits
from cleanfs.memory.available import Limit, MemoryWatch
from cleanfs.memory.cache_limits import FLOOR, POOL_SLICE, CacheLimits, too_large
from cleanfs.memory.policy import MIB, Headroom, Sizes
from tests.backends.pages import noise

PAGE_SIZE = 4096
KEY = FileKey(1, 2, b"")
PROMISED = Sizes(64 * MIB, 8 * MIB)


class Memory(MemoryWatch):
    """As much as a test says; the kernel never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.spare: Callable[[], int] = lambda: 1 << 40
        self.looked = trio.Event()

    def rooms(self) -> list[Headroom]:
        room = Headroom("test", 1024 * MIB, 0)
        return [Headroom("test", room.limit, self.spare() + room.reserve)]

    async def wait(self, seconds: float) -> None:
        self.looked.set()
        await trio.sleep_forever()


class Parts:
    """A keeper and what it keeps."""

    def __init__(self, backend: bool = True, watch: bool = True) -> None:
        self.memory = Memory()
        self.cleancache = Cleancache()
        self.fs = self.cleancache.init_fs(PAGE_SIZE)
        self.backend = ReferenceZcache(BackendOptions(PROMISED.pool))
        if backend:
            self.cleancache.register(self.backend)
        self.pagecache = PageCache(PROMISED.page_cache, self.fs, make_resident(PAGE_SIZE))
        self.keeper = CacheLimits(
            self.cleancache, self.pagecache, PROMISED, self.memory if watch else None
        )

    def fill(self, mib: int) -> None:
        """So much in the pool."""
        pages = mib * MIB // PAGE_SIZE
        self.fs.put_pages(KEY, [(i, noise(i)) for i in range(pages)])

    async def settle(self) -> None:
        """A look, and all that follows."""
        self.memory.looked = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.keeper.run)
            with trio.fail_after(30):
                await self.memory.looked.wait()
            nursery.cancel_scope.cancel()


async def test_with_room_nothing_changes() -> None:
    parts = Parts()
    await parts.settle()
    assert parts.keeper.now == parts.keeper.promised == PROMISED
    assert parts.backend.pool_limit == PROMISED.pool
    assert parts.keeper.stats().memory_withheld_bytes == 0


async def test_while_memory_is_short_the_pool_yields_and_the_promise_stays() -> None:
    parts = Parts()
    parts.fill(24)
    used = parts.backend.counters()["pool_used"]
    parts.memory.spare = lambda: -4 * MIB
    await parts.settle()
    stats = parts.keeper.stats()
    assert parts.backend.counters()["pool_used"] <= used - 4 * MIB
    assert parts.backend.pool_limit == stats.pool_limit_now <= used - 4 * MIB
    assert stats.pool_limit == PROMISED.pool
    assert stats.memory_pressure_shrinks == 1
    assert stats.memory_withheld_bytes == PROMISED.total - parts.keeper.now.total
    assert parts.keeper.now.page_cache == PROMISED.page_cache, "the pool yields first"
    assert parts.pagecache.max_files == max_files(stats.pool_limit_now)


async def test_the_page_cache_yields_when_the_pool_has_nothing_left() -> None:
    parts = Parts()
    parts.fill(10)
    parts.memory.spare = lambda: -100 * MIB
    await parts.settle()
    assert parts.keeper.now == FLOOR
    assert parts.pagecache.limit == FLOOR.page_cache
    assert parts.backend.pool_limit == FLOOR.pool


async def test_to_take_back_what_nobody_uses_takes_no_time() -> None:
    parts = Parts()
    parts.keeper.set_pool_limit(1 << 62)
    parts.keeper.set_page_cache(1 << 62)
    resized = []
    resize = parts.backend.resize
    parts.backend.resize = lambda limit: resized.append(limit) or resize(limit)  # type: ignore[method-assign, func-returns-value]  # to count
    parts.memory.spare = lambda: 100 * MIB
    await parts.settle()
    assert parts.keeper.now.total <= 100 * MIB
    assert len(resized) < 4


@pytest.mark.parametrize(("yields", "follows"), [(True, "get less"), (False, "end the daemon")])
def test_limits_that_memory_can_not_hold_are_spoken_of(
    monkeypatch: pytest.MonkeyPatch, yields: bool, follows: str
) -> None:
    monkeypatch.setattr(cache_limits, "least_limit", lambda: Limit(64 * MIB, "this machine"))
    assert too_large(Sizes(60 * MIB, 4 * MIB), yields=yields) == ""
    complaint = too_large(Sizes(60 * MIB, 4 * MIB + 1), yields=yields)
    assert "pool limit 60.0 MiB and page cache 4.0 MiB are more than the 64.0 MiB" in complaint
    assert follows in complaint
    assert "page cache" not in too_large(Sizes(65 * MIB, 0), yields=yields)
    monkeypatch.setattr(cache_limits, "least_limit", lambda: None)
    assert too_large(Sizes(1 << 62, 1 << 62), yields=yields) == ""


async def test_requests_are_answered_between_the_slices() -> None:
    parts = Parts()
    parts.fill(48)
    used = parts.backend.counters()["pool_used"]
    parts.memory.spare = lambda: -24 * MIB
    limits = {used}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(parts.keeper.run)
        with trio.fail_after(30):
            while not parts.memory.looked.is_set():
                limits.add(parts.backend.pool_limit)
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert len(limits) > 4
    ordered = sorted(limit for limit in limits if limit <= used)
    slack = 2 * PAGE_SIZE  # evicting down to a limit ends somewhat below it
    assert all(b - a <= 2 * (POOL_SLICE + slack) for a, b in pairwise(ordered))


async def test_the_users_limits_are_the_ceiling_and_never_more_than_there_is() -> None:
    parts = Parts()
    parts.memory.spare = lambda: 20 * MIB - parts.backend.counters()["pool_used"]
    await parts.settle()
    assert parts.keeper.now.total == 20 * MIB
    parts.keeper.set_pool_limit(5 * MIB)
    assert parts.backend.pool_limit == 5 * MIB == parts.keeper.now.pool == parts.keeper.promised.pool
    parts.keeper.set_pool_limit(1024 * MIB)
    assert parts.keeper.promised.pool == 1024 * MIB
    assert parts.backend.pool_limit == parts.keeper.now.pool <= 20 * MIB
    parts.keeper.set_page_cache(16 * MIB)
    assert parts.keeper.promised.page_cache == 16 * MIB
    assert parts.keeper.now.total <= 21 * MIB


async def test_a_limit_that_is_refused_changes_nothing() -> None:
    parts = Parts()
    with pytest.raises(ValueError, match="below"):
        parts.keeper.set_pool_limit(1)
    with pytest.raises(ValueError, match="neither"):
        parts.keeper.set_page_cache(1)
    assert parts.keeper.now == parts.keeper.promised == PROMISED
    assert parts.backend.pool_limit == PROMISED.pool


async def test_a_backend_that_comes_later_gets_no_more_than_there_is() -> None:
    parts = Parts(backend=False)
    parts.memory.spare = lambda: 30 * MIB
    await parts.settle()
    assert parts.keeper.now == PROMISED, "without a backend there is no pool that could take anything"
    parts.cleancache.register(parts.backend)
    parts.keeper.backend_changed()
    assert parts.backend.pool_limit == parts.keeper.now.pool == 22 * MIB
    parts.cleancache.unregister()
    parts.keeper.backend_changed()
    assert parts.keeper.now == PROMISED


async def test_off_is_off() -> None:
    parts = Parts(watch=False)
    parts.memory.spare = lambda: -1024 * MIB
    await parts.keeper.run()
    parts.keeper.set_pool_limit(32 * MIB)
    parts.keeper.backend_changed()
    assert parts.keeper.now == Sizes(32 * MIB, PROMISED.page_cache)
    assert parts.keeper.stats().memory_pressure == "off"


async def test_a_backend_that_can_not_be_so_small_stays_and_nobody_is_hurt() -> None:
    parts = Parts()

    def refuse(limit: int) -> None:
        raise ValueError(limit)

    parts.backend.resize = refuse  # type: ignore[method-assign]
    parts.memory.spare = lambda: -100 * MIB
    await parts.settle()
    assert parts.backend.pool_limit == PROMISED.pool
    assert parts.keeper.stats().memory_pressure_events == 0
