"""Test the window of busy polling."""

from hypothesis import given
from hypothesis import strategies as st

from cleanfs.fuse.busy_poll import GROW_START_NS, WAKE_NS, Window

LIMIT_NS = 50_000


def test_short_waits_open_the_window_step_by_step() -> None:
    window = Window(LIMIT_NS)
    seen = [window.ns]
    for _ in range(4):
        window.waited(1_000)
        seen.append(window.ns)
    assert seen == [0, GROW_START_NS, 2 * GROW_START_NS, 4 * GROW_START_NS, LIMIT_NS]


def test_one_long_wait_closes_the_window() -> None:
    window = Window(LIMIT_NS)
    window.waited(1_000)
    window.waited(LIMIT_NS + WAKE_NS + 1)
    assert window.ns == 0


def test_a_wait_longer_than_the_widest_window_closes_it() -> None:
    window = Window(LIMIT_NS)
    window.ns = LIMIT_NS
    window.waited(LIMIT_NS + 1)
    assert window.ns == 0


@given(st.integers(0, 10**6), st.lists(st.integers(0, 10**9), max_size=50))
def test_the_window_stays_within_its_limits(limit: int, waits: list[int]) -> None:
    window = Window(limit)
    for ns in waits:
        window.waited(ns)
        assert 0 <= window.ns <= limit
        if ns > limit + WAKE_NS:
            assert window.ns == 0


def test_without_a_limit_the_window_stays_closed() -> None:
    window = Window(0)
    for wait_ns in (0, 1, 10_000, 10_000, 10**9):
        window.waited(wait_ns)
        assert not window.ns
