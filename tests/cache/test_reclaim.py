"""Test the reclaim policy: traces worked out by hand, scan resistance, and invariants."""

# ruff: noqa: SLF001  # invariants are checked on private lists

from collections import OrderedDict
from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleanfs.cache.reclaim import ReclaimPolicy, TwoListReclaim


class Fifo:
    """Evicts first in, first out, for comparison."""

    refaults = activations = 0

    def __init__(self) -> None:
        self._pages: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def insert(self, pages: Iterable[int]) -> None:
        self._pages.update(dict.fromkeys(pages))

    def touch(self, pages: Iterable[int]) -> None:
        pass

    def discard(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._pages.pop(page, None)

    def victims(self, count: int) -> list[int]:
        return [self._pages.popitem(last=False)[0] for _ in range(min(count, len(self)))]


def run(policy: ReclaimPolicy, size: int, trace: Iterable[int]) -> tuple[int, list[int]]:
    """Return misses and evictions, in order, of a cache of ``size`` pages read one page at a time."""
    resident: set[int] = set()
    misses, evicted = 0, []
    for page in trace:
        if page in resident:
            policy.touch([page])
            continue
        misses += 1
        resident.add(page)
        policy.insert([page])
        if len(resident) > size:
            victims = policy.victims(len(resident) - size)
            evicted += victims
            resident.difference_update(victims)
    return misses, evicted


def test_without_references_pages_are_evicted_first_in_first_out() -> None:
    # No page is hit and no shadow is found: 1 to 6 enter inactive; each time the oldest is evicted.
    assert run(TwoListReclaim(), 3, [1, 2, 3, 4, 5, 6]) == (6, [1, 2, 3])


def test_a_referenced_page_gets_a_second_chance() -> None:
    # 1 2 3 enter; 1 is hit. 4 enters: 1 is the oldest but referenced, so it is activated; 2 is
    # evicted. 5 evicts 3. 6: the active share is 3 * 0.5 = 1, so 1 stays; 4 is evicted. 1 still hits.
    policy = TwoListReclaim()
    assert run(policy, 3, [1, 2, 3, 1, 4, 5, 6, 1]) == (6, [2, 3, 4])
    assert policy.activations == 1
    assert policy.refaults == 0


def test_a_refault_is_activated_at_once() -> None:
    # Size 2, at most 1 active. 3 evicts 1, whose shadow stays. 1 again: active; 2 is the oldest
    # inactive page and is evicted. 4 evicts 3. 5 evicts 4. So 1, read twice, outlives 3 and 4.
    policy = TwoListReclaim()
    assert run(policy, 2, [1, 2, 3, 1, 4, 5, 1]) == (6, [1, 2, 3, 4])
    assert policy.refaults == 1
    assert policy.activations == 0


def test_a_loop_longer_than_the_cache_evicts_in_loop_order() -> None:
    # Size 4, 2 active at most, a loop over 5. Lists oldest first, inactive | active:
    #   1 2 3 4   miss                1234 |
    #   5         miss                2345 |      victim 1
    #   1         refault             345 | 1     victim 2
    #   2         refault             45 | 12     victim 3
    #   3         refault, 123 is over its share: 1 is deactivated: 451 | 23, victim 4
    #   4         refault, 2 is deactivated: 512 | 34, victim 5
    #   5 1 2 ... the same way: every read is a refault, and the victim is the page read next.
    policy = TwoListReclaim()
    assert run(policy, 4, [1, 2, 3, 4, 5] * 4) == (20, [*[1, 2, 3, 4, 5] * 3, 1])
    assert policy.refaults == 15


def test_a_referenced_active_page_rotates_and_the_next_is_deactivated() -> None:
    # Size 4. 1 2 3 4, then 5 and 6 push 1 and 2 out: 3456 |, shadows 1 2.
    # 1: refault: 3456 | 1, victim 3. 2: refault: 456 | 12, victim 4: 56 | 12, shadows 3 4.
    # 1 is hit. 3: refault: 56 | 123, share 2: 1 is referenced and rotates (231), 2 moves to the
    # young inactive end: 562 | 31, victim 5 -> 62 | 31. 7: 627 | 31, victim 6.
    policy = TwoListReclaim()
    trace = [1, 2, 3, 4, 5, 6, 1, 2, 1, 3, 7]
    assert run(policy, 4, trace) == (10, [1, 2, 3, 4, 5, 6])
    assert policy.refaults == 3
    assert policy.victims(4) == [2, 7, 3, 1]


def test_a_scan_does_not_evict_frequently_used_pages() -> None:
    # 40 pages in use, cache of 100, and a scan of 10,000 pages in between, one per use.
    hot = [i % 40 for i in range(10_000)]
    trace = [page for i, h in enumerate(hot) for page in (h, 1000 + i)]
    misses, _ = run(TwoListReclaim(), 100, trace)
    fifo_misses, _ = run(Fifo(), 100, trace)
    assert misses <= 10_000 + 2 * 40
    assert fifo_misses > 10_000 + 3000


def test_a_working_set_that_changes_is_followed() -> None:
    policy = TwoListReclaim()
    first = [i % 40 for i in range(2000)]
    second = [100 + i % 40 for i in range(2000)]
    scan = range(1000, 1200)
    misses, _ = run(policy, 60, [*first, *scan, *second, *scan, *second])
    assert misses <= 40 + 200 + 40 + 200 + 3 * 40


@pytest.mark.parametrize("count", [0, 1, 3, 4, 100])
def test_there_are_at_most_as_many_victims_as_pages(count: int) -> None:
    policy = TwoListReclaim()
    policy.insert(range(4))
    policy.touch(range(4))
    assert sorted(policy.victims(count))[: min(count, 4)] == sorted(
        set(range(4)) - set(remaining(policy))
    )
    assert len(policy) == 4 - min(count, 4)
    assert TwoListReclaim().victims(count) == []


def remaining(policy: TwoListReclaim) -> list[int]:
    return [*policy._inactive, *policy._active]


def test_a_discarded_page_has_no_history() -> None:
    # 1 is evicted and leaves a shadow; after a discard it returns as a new, inactive page, and
    # 2, which refaults, outlives it.
    policy = TwoListReclaim()
    policy.insert([1, 2, 3, 4])
    assert policy.victims(2) == [1, 2]
    policy.discard([1])
    policy.insert([2, 1])
    assert policy.refaults == 1
    assert policy.victims(3) == [3, 4, 1]


def test_a_discarded_page_is_never_a_victim_and_loses_its_reference() -> None:
    policy = TwoListReclaim()
    policy.insert([1, 2, 3])
    policy.touch([1])
    policy.discard([1, 99])
    assert len(policy) == 2
    policy.insert([1])
    assert policy.victims(3) == [2, 3, 1]


def test_there_are_no_more_shadows_than_there_were_pages() -> None:
    policy = TwoListReclaim()
    run(policy, 10, range(1000))
    assert len(policy._shadows) == 11  # 10 and the one being inserted
    assert 989 in policy._shadows


PAGES = st.lists(st.integers(0, 25), max_size=12, unique=True)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["insert", "touch", "discard", "victims"]), PAGES, st.integers(0, 12)
        ),
        max_size=60,
    )
)
def test_every_resident_page_is_in_one_list_and_nothing_else_is(
    steps: list[tuple[str, list[int], int]],
) -> None:
    policy, resident = TwoListReclaim(), set[int]()
    for action, pages, count in steps:
        if action == "insert":
            new = [page for page in pages if page not in resident]
            policy.insert(new)
            resident.update(new)
        elif action == "touch":
            policy.touch([page for page in pages if page in resident])
        elif action == "discard":
            policy.discard(pages)
            resident.difference_update(pages)
        else:
            victims = policy.victims(count)
            assert len(victims) == len(set(victims)) == min(count, len(resident))
            assert resident.issuperset(victims)
            resident.difference_update(victims)
        inactive, active = set(policy._inactive), set(policy._active)
        assert inactive | active == resident
        assert not inactive & active
        assert not policy._shadows.keys() & resident
        assert policy._referenced <= resident
        assert len(policy) == len(resident)


@given(st.integers(1, 40), st.integers(0, 2**32))
def test_any_trace_keeps_the_cache_full_and_hits_a_fitting_set(size: int, seed: int) -> None:
    rng = Random(seed)
    trace = [rng.randrange(2 * size) for _ in range(300)]
    misses, evicted = run(TwoListReclaim(), size, trace)
    assert misses >= len(set(trace))
    assert len(evicted) == max(0, misses - size)
    fitting = [rng.randrange(size) for _ in range(100)]
    assert run(TwoListReclaim(), size, fitting)[0] == len(set(fitting))
