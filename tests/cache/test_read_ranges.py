"""Which pages of a write were read before it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleanfs.cache import read_ranges
from cleanfs.cache.read_ranges import RangeSet

PAGE = 16
"""Bytes: small, so that ranges meet."""

steps = st.lists(st.tuples(st.booleans(), st.integers(0, 400), st.integers(1, 100)), max_size=60)
"""Reads (True) and writes, from where, how many bytes."""


def pages(start: int, size: int) -> set[int]:
    return set(range(start // PAGE, (start + size - 1) // PAGE + 1))


@given(steps)
def test_a_page_counts_as_read_until_it_is_written(steps: list[tuple[bool, int, int]]) -> None:
    told, read = RangeSet(dropped=True), set[int]()
    for is_read, start, size in steps:
        if is_read:
            whole = pages(start, size)  # as the kernel reads
            told.read(min(whole) * PAGE, (max(whole) + 1) * PAGE)
            read |= whole
        else:
            written = pages(start, size)
            assert told.written(start, start + size, PAGE) == bool(read & written)
            read -= written


@given(steps)
def test_no_page_is_forgotten_however_many_ranges_there_are(steps: list[tuple[bool, int, int]]) -> None:
    told, read = RangeSet(dropped=True), set[int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_ranges, "MAX_RANGES", 3)
        for is_read, start, size in steps:
            if is_read:
                told.read(start, start + size)
                read |= pages(start, size)
            else:
                written = pages(start, size)
                if read & written:
                    assert told.written(start, start + size, PAGE)
                else:
                    told.written(start, start + size, PAGE)
                read -= written
            assert len(told._starts) == len(told._stops) <= 3  # noqa: SLF001  # its bound on memory


def test_many_reads_in_between_are_remembered() -> None:
    told = RangeSet(dropped=True)
    for page in range(0, 20_000, 2):
        told.read(page * PAGE, (page + 1) * PAGE)
    assert all(told.written(page * PAGE, page * PAGE + 1, PAGE) for page in range(0, 20_000, 2))


def test_what_is_being_read_is_known() -> None:
    told = RangeSet(dropped=True)
    for _ in range(2):
        told.begin(PAGE, 2 * PAGE)
    told.end(PAGE, 2 * PAGE)
    assert told.being_read(0, 2 * PAGE)
    assert told.being_read(2 * PAGE - 1, 2 * PAGE)
    assert not told.being_read(0, PAGE)
    assert not told.being_read(2 * PAGE, 3 * PAGE)
    told.end(PAGE, 2 * PAGE)
    assert not told.being_read(0, 2 * PAGE)
    assert told.written(PAGE, PAGE + 1, PAGE)
