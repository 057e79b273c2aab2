"""Import the native engine, or skip the test module that needs it."""

from collections.abc import Sequence

import pytest

from cleanfs.backends.ops import FileKey
from tests.backends import engines

if engines.NATIVE is None:
    pytest.skip(engines.NO_NATIVE, allow_module_level=True)

from cleanfs.backends._zcache import Engine

__all__ = ["Engine", "SyncedEngine"]


class SyncedEngine(Engine):
    """Compresses every page before the put returns."""

    def put_page(self, pool_id: int, key: FileKey, index: int, page: bytes) -> None:
        super().put_page(pool_id, key, index, page)
        self.sync()

    def put_pages(self, pool_id: int, key: FileKey, pages: Sequence[tuple[int, bytes]]) -> None:
        super().put_pages(pool_id, key, pages)
        self.sync()
