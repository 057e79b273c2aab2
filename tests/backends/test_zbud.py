"""The zbud allocator pairs pages (backends/native/zbud.hpp)."""

from tests.backends.engines import make, put_in_order
from tests.backends.pages import KEY, MIB, PAGE_SIZE, halves


def test_counters_distinguish_pairs_from_single_pages() -> None:
    z = make("zbud", 8 * MIB)
    pool = z.init_fs(PAGE_SIZE)
    put_in_order(z, pool, halves(range(101)))
    c = z.counters()
    assert (c["zbud_eph_pageframes"], c["zbud_eph_zpages"]) == (51, 101)
    assert (c["zbud_eph_unbuddied_count"], c["zbud_eph_buddied_count"]) == (1, 50)
    assert c["zbud_eph_zbytes"] == c["eph_zbytes"]
    z.flush_pages(pool, KEY, 0, 20)
    assert z.counters()["zbud_eph_pageframes"] == 41
    z.flush_page(pool, KEY, 20)
    c = z.counters()
    assert (c["zbud_eph_unbuddied_count"], c["zbud_eph_buddied_count"]) == (2, 39)
    assert c["zbud_eph_evicted_pageframes"] == 0
    put_in_order(z, pool, halves(range(5000)))
    c = z.counters()
    assert 0 < c["evicted_eph_zpages"] <= 2 * c["zbud_eph_evicted_pageframes"]
