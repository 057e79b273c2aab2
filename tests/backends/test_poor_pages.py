"""Pages that compress poorly are kept raw while memory is left (docs/poor-pages.md)."""

import pytest

from cleanfs.backends.ops import Backend
from tests.backends.engines import found, make, put_in_order, sync
from tests.backends.pages import KEY, MIB, OTHER_KEYS, PAGE_SIZE, half, halves, noise


@pytest.fixture(params=["python", "log"])
def engine(request: pytest.FixtureRequest) -> str:
    """Select the engines that keep poor pages; zbud cannot store them."""
    name: str = request.param
    return name


def test_a_poor_page_is_kept_raw_while_memory_is_left(z: Backend, pool: int) -> None:
    z.put_page(pool, KEY, 0, noise(1))
    sync(z)
    assert z.counters()["raw_pages"] == z.counters()["compress_poor"] == 1
    assert z.get_page(pool, KEY, 0) == noise(1)


def test_raw_pages_are_evicted_before_older_compressed_ones(z: Backend, pool: int) -> None:
    put_in_order(z, pool, halves(range(100)))
    put_in_order(z, pool, [(i, noise(i)) for i in range(1000)], OTHER_KEYS[0])
    counters = z.counters()
    assert counters["compress_poor"] == 1000
    assert counters["evicted_raw_pages"] + counters["raw_pages"] == 1000
    assert counters["raw_pages"] > 200
    assert counters["evicted_eph_zpages"] == 0
    put_in_order(z, pool, halves(range(100, 700)))
    assert z.counters()["evicted_eph_zpages"] == 0
    assert z.counters()["evicted_raw_pages"] > counters["evicted_raw_pages"]
    assert found(z, pool, range(700)) == list(range(700))
    raw = found(z, pool, range(1000), OTHER_KEYS[0])
    assert raw == list(range(raw[0], 1000))


def test_a_poor_page_never_displaces_a_compressed_one(z: Backend, pool: int) -> None:
    put_in_order(z, pool, halves(range(1500)))
    before = z.counters()
    put_in_order(z, pool, [(i, noise(i)) for i in range(200)], OTHER_KEYS[0])
    after = z.counters()
    assert after["evicted_eph_zpages"] == before["evicted_eph_zpages"] > 0
    assert after["failed_eph_puts"] >= 170
    assert after["raw_pages"] == 200 - after["failed_eph_puts"]


@pytest.mark.parametrize(("random_bytes", "raw"), [(3400, 0), (3800, 1)])
def test_a_page_is_poor_above_seven_eighths(z: Backend, pool: int, random_bytes: int, raw: int) -> None:
    z.put_page(pool, KEY, 0, noise(1)[:random_bytes].ljust(PAGE_SIZE, b"\0"))
    sync(z)
    assert z.counters()["raw_pages"] == raw


def test_poor_pages_are_refused_on_request() -> None:
    z = make("log", MIB, keep_poor=False)
    pool = z.init_fs(PAGE_SIZE)
    z.put_pages(pool, KEY, [(0, noise(0)), (1, half(1))])
    z.sync()
    assert z.get_pages(pool, KEY, 0, 2) == [None, half(1)]
    assert z.counters()["compress_poor"] == 1
    assert z.counters()["raw_pages"] == 0
