"""Every backend keeps the contract: both engines, the native one in every variant and in two states."""

import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from cleanfs.backends.ops import Backend, FileKey
from tests.backends.conformance import BackendConformance
from tests.backends.engines import VARIANTS, check, least_limit, make, needs_native, sync
from tests.backends.pages import FILLER_PAGES, KEY, MIB, PAGE_SIZE, noise


class ZcacheConformance(BackendConformance):
    """Checks after each test that the counters of zcache agree with its data structures."""

    made: list[Any]

    @pytest.fixture(autouse=True)
    def _check(self) -> Iterator[None]:
        self.made = []
        yield
        for z in self.made:
            check(z)

    def new(self) -> Any:  # noqa: ANN401  # one of two engine classes
        raise NotImplementedError

    def make(self) -> Backend:
        self.made.append(self.new())
        backend: Backend = self.made[-1]
        return backend


class TestPython(ZcacheConformance):
    """Tests the Python engine."""

    def new(self) -> Backend:
        made: Backend = make("python", 16 * MIB)
        return made

    def fill(self, backend: Backend, pool_id: int) -> None:
        backend.resize(MIB)
        backend.put_pages(pool_id, FileKey(9, 9, b""), list(enumerate(FILLER_PAGES * 3)))


@needs_native
class NativeConformance(ZcacheConformance):
    """Tests the native engine with the options of each variant."""

    options: dict[str, Any]

    @pytest.fixture(autouse=True, params=VARIANTS)
    def _variant(self, request: pytest.FixtureRequest) -> None:
        self.options = VARIANTS[request.param]

    def possible_results(self, page: bytes) -> tuple[bytes | None, ...]:
        refused = (
            self.options.get("keep_poor") is False and len(zlib.compress(page)) > len(page) * 7 / 8
        )
        return (page, None) if refused else (page,)

    def fill(self, backend: Backend, pool_id: int) -> None:
        limit = least_limit(self.options)
        backend.resize(limit)
        for _ in range(2 if self.options.get("was_active") else 1):
            for first in range(0, limit // 1000, len(FILLER_PAGES)):
                backend.put_pages(pool_id, FileKey(9, 9, b""), list(enumerate(FILLER_PAGES, first)))

    def test_a_second_put_that_is_refused_discards_the_first(
        self, backend: Backend, any_pool: int
    ) -> None:
        self.fill(backend, any_pool)
        backend.put_page(any_pool, KEY, 0, bytes(PAGE_SIZE))
        backend.put_page(any_pool, KEY, 0, noise(2))
        sync(backend)
        keeps_noise = self.options.get("method") == "none"
        assert backend.get_page(any_pool, KEY, 0) == (noise(2) if keeps_noise else None)


class TestNativeStaged(NativeConformance):
    """Keeps pages in the staging area: too few are put to wake the worker, and no codec runs."""

    @pytest.fixture(autouse=True, params=["lz4", "was-active", "zbud"])
    def _variant(self, request: pytest.FixtureRequest) -> None:
        self.options = VARIANTS[request.param]

    def new(self) -> Backend:
        made: Backend = make("log", 32 * MIB, **self.options)
        return made


class TestNativeStored(NativeConformance):
    """Compresses and stores pages before a put returns."""

    def new(self) -> Backend:
        from tests.backends.native import SyncedEngine

        return SyncedEngine(32 * MIB, **self.options)
