"""Fixtures that give every engine in turn. A module about one engine overrides ``engine``."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.backends.engines import check, make
from tests.backends.pages import MIB, PAGE_SIZE


@pytest.fixture(params=["python", "log", "zbud"])
def engine(request: pytest.FixtureRequest) -> str:
    """The name of an engine, for ``engines.make``."""
    name: str = request.param
    return name


@pytest.fixture
def z(engine: str) -> Iterator[Any]:
    """A zcache of 2 MiB, whose counters must agree with its data structures after the test."""
    made = make(engine, 2 * MIB)
    yield made
    check(made)


@pytest.fixture
def pool(z: Any) -> int:  # noqa: ANN401  an engine
    """A private pool of it."""
    made: int = z.init_fs(PAGE_SIZE)
    return made
