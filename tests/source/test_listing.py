"""Test the packed names of a directory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleanfs.source.listing import Names, PythonNames

NAMES = st.lists(st.binary(min_size=1, max_size=255).filter(lambda name: b"/" not in name))


@pytest.fixture(scope="module", params=[PythonNames, Names])
def names(request: pytest.FixtureRequest) -> type[PythonNames]:
    return request.param  # type: ignore[no-any-return]  # one of the two


@given(some=NAMES, position=st.integers(0, 20), count=st.integers(0, 20))
def test_packed_names_are_returned_unchanged(
    names: type[PythonNames], some: list[bytes], position: int, count: int
) -> None:
    packed = names(some)
    assert len(packed) == len(some)
    assert [packed[i] for i in range(len(packed))] == some
    assert packed.some(position, count) == some[position : position + count]
    with pytest.raises(IndexError):
        packed[len(some)]


def test_packed_names_take_little_memory(names: type[PythonNames]) -> None:
    assert names([b"%011d" % i for i in range(1000)]).memory < 1000 * (11 + 10)
