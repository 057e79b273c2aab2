"""Test latency histograms: their counts are exact, and values are exact to a bucket."""

import json
from dataclasses import replace
from itertools import pairwise
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleanfs.fuse.session import native
from cleanfs.latency import (
    BUCKETS,
    CLEANCACHE_HIT,
    KINDS,
    PAGECACHE_HIT,
    SOURCE_READ,
    Histogram,
    HistogramSnapshot,
    Latencies,
    LatencyStats,
    bucket_bounds,
    bucket_index,
)

durations = st.one_of(
    st.integers(0, 100), st.integers(1_000, 10_000_000), st.integers(0, (1 << 63) - 1)
)
some = st.lists(durations, min_size=1, max_size=200)
percents = st.floats(0, 100)


def histogram(values: list[int]) -> HistogramSnapshot:
    made = Histogram()
    for value in values:
        made.record(value)
    return made.snapshot()


def exact(values: list[int], percent: float) -> int:
    """Return the percentile by nearest rank."""
    rank = ceil(len(values) * percent / 100)
    return sorted(values)[max(rank, 1) - 1]


@given(durations)
def test_a_bucket_holds_its_values_and_is_narrow(ns: int) -> None:
    low, high = bucket_bounds(bucket_index(ns))
    assert low <= ns < high
    assert high - low == 1 or 4 * (high - low) <= low


def test_buckets_abut_from_0_to_the_end_of_the_clock() -> None:
    bounds = [bucket_bounds(index) for index in range(BUCKETS)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 1 << 63
    assert all(before[1] == after[0] for before, after in pairwise(bounds))
    assert [bucket_index(low) for low, _ in bounds] == list(range(BUCKETS))


@given(some)
def test_recorded_values_are_counted_in_their_buckets(values: list[int]) -> None:
    snapshot = histogram(values)
    assert snapshot.total == len(values)
    assert snapshot.sum_ns == sum(values)
    assert all(snapshot.counts[bucket_index(value)] for value in values)


@given(some, percents)
def test_a_percentile_is_in_the_bucket_of_the_exact_one(values: list[int], percent: float) -> None:
    low, high = bucket_bounds(bucket_index(exact(values, percent)))
    assert low <= histogram(values).percentile(percent) <= high


@given(some, percents, percents)
def test_percentiles_are_monotone(values: list[int], a: float, b: float) -> None:
    snapshot = histogram(values)
    assert snapshot.percentile(min(a, b)) <= snapshot.percentile(max(a, b))


def test_a_percentile_is_interpolated_within_its_bucket() -> None:
    low, high = 32, 40
    snapshot = histogram([33] * 4)
    assert [snapshot.percentile(p) for p in (0, 25, 50, 100)] == [low, 34, 36, high]


def test_percentiles_of_an_empty_histogram_are_0() -> None:
    assert HistogramSnapshot().percentile(99) == 0
    assert HistogramSnapshot().total == 0


@given(some, st.lists(durations, max_size=200))
def test_the_difference_of_two_snapshots_counts_the_values_between_them(
    first: list[int], then: list[int]
) -> None:
    grows = Histogram()
    for value in first:
        grows.record(value)
    before = grows.snapshot()
    for value in then:
        grows.record(value)
    assert grows.snapshot() - before == histogram(then)
    assert before + histogram(then) == grows.snapshot() == histogram(then + first)


@given(some, st.integers(0, 62))
def test_values_below_a_power_of_two_are_exact(values: list[int], exponent: int) -> None:
    bound = 1 << exponent
    assert histogram(values).below(bound) == sum(value < bound for value in values)


@given(some)
def test_a_snapshot_survives_the_round_trip_through_json(values: list[int]) -> None:
    snapshot = histogram(values)
    member = json.loads(json.dumps(snapshot.as_json()))
    assert HistogramSnapshot.from_json(member) == snapshot
    assert member["count"] == sum(member["buckets_ns"].values()) == len(values)
    assert all(count for count in member["buckets_ns"].values())
    assert min(map(int, member["buckets_ns"])) > min(values)


@pytest.mark.parametrize("kind", [PAGECACHE_HIT, CLEANCACHE_HIT, SOURCE_READ])
def test_a_read_counts_once_under_its_kind(kind: int) -> None:
    latencies = Latencies()
    latencies.read(kind, 5000, 4096)
    stats = latencies.stats()
    counted = {name: h.total for name, h in stats.by_kind().items() if h.total}
    assert counted == {KINDS[kind]: 1}
    assert (stats.reads, stats.read_bytes, stats.write_bytes) == (1, 4096, 0)


def test_a_write_does_not_count_as_a_read() -> None:
    latencies = Latencies()
    latencies.write(7000, 10)
    stats = latencies.stats()
    assert stats == replace(LatencyStats(), write=histogram([7000]), write_bytes=10)
    assert stats.reads == 0


@pytest.mark.skipif(native is None, reason="the native module was not built")
@given(st.lists(st.one_of(st.integers(0, 100), st.integers(0, 1 << 40)), max_size=50))
def test_the_channel_s_histogram_is_the_same(values: list[int]) -> None:
    assert native is not None
    fast, python = native.Histogram(), Histogram()
    for ns in values:
        fast.record(ns)
        python.record(ns)
    assert HistogramSnapshot(*fast.snapshot) == python.snapshot()
