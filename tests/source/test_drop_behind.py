"""Test which reads are dropped from the page cache at once, and which some distance behind."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleanfs.cache.state import native
from cleanfs.source.drop_behind import AHEAD, FOLIO, NEAR, WINDOW, PythonStream, Span, Stream

REQUEST = 128 << 10
LARGE = 1 << 30


def read(stream: Stream, offset: int, size: int = REQUEST, file_size: int = LARGE) -> Span | None:
    assert stream.lingers(offset, size, file_size)
    return stream.passed(offset, size)


def test_a_file_read_by_one_request_is_dropped_at_once() -> None:
    stream = Stream()
    assert not stream.lingers(0, 8192, 5000)
    assert stream.rest() is None


def test_a_read_of_unknown_size_begins_a_stream() -> None:
    assert Stream().lingers(0, 8192, 0)


def test_a_stream_is_dropped_behind_once_and_completely() -> None:
    stream, dropped = Stream(), []
    for offset in range(0, 64 << 20, REQUEST):
        span = read(stream, offset)
        if span is not None:
            dropped.append(span)
            assert offset + REQUEST - sum(span) == NEAR
    rest = stream.rest()
    assert rest is not None
    position = 0
    for start, length in [*dropped, rest]:
        assert start == max(position - FOLIO, 0)
        assert length <= WINDOW + REQUEST + FOLIO + AHEAD
        position = start + length
    assert position == (64 << 20) + AHEAD


def test_reordered_requests_are_one_stream() -> None:
    stream, random = Stream(), Random(1)
    read(stream, 0)
    for start in range(0, 32 << 20, 8 * REQUEST):
        batch = [start + i * REQUEST for i in range(8)]
        random.shuffle(batch)
        for offset in batch:
            read(stream, offset)
    rest = stream.rest()
    assert rest is not None
    assert sum(rest) == (32 << 20) + AHEAD


def test_random_reads_after_the_beginning_are_not_a_stream() -> None:
    stream, random = Stream(), Random(1)
    read(stream, 0, 4096)
    for _ in range(1000):
        assert not stream.lingers(random.randrange(2, 4096) * 8192, 4096, 64 << 20)
    assert not stream.lingers(8192, 4096, 64 << 20)
    read(stream, 4096, 4096)


def test_single_reads_are_dropped_at_once() -> None:
    stream = Stream()
    for offset in range(10 * NEAR, 100 * NEAR, 10 * NEAR):
        assert not stream.lingers(offset, 4096, LARGE)
    assert stream.rest() is None


def test_two_reads_in_a_row_are_a_stream() -> None:
    stream = Stream()
    assert not stream.lingers(500 * NEAR, 4096, LARGE)
    assert read(stream, 500 * NEAR + 4096) is None
    assert stream.rest() == (500 * NEAR + 4096 - FOLIO, REQUEST + FOLIO + AHEAD)


def test_a_single_read_does_not_end_a_stream() -> None:
    stream = Stream()
    read(stream, 0)
    assert not stream.lingers(500 * NEAR, 4096, LARGE)
    assert read(stream, REQUEST) is None
    assert stream.rest() == (0, 2 * REQUEST + AHEAD)


def test_a_new_stream_drops_the_old_one() -> None:
    stream = Stream()
    read(stream, 0)
    assert not stream.lingers(500 * NEAR, 4096, LARGE)
    assert read(stream, 500 * NEAR + 4096) == (0, REQUEST)
    assert stream.rest() == (500 * NEAR + 4096 - FOLIO, REQUEST + FOLIO + AHEAD)


near = st.integers(0, 200).map(lambda at: at * REQUEST)
offsets = st.one_of(
    near, st.integers(0, 1 << 20), st.integers((1 << 63) - (1 << 25), (1 << 63) - (1 << 21))
)
sizes = st.one_of(st.sampled_from([4096, 32 << 10, REQUEST]), st.integers(1, 1 << 20))


@pytest.mark.skipif(native is None, reason="the native module was not built")
@given(
    st.lists(
        st.tuples(offsets, sizes, st.sampled_from([0, 4096, LARGE, (1 << 63) - 1]), st.integers(0, 3)),
        max_size=60,
    )
)
def test_the_native_stream_is_python_s_twin(reads: list[tuple[int, int, int, int]]) -> None:
    """Most reads go on where the last one ended."""
    fast, python, end = Stream(), PythonStream(), 0
    for offset, size, file_size, jumps in reads:
        at = end if jumps else offset
        lingers = fast.lingers(at, size, file_size)
        assert lingers == python.lingers(at, size, file_size)
        if lingers:
            assert fast.passed(at, size) == python.passed(at, size)
        assert fast.rest() == python.rest()
        end = min(at + size, (1 << 63) - (1 << 21))
