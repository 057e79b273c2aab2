"""Counters have the same names in every engine."""

import pytest

from cleanfs.backends.ops import Backend
from cleanfs.backends.options import BackendOptions
from cleanfs.backends.reference import ReferenceZcache
from tests.backends.engines import SEGMENT, check, make, sync
from tests.backends.pages import KEY, MIB, OTHER_KEYS, PAGE_SIZE, halves, noise, same, text

GAUGES = {
    "pool_limit",
    "pool_used",
    "obj_count",
    "eph_zpages",
    "eph_zbytes",
    "eph_pagebytes",
    "metadata_bytes",
    "staged_pages",
    "raw_pages",
    "same_filled_pages",
    "zero_filled_pages",
    "loaned_zpages",
    "dictionary_bytes",
    "ghosts",
}


MONOTONIC = {
    "obj_count_max",
    "eph_zpages_max",
    "evicted_eph_zpages",
    "evicted_raw_pages",
    "compress_poor",
    "failed_eph_puts",
    "staging_full",
    "eph_nonactive_puts_ignored",
    "revived_zpages",
    "corrupt_zpages",
    "flush_total",
    "flush_found",
    "flobj_total",
    "flobj_found",
}


@pytest.mark.parametrize("engine", ["log", "zbud"])
def test_native_counters_include_those_of_the_python_engine(engine: str) -> None:
    z = make(engine, MIB)
    assert set(z.counters()) == GAUGES | MONOTONIC
    assert set(ReferenceZcache(BackendOptions(MIB)).counters()) <= GAUGES | MONOTONIC
    z.init_fs(PAGE_SIZE)
    own = set(z.counters()) - GAUGES - MONOTONIC
    assert all(name.startswith("zbud_eph_" if engine == "zbud" else "log_") for name in own)
    assert len(own) >= 6
    assert all(type(value) is int and value >= 0 for value in z.counters().values())


def test_gauges_count_the_stored_pages() -> None:
    z = make("log", 16 * MIB)  # six pages do not wake the worker
    pool = z.init_fs(PAGE_SIZE)
    pages = [text("x"), noise(1), bytes(PAGE_SIZE), same(1), text("y")]
    z.put_pages(pool, KEY, list(enumerate(pages)))
    z.put_page(pool, OTHER_KEYS[0], 0, text("z"))
    c = z.counters()
    assert (c["eph_zpages"], c["staged_pages"], c["obj_count"]) == (6, 6, 2)
    assert (c["eph_zbytes"], c["eph_pagebytes"]) == (0, 0)
    z.sync()
    c = z.counters()
    assert (c["eph_zpages"], c["staged_pages"], c["obj_count"]) == (6, 0, 2)
    assert (c["raw_pages"], c["same_filled_pages"], c["zero_filled_pages"]) == (1, 2, 1)
    assert c["eph_pagebytes"] == 6 * PAGE_SIZE
    assert PAGE_SIZE < c["eph_zbytes"] < PAGE_SIZE + 3 * 200
    z.get_pages(pool, KEY, 0, 2)
    z.flush_page(pool, KEY, 2)
    c = z.counters()
    assert (c["eph_zpages"], c["loaned_zpages"], c["zero_filled_pages"]) == (3, 2, 0)
    assert c["eph_pagebytes"] == 5 * PAGE_SIZE


def test_flush_counters_count_the_pages_found(z: Backend, pool: int) -> None:
    z.put_pages(pool, KEY, [(i, same(i)) for i in range(10)])
    z.flush_page(pool, KEY, 0)
    z.flush_page(pool, KEY, 0)
    z.flush_pages(pool, KEY, 5, None)
    z.flush_page(pool, OTHER_KEYS[0], 0)
    z.flush_inode(pool, KEY)
    z.flush_inode(pool, KEY)
    c = z.counters()
    assert (c["flush_total"], c["flush_found"]) == (4, 6)
    assert (c["flobj_total"], c["flobj_found"]) == (2, 1)


def test_counters_are_a_snapshot(z: Backend, pool: int) -> None:
    before = z.counters()
    z.put_page(pool, KEY, 0, text("x"))
    assert before["eph_zpages"] == 0


def test_maxima_stay_and_memory_is_released(engine: str) -> None:
    z = make(engine, 8 * MIB)
    used = z.counters()["pool_used"]
    pool = z.init_fs(PAGE_SIZE)
    z.put_pages(pool, KEY, halves(range(1000)))
    z.put_page(pool, OTHER_KEYS[0], 0, text("x"))
    sync(z)
    z.flush_fs(pool)
    c = z.counters()
    assert (c["obj_count"], c["obj_count_max"], c["eph_zpages"], c["eph_zpages_max"]) == (0, 2, 0, 1001)
    assert c["eph_zbytes"] == c["eph_pagebytes"] == 0
    assert c["pool_used"] < used + z.pool_limit // 16 + SEGMENT  # some memory is kept for reuse
    check(z)
