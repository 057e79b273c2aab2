"""Test the record of the pages of a write that were read before it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleanfs.backends.ops import FileKey
from cleanfs.cache import read_ranges
from cleanfs.cache.read_ranges import RangeSet
from cleanfs.cache.state import FileState

PAGE = 16
"""Bytes: small, so that ranges meet."""

steps = st.lists(st.tuples(st.booleans(), st.integers(0, 400), st.integers(1, 100)), max_size=60)
"""Reads (True) and writes, from where, how many bytes."""


def pages(start: int, size: int) -> set[int]:
    return set(range(start // PAGE, (start + size - 1) // PAGE + 1))


@given(steps)
def test_a_page_counts_as_read_until_it_is_written(steps: list[tuple[bool, int, int]]) -> None:
    ranges, read = RangeSet(FileState(1, FileKey(1, 2, b"")), dropped=True), set[int]()
    for is_read, start, size in steps:
        if is_read:
            whole = pages(start, size)  # the kernel reads whole pages
            ranges.read(min(whole) * PAGE, (max(whole) + 1) * PAGE)
            read |= whole
        else:
            written = pages(start, size)
            assert ranges.written(start, start + size, PAGE) == bool(read & written)
            read -= written


@given(steps)
def test_no_page_is_forgotten_however_many_ranges_there_are(steps: list[tuple[bool, int, int]]) -> None:
    ranges, read = RangeSet(FileState(1, FileKey(1, 2, b"")), dropped=True), set[int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_ranges, "MAX_RANGES", 3)
        for is_read, start, size in steps:
            if is_read:
                ranges.read(start, start + size)
                read |= pages(start, size)
            else:
                written = pages(start, size)
                if read & written:
                    assert ranges.written(start, start + size, PAGE)
                else:
                    ranges.written(start, start + size, PAGE)
                read -= written
            assert len(ranges._starts) == len(ranges._stops) <= 3  # noqa: SLF001  # its bound on memory


def test_many_reads_in_between_are_remembered() -> None:
    ranges = RangeSet(FileState(1, FileKey(1, 2, b"")), dropped=True)
    for page in range(0, 20_000, 2):
        ranges.read(page * PAGE, (page + 1) * PAGE)
    assert all(ranges.written(page * PAGE, page * PAGE + 1, PAGE) for page in range(0, 20_000, 2))


def test_a_read_in_progress_is_recorded() -> None:
    ranges = RangeSet(FileState(1, FileKey(1, 2, b"")), dropped=True)
    for _ in range(2):
        ranges.begin(PAGE, 2 * PAGE)
    ranges.end(PAGE, 2 * PAGE)
    assert ranges.being_read(0, 2 * PAGE)
    assert ranges.being_read(2 * PAGE - 1, 2 * PAGE)
    assert not ranges.being_read(0, PAGE)
    assert not ranges.being_read(2 * PAGE, 3 * PAGE)
    ranges.end(PAGE, 2 * PAGE)
    assert not ranges.being_read(0, 2 * PAGE)
    assert ranges.written(PAGE, PAGE + 1, PAGE)
