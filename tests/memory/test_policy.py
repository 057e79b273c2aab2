"""Test the policy that decides how much memory the caches may use."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cleanfs.memory.policy import (
    GROW_AFTER_SECONDS,
    GROW_EVERY_SECONDS,
    LATEST_SECONDS,
    LATEST_SHORT_SECONDS,
    MIB,
    MIN_STEP,
    SOONEST_SECONDS,
    Headroom,
    Policy,
    Sizes,
    split,
    tightest,
)

LIMIT = 256 * MIB
RESERVE = Headroom("group", LIMIT, 0).reserve
CONFIGURED = 512 * MIB
FLOOR = 5 * MIB
SLACK = RESERVE // 4


def headroom(spare: int) -> Headroom:
    """Make a headroom with the given spare memory."""
    return Headroom("group", LIMIT, spare + RESERVE)


def update(policy: Policy, now: float, spare: int, used: int, configured: int = CONFIGURED) -> int:
    return policy.update(now, headroom(spare), used, configured, FLOOR)


def test_every_limit_has_a_reserve() -> None:
    assert Headroom("", 64 * MIB, 0).reserve == 8 * MIB
    assert Headroom("", 1024 * MIB, 0).reserve == 32 * MIB
    assert Headroom("", 64 << 30, 0).reserve == 256 * MIB
    assert Headroom("", 64 * MIB, 10 * MIB).spare == 2 * MIB


def test_the_tightest_headroom_has_the_least_spare_memory() -> None:
    near, far = Headroom("near", 64 * MIB, 10 * MIB), Headroom("far", 64 << 30, 100 * MIB)
    assert tightest([near, far]) is far
    assert tightest([near]) is near
    assert tightest([]) is None


def test_with_enough_memory_the_caches_get_their_limits() -> None:
    policy = Policy()
    assert update(policy, 0, CONFIGURED, 0) == CONFIGURED
    assert policy.update(1, None, 0, CONFIGURED, FLOOR) == CONFIGURED
    assert not policy.short
    assert policy.grows == policy.shrinks == 0


def test_the_caches_never_get_more_than_the_spare_memory() -> None:
    policy = Policy()
    assert update(policy, 0, 100 * MIB, 20 * MIB) == 120 * MIB
    assert policy.short
    assert policy.shrinks == 0, "nothing had to be freed"


def test_a_shortage_is_freed_at_once_with_some_slack() -> None:
    policy = Policy()
    update(policy, 0, CONFIGURED, 100 * MIB)
    assert update(policy, 0.01, -20 * MIB, 100 * MIB) == 80 * MIB - SLACK
    assert policy.shrinks == 1


def test_the_allowance_has_a_floor() -> None:
    policy = Policy()
    for now in range(5):
        assert update(policy, now, -LIMIT, 100 * MIB) == FLOOR
    assert policy.shrinks == 1, "at the floor there is nothing to free"
    assert policy.update(9, headroom(-LIMIT), 0, 2 * MIB, FLOOR) == 2 * MIB


def test_the_allowance_grows_back_in_steps_once_memory_is_not_short() -> None:
    policy = Policy()
    step = CONFIGURED // 16
    short = update(policy, 0, -MIB, 100 * MIB)
    assert update(policy, GROW_AFTER_SECONDS - 0.1, CONFIGURED, short) == short
    assert update(policy, GROW_AFTER_SECONDS, CONFIGURED, short) == short + step
    assert (
        update(policy, GROW_AFTER_SECONDS + GROW_EVERY_SECONDS / 2, CONFIGURED, short) == short + step
    )
    now, allowance = GROW_AFTER_SECONDS, short + step
    while allowance < CONFIGURED:
        now += GROW_EVERY_SECONDS
        allowance = update(policy, now, CONFIGURED, allowance)
    assert not policy.short
    assert policy.grows == -(-(CONFIGURED - short) // step)


def test_the_allowance_grows_only_if_a_whole_step_fits() -> None:
    policy = Policy()
    step = CONFIGURED // 16
    short = update(policy, 0, 0, 100 * MIB)
    assert update(policy, 100, step - 1, short) == short
    assert update(policy, 100, step, short) == short + step


def test_demand_oscillating_by_less_than_a_step_does_not_change_the_allowance() -> None:
    policy = Policy()
    used = 100 * MIB
    allowances = [update(policy, now, (now % 2) * (CONFIGURED // 16 - MIB), used) for now in range(100)]
    assert len(set(allowances)) == 1
    assert policy.grows == policy.shrinks == 0


def test_the_configured_limit_is_always_the_ceiling() -> None:
    policy = Policy()
    update(policy, 0, -MIB, 100 * MIB)
    assert policy.allowance(50 * MIB) == 50 * MIB
    assert update(policy, 1, 0, 50 * MIB, configured=50 * MIB) == 50 * MIB
    assert not policy.short


@pytest.mark.parametrize(
    ("spare", "seconds"),
    [(-LIMIT, SOONEST_SECONDS), (0, SOONEST_SECONDS), (128 * MIB, 0.5), (1 << 40, LATEST_SECONDS)],
)
def test_less_spare_memory_means_an_earlier_measurement(spare: int, seconds: float) -> None:
    assert Policy().next_update_after(headroom(spare)) == seconds


def test_while_memory_is_withheld_the_next_measurement_is_early() -> None:
    policy = Policy()
    update(policy, 0, -MIB, 100 * MIB)
    assert policy.next_update_after(headroom(1 << 40)) == LATEST_SHORT_SECONDS
    assert policy.next_update_after(None) == LATEST_SHORT_SECONDS


sizes = st.integers(0, 2048 * MIB)


@settings(deadline=None)
@given(allowance=sizes, pool=sizes, page_cache=sizes, floor_pool=sizes, floor_page_cache=sizes)
def test_a_split_adds_up_to_the_allowance(
    allowance: int, pool: int, page_cache: int, floor_pool: int, floor_page_cache: int
) -> None:
    configured = Sizes(pool, page_cache)
    floor = Sizes(min(floor_pool, pool), min(floor_page_cache, page_cache))
    share = split(allowance, configured, floor)
    assert floor.pool <= share.pool <= pool
    assert floor.page_cache <= share.page_cache <= page_cache
    assert share.total == min(max(allowance, floor.total), configured.total)
    assert share.page_cache == page_cache or share.pool == floor.pool, "the pool shrinks first"


looks = st.lists(
    st.tuples(
        st.floats(0, 10),
        st.none() | st.integers(-600 * MIB, 600 * MIB),
        st.integers(0, 600 * MIB),
        st.integers(1, 600 * MIB),
    )
)


@settings(deadline=None)
@given(looks)
def test_the_allowance_is_always_within_its_bounds(
    seen: list[tuple[float, int | None, int, int]],
) -> None:
    policy = Policy()
    now, before = 0.0, None
    for seconds, spare, used, configured in seen:
        now += seconds
        left = None if spare is None else headroom(spare)
        last = before if before is None else policy.allowance(configured)
        grown, shrunk = policy.grows, policy.shrinks
        before = policy.update(now, left, used, configured, FLOOR)
        floor = min(FLOOR, configured)
        assert floor <= before <= configured
        assert before == policy.allowance(configured)
        if spare is not None:
            assert before <= max(used + spare, floor)
        if last is not None and before > max(last, floor):
            assert policy.grows == grown + 1
            assert before - max(last, floor) <= max(configured // 16, MIN_STEP)
        assert policy.shrinks >= shrunk


@settings(deadline=None)
@given(st.lists(st.integers(0, 400 * MIB), max_size=40))
def test_the_caches_never_fill_the_machine(steps: list[int]) -> None:
    """Other processes allocate and free at random; the caches grow as fast as allowed."""
    policy = Policy()
    total, configured, used, now = 512 * MIB, 1024 * MIB, 0, 0.0
    for others in steps:
        now += 0.1
        available = total - others - used
        allowance = policy.update(now, Headroom("", total, available), used, configured, FLOOR)
        used = allowance  # shrunk or filled up to it before the next measurement
        left = total - others - used
        assert left >= Headroom("", total, 0).reserve or allowance == FLOOR
    # Once the other processes have ended, the caches get all memory but one step.
    for _ in range(60):
        now += 1
        allowance = policy.update(now, Headroom("", total, total - used), used, configured, FLOOR)
        used = allowance
    assert used > total - Headroom("", total, 0).reserve - configured // 16
