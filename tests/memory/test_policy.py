"""The policy: what the caches may have while memory is short."""

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
PROMISED = 512 * MIB
FLOOR = 5 * MIB
SLACK = RESERVE // 4


def room(spare: int) -> Headroom:
    """A place with so much room for the caches."""
    return Headroom("group", LIMIT, spare + RESERVE)


def look(policy: Policy, now: float, spare: int, used: int, promised: int = PROMISED) -> int:
    return policy.look(now, room(spare), used, promised, FLOOR)


def test_a_part_of_every_limit_is_not_for_the_caches() -> None:
    assert Headroom("", 64 * MIB, 0).reserve == 8 * MIB
    assert Headroom("", 1024 * MIB, 0).reserve == 32 * MIB
    assert Headroom("", 64 << 30, 0).reserve == 256 * MIB
    assert Headroom("", 64 * MIB, 10 * MIB).spare == 2 * MIB


def test_what_has_least_room_decides() -> None:
    near, far = Headroom("near", 64 * MIB, 10 * MIB), Headroom("far", 64 << 30, 100 * MIB)
    assert tightest([near, far]) is far
    assert tightest([near]) is near
    assert tightest([]) is None


def test_with_room_for_all_the_caches_get_all() -> None:
    policy = Policy()
    assert look(policy, 0, PROMISED, 0) == PROMISED
    assert policy.look(1, None, 0, PROMISED, FLOOR) == PROMISED
    assert not policy.short
    assert policy.grows == policy.shrinks == 0


def test_the_caches_never_get_more_than_there_is() -> None:
    policy = Policy()
    assert look(policy, 0, 100 * MIB, 20 * MIB) == 120 * MIB
    assert policy.short
    assert policy.shrinks == 0, "nobody gave up anything"


def test_what_was_taken_from_us_is_given_up_at_once_and_a_little_more() -> None:
    policy = Policy()
    look(policy, 0, PROMISED, 100 * MIB)
    assert look(policy, 0.01, -20 * MIB, 100 * MIB) == 80 * MIB - SLACK
    assert policy.shrinks == 1


def test_there_is_a_floor() -> None:
    policy = Policy()
    for now in range(5):
        assert look(policy, now, -LIMIT, 100 * MIB) == FLOOR
    assert policy.shrinks == 1, "what is at the floor has nothing to give up"
    assert policy.look(9, room(-LIMIT), 0, 2 * MIB, FLOOR) == 2 * MIB


def test_it_grows_back_in_steps_after_quiet() -> None:
    policy = Policy()
    step = PROMISED // 16
    short = look(policy, 0, -MIB, 100 * MIB)
    assert look(policy, GROW_AFTER_SECONDS - 0.1, PROMISED, short) == short
    assert look(policy, GROW_AFTER_SECONDS, PROMISED, short) == short + step
    assert look(policy, GROW_AFTER_SECONDS + GROW_EVERY_SECONDS / 2, PROMISED, short) == short + step
    now, allowance = GROW_AFTER_SECONDS, short + step
    while allowance < PROMISED:
        now += GROW_EVERY_SECONDS
        allowance = look(policy, now, PROMISED, allowance)
    assert not policy.short
    assert policy.grows == -(-(PROMISED - short) // step)


def test_it_grows_only_into_room_for_a_whole_step() -> None:
    policy = Policy()
    step = PROMISED // 16
    short = look(policy, 0, 0, 100 * MIB)
    assert look(policy, 100, step - 1, short) == short
    assert look(policy, 100, step, short) == short + step


def test_what_goes_up_and_down_by_less_than_a_step_does_not_move_it_up_and_down() -> None:
    policy = Policy()
    used = 100 * MIB
    allowances = [look(policy, now, (now % 2) * (PROMISED // 16 - MIB), used) for now in range(100)]
    assert len(set(allowances)) == 1
    assert policy.grows == policy.shrinks == 0


def test_the_users_limit_is_the_ceiling_at_every_moment() -> None:
    policy = Policy()
    look(policy, 0, -MIB, 100 * MIB)
    assert policy.allowance(50 * MIB) == 50 * MIB
    assert look(policy, 1, 0, 50 * MIB, promised=50 * MIB) == 50 * MIB
    assert not policy.short


@pytest.mark.parametrize(
    ("spare", "seconds"),
    [(-LIMIT, SOONEST_SECONDS), (0, SOONEST_SECONDS), (128 * MIB, 0.5), (1 << 40, LATEST_SECONDS)],
)
def test_the_less_room_the_sooner_the_next_look(spare: int, seconds: float) -> None:
    assert Policy().look_again_after(room(spare)) == seconds


def test_while_something_is_withheld_the_next_look_is_not_far() -> None:
    policy = Policy()
    look(policy, 0, -MIB, 100 * MIB)
    assert policy.look_again_after(room(1 << 40)) == LATEST_SHORT_SECONDS
    assert policy.look_again_after(None) == LATEST_SHORT_SECONDS


sizes = st.integers(0, 2048 * MIB)


@settings(deadline=None)
@given(allowance=sizes, pool=sizes, page_cache=sizes, floor_pool=sizes, floor_page_cache=sizes)
def test_a_split_is_of_what_is_allowed(
    allowance: int, pool: int, page_cache: int, floor_pool: int, floor_page_cache: int
) -> None:
    promised = Sizes(pool, page_cache)
    floor = Sizes(min(floor_pool, pool), min(floor_page_cache, page_cache))
    share = split(allowance, promised, floor)
    assert floor.pool <= share.pool <= pool
    assert floor.page_cache <= share.page_cache <= page_cache
    assert share.total == min(max(allowance, floor.total), promised.total)
    assert share.page_cache == page_cache or share.pool == floor.pool, "the pool yields first"


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
def test_whatever_happens_the_allowance_is_sound(
    seen: list[tuple[float, int | None, int, int]],
) -> None:
    policy = Policy()
    now, before = 0.0, None
    for seconds, spare, used, promised in seen:
        now += seconds
        place = None if spare is None else room(spare)
        last = before if before is None else policy.allowance(promised)
        grown, shrunk = policy.grows, policy.shrinks
        before = policy.look(now, place, used, promised, FLOOR)
        floor = min(FLOOR, promised)
        assert floor <= before <= promised
        assert before == policy.allowance(promised)
        if spare is not None:
            assert before <= max(used + spare, floor)
        if last is not None and before > max(last, floor):
            assert policy.grows == grown + 1
            assert before - max(last, floor) <= max(promised // 16, MIN_STEP)
        assert policy.shrinks >= shrunk


@settings(deadline=None)
@given(st.lists(st.integers(0, 400 * MIB), max_size=40))
def test_a_machine_is_never_filled_by_the_caches(steps: list[int]) -> None:
    """Others take and give back what they like; the caches grow as fast as they may."""
    policy = Policy()
    total, promised, used, now = 512 * MIB, 1024 * MIB, 0, 0.0
    for others in steps:
        now += 0.1
        available = total - others - used
        allowance = policy.look(now, Headroom("", total, available), used, promised, FLOOR)
        used = allowance  # shrunk to it, or filled up to it before anybody looks again
        left = total - others - used
        assert left >= Headroom("", total, 0).reserve or allowance == FLOOR
    # And when it is quiet again they get what there is, but for a step.
    for _ in range(60):
        now += 1
        allowance = policy.look(now, Headroom("", total, total - used), used, promised, FLOOR)
        used = allowance
    assert used > total - Headroom("", total, 0).reserve - promised // 16
