"""Provide every engine in turn to a test. A module about one engine overrides ``engine``."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.backends.engines import check, make
from tests.backends.pages import MIB, PAGE_SIZE


@pytest.fixture(params=["python", "log", "zbud"])
def engine(request: pytest.FixtureRequest) -> str:
    """Return the name of an engine, for ``engines.make``."""
    name: str = request.param
    return name


@pytest.fixture
def z(engine: str) -> Iterator[Any]:
    """Make a zcache of 2 MiB. After the test, its counters must agree with its data structures."""
    made = make(engine, 2 * MIB)
    yield made
    check(made)


@pytest.fixture
def pool(z: Any) -> int:  # noqa: ANN401  # one of two engine classes
    """Make a private pool in ``z``."""
    made: int = z.init_fs(PAGE_SIZE)
    return made
