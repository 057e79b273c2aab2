"""The log allocator compacts and evicts segments (backends/native/log.hpp)."""

import pytest

from tests.backends.engines import SEGMENT, found, put_in_order
from tests.backends.native import Engine
from tests.backends.pages import KEY, MIB, PAGE_SIZE, PAGE_SIZES, halves, noise, text


@pytest.fixture
def engine() -> str:
    """Select the log allocator."""
    return "log"


def test_compaction_keeps_the_order() -> None:
    z = Engine(4 * MIB)
    pool = z.init_fs(PAGE_SIZE)
    for first in range(0, 4000, 8):
        z.put_pages(pool, KEY, halves(range(first, first + 8)))
        z.sync()
        for i in range(first, first + 8):
            if i % 3:
                z.flush_page(pool, KEY, i)
    put_in_order(z, pool, halves(range(4000, 5200)))
    counters = z.counters()
    assert counters["log_compacted_segments"] > 10
    assert counters["log_compacted_bytes"] > 100_000
    z.check()
    # Survivors of several segments share one, so the order is not exact to the page.
    survivors = found(z, pool, range(5200))
    assert survivors[0] > 500
    assert survivors[-1200:] == list(range(4000, 5200))
    assert len([i for i in survivors if 3000 <= i < 4000]) > 300


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_the_last_page_of_the_longest_file_survives_compaction_and_eviction(page_size: int) -> None:
    z = Engine(16 * MIB)
    pool = z.init_fs(page_size)
    last = (1 << 63) // page_size - 1
    z.put_page(pool, KEY, last, text("last", page_size))
    z.sync()
    z.check()
    assert z.get_page(pool, KEY, last) == text("last", page_size)
    z.put_page(pool, KEY, last, text("last", page_size))
    page = noise(1, page_size)[: page_size // 2].ljust(page_size, b"\0")
    z.sync()
    for i in range(64 * MIB // page_size):
        z.put_page(pool, KEY, i, page)
    z.sync()
    z.check()
    assert z.get_page(pool, KEY, last) is None


def test_counters_show_segments_and_holes(z: Engine, pool: int) -> None:
    put_in_order(z, pool, halves(range(500)))
    c = z.counters()
    assert c["log_segments"] >= c["eph_zbytes"] // SEGMENT
    assert c["log_bytes"] == c["log_segments"] * SEGMENT
    assert c["log_hole_bytes"] < 2 * SEGMENT
    for i in range(0, 500, 2):
        z.flush_page(pool, KEY, i)
    c = z.counters()
    assert c["log_hole_bytes"] > 200 * 1900
    put_in_order(z, pool, halves(range(500, 1500)))
    c = z.counters()
    assert c["log_compacted_segments"] > 0
    assert c["log_evicted_segments"] > 0
