"""Every engine keeps its memory limit by its own count (test_rss.py checks the system's count)."""

from typing import Any

import pytest

from cleanfs.backends.ops import FileKey
from tests.backends.engines import (
    SEGMENT,
    VARIANTS,
    check,
    found,
    least_limit,
    make,
    put_in_order,
    sync,
)
from tests.backends.pages import (
    FILLER_PAGES,
    KEY,
    MIB,
    OTHER_KEYS,
    PAGE_SIZE,
    PAGE_SIZES,
    UUID_A,
    half,
    halves,
    noise,
    same,
    text,
)


def test_the_limit_holds_after_a_sync(engine: str) -> None:
    z = make(engine, 4 * MIB)
    pool = z.init_fs(PAGE_SIZE)
    for first in range(0, 12000, 300):
        z.get_pages(pool, KEY, first // 2, 40)
        z.put_pages(pool, KEY, list(enumerate(FILLER_PAGES, first)))
        sync(z)
        # zbud's tables and the index grow after the eviction; the worker evicts for them later.
        assert z.counters()["pool_used"] <= z.pool_limit + SEGMENT
    assert z.counters()["evicted_eph_zpages"] > 5000
    check(z)


def test_a_lower_limit_evicts_at_once(engine: str) -> None:
    z = make(engine, 16 * MIB)
    pool = z.init_fs(PAGE_SIZE)
    put_in_order(z, pool, halves(range(5000)))
    z.put_pages(pool, OTHER_KEYS[0], [(i, noise(i)) for i in range(300)])
    on_loan = z.get_pages(pool, KEY, 4000, 100)
    assert z.counters()["pool_used"] > 8 * MIB
    z.resize(2 * MIB)
    assert z.counters()["pool_used"] <= z.pool_limit == z.counters()["pool_limit"] == 2 * MIB
    check(z)
    survivors = [i for i in found(z, pool, range(5000)) if not 4000 <= i < 4100]
    assert survivors == [i for i in range(survivors[0], 5000) if not 4000 <= i < 4100]
    assert len(survivors) > 500
    assert on_loan[0] == half(4000)


def test_a_much_lower_limit_keeps_the_youngest(engine: str) -> None:
    z = make(engine, 64 * MIB)
    pool = z.init_fs(PAGE_SIZE)
    for file in range(100):
        z.put_pages(pool, FileKey(1, file, b""), list(enumerate(FILLER_PAGES)))
    sync(z)
    z.resize(8 * MIB)
    assert len(found(z, pool, range(300), FileKey(1, 99, b""))) > 250


def test_a_higher_limit_is_used(engine: str) -> None:
    z = make(engine, MIB)
    pool = z.init_fs(PAGE_SIZE)
    z.resize(8 * MIB)
    z.put_pages(pool, KEY, halves(range(2500)))
    sync(z)
    assert found(z, pool, range(2500)) == list(range(2500))


def test_many_small_files_stay_within_the_limit(engine: str) -> None:
    z = make(engine, MIB)
    pool = z.init_fs(PAGE_SIZE)
    for i in range(30000):
        z.put_page(pool, FileKey(1, i, b"a generation"), 0, same(i))
    sync(z)
    counters = z.counters()
    assert counters["pool_used"] <= MIB + SEGMENT
    assert (2000 if engine == "log" else 400) < counters["obj_count"] < 10000
    check(z)


@pytest.mark.parametrize("shared", [False, True])
def test_a_pool_of_another_page_size_gets_memory_in_a_full_zcache(engine: str, shared: bool) -> None:
    z = make(engine, 4 * MIB)
    small = z.init_fs(PAGE_SIZE)
    z.put_pages(small, KEY, halves(range(3000)))
    sync(z)
    large = z.init_shared_fs(UUID_A, 4 * PAGE_SIZE) if shared else z.init_fs(4 * PAGE_SIZE)
    z.put_page(large, KEY, 0, text("x", 4 * PAGE_SIZE))
    sync(z)
    assert z.get_page(large, KEY, 0) == text("x", 4 * PAGE_SIZE)


@pytest.mark.parametrize("engine", ["log", "zbud"])  # the Python engine's tables are dicts
def test_after_a_much_higher_limit_pages_are_still_stored(engine: str) -> None:
    z = make(engine, 128 * MIB)
    pool = z.init_fs(PAGE_SIZE)
    for i in range(50_000):
        z.put_page(pool, FileKey(1, i, b""), 0, FILLER_PAGES[i % 300])
    for key in OTHER_KEYS:
        for first in range(0, 15_000, 300):
            z.put_pages(pool, key, list(enumerate(FILLER_PAGES, first)))
    z.resize(MIB)
    assert z.counters()["pool_used"] <= MIB
    z.put_page(pool, KEY, 0, text("x"))
    sync(z)
    assert z.get_page(pool, KEY, 0) == text("x")


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_pool_at_the_least_limit_keeps_pages_or_is_refused(
    options: dict[str, Any], page_size: int
) -> None:
    z = make("log", least_limit(options), **options)
    pool = z.init_fs(page_size)
    assert pool >= 0 or page_size > PAGE_SIZE
    if pool >= 0:
        for i in range(3):
            z.put_page(pool, KEY, i, text(i, page_size))
            z.sync()
        assert z.get_page(pool, KEY, 2) == text(2, page_size)
    z.check()


@pytest.mark.parametrize(("method", "level"), [("lz4", 1), ("zstd", 19)])
def test_a_low_limit_works_after_large_pages(method: str, level: int) -> None:
    z = make("log", 64 * MIB, method=method, level=level)
    large = z.init_fs(MIB)
    for i in range(4):
        z.put_page(large, KEY, i, text(i, MIB))
    z.sync()
    z.flush_fs(large)
    least = least_limit({"method": method})
    z.resize(least)
    assert z.counters()["pool_used"] <= least
    assert z.init_fs(PAGE_SIZE) >= 0


def test_raw_pages_of_one_size_do_not_displace_compressed_ones_of_another() -> None:
    z = make("log", 8 * MIB)
    small, large = z.init_fs(PAGE_SIZE), z.init_fs(16 * PAGE_SIZE)
    z.put_page(large, KEY, 0, noise(0, 16 * PAGE_SIZE))
    put_in_order(z, small, halves(range(5000)))
    before = z.counters()
    for i in range(50):
        z.put_page(large, OTHER_KEYS[0], i, noise(i, 16 * PAGE_SIZE))
        z.sync()
    assert z.counters()["evicted_eph_zpages"] == before["evicted_eph_zpages"]
