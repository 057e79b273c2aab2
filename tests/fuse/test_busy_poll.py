"""Test the window of busy polling."""

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleanfs.fuse.session import native

pytestmark = pytest.mark.skipif(native is None, reason="the native module was not built")

LIMIT_NS = 50_000

Window: Any = None
if native is not None and not TYPE_CHECKING:
    Window = native.Window


def test_short_waits_open_the_window_step_by_step() -> None:
    window, start = Window(LIMIT_NS), Window.GROW_START_NS
    seen = [window.ns]
    for _ in range(4):
        window.waited(1_000)
        seen.append(window.ns)
    assert seen == [0, start, 2 * start, 4 * start, LIMIT_NS]


def test_one_long_wait_closes_the_window() -> None:
    window = Window(LIMIT_NS)
    window.waited(1_000)
    window.waited(LIMIT_NS + Window.WAKE_NS + 1)
    assert window.ns == 0


def test_a_wait_longer_than_the_widest_window_closes_it() -> None:
    window = Window(LIMIT_NS)
    window.open()
    window.waited(LIMIT_NS + 1)
    assert window.ns == 0


@given(st.integers(0, 10**6), st.lists(st.integers(0, 10**9), max_size=50))
def test_the_window_stays_within_its_limits(limit: int, waits: list[int]) -> None:
    window = Window(limit)
    for ns in waits:
        window.waited(ns)
        assert 0 <= window.ns <= limit
        if ns > limit + Window.WAKE_NS:
            assert window.ns == 0


def test_without_a_limit_the_window_stays_closed() -> None:
    window = Window(0)
    for wait_ns in (0, 1, 10_000, 10_000, 10**9):
        window.waited(wait_ns)
        assert not window.ns
