"""Provide a page cache of four pages over a source of 16."""

from collections.abc import AsyncIterator

import pytest

from cleanfs.backends.ops import Backend
from tests.cache.rig import Rig, Source, Store


@pytest.fixture
def store() -> Store:
    assert isinstance(Store(), Backend)
    return Store()


@pytest.fixture
async def rig(store: Store) -> AsyncIterator[Rig]:
    made = Rig(4, Source(16), store)
    yield made
    made.check()
    assert made.file.pins == 1
