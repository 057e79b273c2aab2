"""Test when a call goes to a thread, on a simulated clock."""

import pytest

from cleanfs.cache.state import NowaitState
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
    """Simulates a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def policy(clock: Clock) -> InlinePolicy:
    return InlinePolicy(clock)


def fast_calls(policy: InlinePolicy, number: int = STREAK) -> None:
    for _ in range(number):
        policy.took(FAST, 4096)


def test_no_call_is_inline_before_a_streak_of_fast_calls(policy: InlinePolicy) -> None:
    fast_calls(policy, STREAK - 1)
    assert not policy.inline
    fast_calls(policy, 1)
    assert policy.inline


def test_a_call_of_several_steps_may_take_the_time_of_several(clock: Clock) -> None:
    policy, four_steps = InlinePolicy(clock), InlinePolicy(clock, steps=4)
    for _ in range(STREAK):
        for each in (policy, four_steps):
            each.took(3 * FAST_SECONDS, 0)
    assert (policy.inline, four_steps.inline) == (False, True)


def test_a_source_that_was_fast_some_time_ago_is_not_recent(policy: InlinePolicy, clock: Clock) -> None:
    assert not policy.recent
    fast_calls(policy)
    clock.now += RECENT_SECONDS * 0.9
    assert policy.recent
    policy.returned()
    clock.now += RECENT_SECONDS * 0.9
    assert policy.recent
    clock.now += RECENT_SECONDS * 0.2
    assert not policy.recent
    assert policy.inline


def test_slow_calls_keep_a_source_in_threads(policy: InlinePolicy) -> None:
    for _ in range(100):
        fast_calls(policy, 2)
        policy.took(SLOW, 4096)
    assert not policy.inline


def test_a_few_slow_calls_among_many_fast_ones_do_not_keep_it_in_threads(policy: InlinePolicy) -> None:
    for _ in range(10):
        fast_calls(policy, 3)
        if policy.inline:
            break
        policy.took(SLOW, 4096)
    assert policy.inline


def test_large_calls_may_take_the_time_of_a_copy(policy: InlinePolicy) -> None:
    size = 1 << 20
    for _ in range(STREAK):
        policy.took(FAST_SECONDS + size * SECONDS_PER_BYTE * 1.01, size)
    assert not policy.inline
    for _ in range(STREAK):
        policy.took(FAST_SECONDS + size * SECONDS_PER_BYTE * 0.99, size)
    assert policy.inline


def test_a_wait_sends_calls_to_threads_until_the_hold_is_over(
    policy: InlinePolicy, clock: Clock
) -> None:
    fast_calls(policy)
    policy.waited(FIRST_HOLD_SECONDS / SHARE / 2)
    assert not policy.inline
    clock.now += FIRST_HOLD_SECONDS * 0.99
    fast_calls(policy, 10 * STREAK)
    assert not policy.inline
    clock.now += FIRST_HOLD_SECONDS * 0.02
    fast_calls(policy, 1)  # the streak was long enough; the hold had not ended
    assert policy.inline


def test_repeated_waits_hold_for_longer_up_to_a_minute(policy: InlinePolicy, clock: Clock) -> None:
    holds = []
    for _ in range(15):
        fast_calls(policy)
        policy.waited(1e-6)
        start = clock.now
        while not policy.inline:
            clock.now += 0.01
            fast_calls(policy)
        holds.append(clock.now - start)
    assert holds[:4] == pytest.approx([0.1, 0.2, 0.4, 0.8], abs=0.02)
    assert max(holds) == pytest.approx(LONGEST_HOLD_SECONDS, abs=0.02) == holds[-1]


def test_after_a_time_without_waits_the_hold_is_short_again(policy: InlinePolicy, clock: Clock) -> None:
    for _ in range(5):
        policy.waited(1e-6)
    clock.now += 2 * LONGEST_HOLD_SECONDS
    policy.waited(1e-6)
    clock.now += FIRST_HOLD_SECONDS * 1.01
    fast_calls(policy)
    assert policy.inline


@pytest.mark.parametrize("wait", [0.002, 0.2, 5.0])
def test_waits_take_a_bounded_share_of_the_main_thread(
    policy: InlinePolicy, clock: Clock, wait: float
) -> None:
    """In this worst case, every inline call waits, and every call in a thread is fast."""
    start, lost = clock.now, 0.0
    while clock.now - start < 300:
        if policy.inline:
            clock.now += wait
            lost += wait
            policy.waited(wait)
        else:
            clock.now += 5e-3 * max(1, wait)
            policy.took(FAST, 4096)
    assert lost <= (clock.now - start) / SHARE + wait


def test_a_wait_in_the_channel_is_heard_of_before_a_fast_call_counts(
    policy: InlinePolicy, clock: Clock
) -> None:
    """The channel has gone back to threads by itself; what it met must still hold further calls off."""
    policy.inline, policy.waited_seconds = False, 10.0
    for _ in range(2 * STREAK):
        policy.took(FAST, 4096)
    assert not policy.inline
    clock.now += SHARE * 10 + 1
    for _ in range(STREAK):
        policy.took(FAST, 4096)
    assert policy.inline


def test_every_call_tries_nowait_until_it_was_refused_often() -> None:
    probe = NowaitProbe(NowaitState())
    for _ in range(NowaitProbe.MAX_REFUSALS):
        assert probe.worthwhile()
        probe.tried(False)
    tries = 0
    for _ in range(80):
        if probe.worthwhile():
            tries += 1
            probe.tried(False)
    assert tries == 80 // NowaitProbe.STEP


def test_after_one_success_every_call_tries_nowait_again() -> None:
    probe = NowaitProbe(NowaitState())
    for _ in range(100):
        if probe.worthwhile():
            probe.tried(False)
    while not probe.worthwhile():
        pass
    probe.tried(True)
    for _ in range(NowaitProbe.MAX_REFUSALS):
        assert probe.worthwhile()
        probe.tried(False)
