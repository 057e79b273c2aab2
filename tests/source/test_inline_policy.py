"""When a call is worth a thread, on a clock of our own."""

import pytest

from cleanfs.source.inline_policy import (
    FAST_SECONDS,
    FIRST_HOLD_SECONDS,
    LONGEST_HOLD_SECONDS,
    RECENT_SECONDS,
    SECONDS_PER_BYTE,
    SHARE,
    STREAK,
    InlinePolicy,
    NowaitProbe,
)

FAST = FAST_SECONDS / 2
SLOW = 1e-2


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> InlinePolicy:
    return InlinePolicy(clock)


def fast_calls(pace: InlinePolicy, number: int = STREAK) -> None:
    for _ in range(number):
        pace.took(FAST, 4096)


def test_nothing_is_inline_before_a_streak_of_fast_calls(pace: InlinePolicy) -> None:
    fast_calls(pace, STREAK - 1)
    assert not pace.inline
    fast_calls(pace, 1)
    assert pace.inline


def test_a_call_of_several_steps_may_take_the_time_of_several(clock: Clock) -> None:
    pace, patient = InlinePolicy(clock), InlinePolicy(clock, steps=4)
    for _ in range(STREAK):
        for each in (pace, patient):
            each.took(3 * FAST_SECONDS, 0)
    assert (pace.inline, patient.inline) == (False, True)


def test_what_was_fast_some_time_ago_may_wait_now(pace: InlinePolicy, clock: Clock) -> None:
    assert not pace.recent
    fast_calls(pace)
    clock.now += RECENT_SECONDS * 0.9
    assert pace.recent
    pace.returned()
    clock.now += RECENT_SECONDS * 0.9
    assert pace.recent
    clock.now += RECENT_SECONDS * 0.2
    assert not pace.recent
    assert pace.inline


def test_slow_calls_keep_a_source_in_threads(pace: InlinePolicy) -> None:
    for _ in range(100):
        fast_calls(pace, 2)
        pace.took(SLOW, 4096)
    assert not pace.inline


def test_a_few_slow_calls_among_many_fast_ones_do_not(pace: InlinePolicy) -> None:
    for _ in range(10):
        fast_calls(pace, 3)
        if pace.inline:
            break
        pace.took(SLOW, 4096)
    assert pace.inline


def test_large_calls_may_take_the_time_of_a_copy(pace: InlinePolicy) -> None:
    size = 1 << 20
    for _ in range(STREAK):
        pace.took(FAST_SECONDS + size * SECONDS_PER_BYTE * 1.01, size)
    assert not pace.inline
    for _ in range(STREAK):
        pace.took(FAST_SECONDS + size * SECONDS_PER_BYTE * 0.99, size)
    assert pace.inline


def test_a_wait_sends_calls_to_threads_until_the_hold_is_over(pace: InlinePolicy, clock: Clock) -> None:
    fast_calls(pace)
    pace.waited(FIRST_HOLD_SECONDS / SHARE / 2)
    assert not pace.inline
    clock.now += FIRST_HOLD_SECONDS * 0.99
    fast_calls(pace, 10 * STREAK)
    assert not pace.inline
    clock.now += FIRST_HOLD_SECONDS * 0.02
    fast_calls(pace, 1)  # the streak was there, only the time was not
    assert pace.inline


def test_waits_that_follow_soon_hold_for_longer_up_to_a_minute(
    pace: InlinePolicy, clock: Clock
) -> None:
    holds = []
    for _ in range(15):
        fast_calls(pace)
        pace.waited(1e-6)
        start = clock.now
        while not pace.inline:
            clock.now += 0.01
            fast_calls(pace)
        holds.append(clock.now - start)
    assert holds[:4] == pytest.approx([0.1, 0.2, 0.4, 0.8], abs=0.02)
    assert max(holds) == pytest.approx(LONGEST_HOLD_SECONDS, abs=0.02) == holds[-1]


def test_after_a_calm_time_the_hold_is_short_again(pace: InlinePolicy, clock: Clock) -> None:
    for _ in range(5):
        pace.waited(1e-6)
    clock.now += 2 * LONGEST_HOLD_SECONDS
    pace.waited(1e-6)
    clock.now += FIRST_HOLD_SECONDS * 1.01
    fast_calls(pace)
    assert pace.inline


@pytest.mark.parametrize("wait", [0.002, 0.2, 5.0])
def test_waits_take_a_bounded_share_of_the_main_thread(
    pace: InlinePolicy, clock: Clock, wait: float
) -> None:
    """Whatever the source does: here every inline call waits, and every one in a thread is fast."""
    start, lost = clock.now, 0.0
    while clock.now - start < 300:
        if pace.inline:
            clock.now += wait
            lost += wait
            pace.waited(wait)
        else:
            clock.now += 5e-3 * max(1, wait)
            pace.took(FAST, 4096)
    assert lost <= (clock.now - start) / SHARE + wait


def test_every_call_asks_until_it_was_refused_often() -> None:
    asking = NowaitProbe()
    for _ in range(NowaitProbe.PATIENCE):
        assert asking.worthwhile()
        asking.tried(False)
    asked = 0
    for _ in range(80):
        if asking.worthwhile():
            asked += 1
            asking.tried(False)
    assert asked == 80 // NowaitProbe.STEP


def test_one_success_and_every_call_asks_again() -> None:
    asking = NowaitProbe()
    for _ in range(100):
        if asking.worthwhile():
            asking.tried(False)
    while not asking.worthwhile():
        pass
    asking.tried(True)
    for _ in range(NowaitProbe.PATIENCE):
        assert asking.worthwhile()
        asking.tried(False)
