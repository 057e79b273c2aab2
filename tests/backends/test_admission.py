"""With ``was-active``, a full pool admits only pages that were seen before."""

import pytest

from tests.backends.engines import check, found, make, put_in_order, sync
from tests.backends.pages import MIB, OTHER_KEYS, PAGE_SIZE, halves, text


@pytest.fixture(params=["log", "zbud"])
def engine(request: pytest.FixtureRequest) -> str:
    """Return the native engine's name, with either allocator."""
    name: str = request.param
    return name


@pytest.mark.parametrize("was_active", [True, False])
def test_a_scan_does_not_displace_the_hot_set(engine: str, was_active: bool) -> None:
    z = make(engine, 2 * MIB, was_active=was_active)
    pool = z.init_fs(PAGE_SIZE)
    put_in_order(z, pool, halves(range(900)))
    put_in_order(z, pool, halves(range(5000)), OTHER_KEYS[0])
    hot = found(z, pool, range(900))
    assert len(hot) > 600 if was_active else not hot
    ignored = z.counters()["eph_nonactive_puts_ignored"]
    assert ignored > 4000 if was_active else ignored == 0
    check(z)


def test_a_page_put_for_the_second_time_is_admitted(engine: str) -> None:
    z = make(engine, 2 * MIB, was_active=True)
    pool = z.init_fs(PAGE_SIZE)
    put_in_order(z, pool, halves(range(2000)))
    ignored = z.counters()["eph_nonactive_puts_ignored"]
    z.put_page(pool, OTHER_KEYS[0], 5, text("x"))
    assert z.counters()["eph_nonactive_puts_ignored"] == ignored + 1
    assert z.get_page(pool, OTHER_KEYS[0], 5) is None
    z.put_page(pool, OTHER_KEYS[0], 5, text("x"))
    sync(z)
    assert z.get_page(pool, OTHER_KEYS[0], 5) == text("x")
    assert z.counters()["eph_nonactive_puts_ignored"] == ignored + 1
    assert z.counters()["ghosts"] > 0


def test_a_page_that_was_stored_before_is_admitted(engine: str) -> None:
    z = make(engine, 2 * MIB, was_active=True)
    pool = z.init_fs(PAGE_SIZE)
    put_in_order(z, pool, halves(range(2000)))
    here = found(z, pool, range(20))
    assert len(here) == 20
    put_in_order(z, pool, halves(range(5000, 5100)))
    put_in_order(z, pool, halves(range(5000, 5100)))
    ignored = z.counters()["eph_nonactive_puts_ignored"]
    put_in_order(z, pool, halves(range(20)))
    assert z.counters()["eph_nonactive_puts_ignored"] == ignored
    check(z)
