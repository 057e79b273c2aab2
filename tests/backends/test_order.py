"""Every engine evicts in LRU order: the page put or used the longest time ago goes first."""

import pytest

from tests.backends.engines import found, make, put_in_order
from tests.backends.pages import KEY, MIB, PAGE_SIZE, UUID_A, half, halves


def test_the_oldest_put_goes_first(engine: str) -> None:
    z = make(engine, 2 * MIB)
    pool = z.init_fs(PAGE_SIZE)
    put_in_order(z, pool, halves(range(2000)))
    counters = z.counters()
    assert counters["evicted_eph_zpages"] + counters["eph_zpages"] == 2000
    survivors = found(z, pool, range(2000))
    assert survivors == list(range(survivors[0], 2000))
    assert len(survivors) > 800  # some 950 fit


def test_a_page_that_was_put_again_is_young(engine: str) -> None:
    z = make(engine, 2 * MIB)
    pool = z.init_fs(PAGE_SIZE)
    put_in_order(z, pool, halves(range(500)))
    put_in_order(z, pool, [(i, half(7000 + i)) for i in range(50)])
    put_in_order(z, pool, halves(range(500, 1250)))
    survivors = found(z, pool, range(1250))
    assert survivors[:50] == list(range(50))
    assert survivors[50:] == list(range(survivors[50], 1250))
    assert survivors[50] > 100


@pytest.mark.parametrize("form", ["list", "into", "revived"])
def test_a_page_that_was_used_is_young(engine: str, form: str) -> None:
    z = make(engine, 2 * MIB)
    pool = z.init_fs(PAGE_SIZE) if form == "revived" else z.init_shared_fs(UUID_A, PAGE_SIZE)
    put_in_order(z, pool, halves(range(500)))
    for i in range(0, 500, 25):
        if form == "into":
            found(z, pool, range(i, i + 1))
        else:
            page = z.get_page(pool, KEY, i)
            assert page is not None
            if form == "revived":
                z.put_page(pool, KEY, i, page)
    put_in_order(z, pool, halves(range(500, 1250)))
    survivors = found(z, pool, range(500))
    used = set(range(0, 500, 25))
    # zbud also spares the buddy.
    assert used <= set(survivors) <= used | {i ^ 1 for i in used} | set(range(300, 500))


def test_one_order_spans_all_pools_of_a_page_size(engine: str) -> None:
    z = make(engine, 2 * MIB)
    pool, other = z.init_fs(PAGE_SIZE), z.init_fs(PAGE_SIZE)
    put_in_order(z, pool, halves(range(100)))
    put_in_order(z, other, halves(range(1500)))
    assert found(z, pool, range(100)) == []
