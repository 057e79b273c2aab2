"""Test the packed names of a directory."""

import sys
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleanfs.source.listing import Names

NAMES = st.lists(st.binary(min_size=1, max_size=255).filter(lambda name: b"/" not in name))


@given(NAMES, st.integers(0, 20), st.integers(0, 20))
def test_packed_names_are_returned_unchanged(names: list[bytes], position: int, count: int) -> None:
    packed = Names(names)
    assert len(packed) == len(names)
    assert [packed[i] for i in range(len(packed))] == names
    assert packed.some(position, count) == names[position : position + count]
    with pytest.raises(IndexError):
        packed[len(names)]


def test_packed_names_take_little_memory() -> None:
    packed = Names([b"%011d" % i for i in range(1000)])
    parts = [getattr(packed, name) for name in Names.__slots__]
    assert [type(part) for part in parts] == [bytes, array]
    assert sum(map(sys.getsizeof, parts)) < 1000 * (11 + 10)
