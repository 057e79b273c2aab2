"""Test the contract of ``backends/ops.py`` clause by clause, for any backend.

A backend's test module derives a class from ``BackendConformance`` whose name starts with Test.
"""

from abc import ABC, abstractmethod

import pytest

from cleanfs.backends.ops import Backend, BorrowOps, CleancacheOps, FileKey
from tests.backends.pages import (
    KEY,
    LAST_INDEX,
    OTHER_KEYS,
    PAGE_SIZE,
    PAGE_SIZES,
    UUID_A,
    UUID_B,
    noise,
    text,
)


class BackendConformance(ABC):
    """Tests every clause of the contract. A subclass supplies the two abstract methods."""

    @abstractmethod
    def make(self) -> Backend:
        """Make a backend that can hold 4 MiB of pages that do not compress."""

    @abstractmethod
    def fill(self, backend: Backend, pool_id: int) -> None:
        """Fill the backend with pages of another file than ``KEY``, so that it refuses ``noise``."""

    def possible_results(self, page: bytes) -> tuple[bytes | None, ...]:
        """Return the possible results of a get right after the put, with None if it may be refused."""
        return (page,)

    @pytest.fixture
    def backend(self) -> Backend:
        return self.make()

    @pytest.fixture
    def pool(self, backend: Backend) -> int:
        return backend.init_fs(PAGE_SIZE)

    @pytest.fixture(params=["private", "shared"])
    def any_pool(self, request: pytest.FixtureRequest, backend: Backend) -> int:
        """Make a pool of either kind, for the clauses that hold for both."""
        if request.param == "private":
            return backend.init_fs(PAGE_SIZE)
        return backend.init_shared_fs(UUID_A, PAGE_SIZE)

    def test_it_satisfies_the_protocols(self, backend: Backend) -> None:
        assert isinstance(backend, CleancacheOps)
        assert isinstance(backend, Backend)
        assert backend.name

    # -- 1: pools ---------------------------------------------------------------------------

    def test_pools_of_every_page_size_return_the_pages_put(self) -> None:
        for page_size in PAGE_SIZES:
            backend = self.make()
            pool = backend.init_fs(page_size)
            shared = backend.init_shared_fs(UUID_A, page_size)
            assert pool >= 0, page_size
            assert shared >= 0, page_size
            pages = [bytes(page_size), text("x", page_size), noise(1, page_size)]
            for index, page in enumerate(pages):
                backend.put_page(pool, KEY, index, page)
                backend.put_page(shared, KEY, index, page)
                assert backend.get_page(pool, KEY, index) in self.possible_results(page), page_size
                assert backend.get_page(shared, KEY, index) in self.possible_results(page), page_size
                backend.flush_inode(pool, KEY)
                backend.flush_inode(shared, KEY)

    def test_private_pools_have_ids_and_pages_of_their_own(self, backend: Backend, pool: int) -> None:
        other = backend.init_fs(PAGE_SIZE)
        assert pool >= 0
        assert other >= 0
        assert pool != other
        backend.put_page(pool, KEY, 0, text("a"))
        assert backend.get_page(other, KEY, 0) is None
        backend.put_page(other, KEY, 0, text("b"))
        assert backend.get_page(pool, KEY, 0) == text("a")
        assert backend.get_page(other, KEY, 0) == text("b")

    def test_one_uuid_is_one_shared_pool(self, backend: Backend) -> None:
        first = backend.init_shared_fs(UUID_A, PAGE_SIZE)
        assert backend.init_shared_fs(UUID_A, PAGE_SIZE) == first >= 0
        assert backend.init_shared_fs(UUID_B, PAGE_SIZE) not in (first, -1)
        assert backend.init_fs(PAGE_SIZE) != first

    def test_a_shared_pool_refuses_another_page_size(self, backend: Backend) -> None:
        pool = backend.init_shared_fs(UUID_A, PAGE_SIZE)
        backend.put_page(pool, KEY, 0, text("a"))
        assert backend.init_shared_fs(UUID_A, 2 * PAGE_SIZE) < 0
        backend.flush_fs(pool)  # by the only sharer: the refused call did not join
        again = backend.init_shared_fs(UUID_A, 2 * PAGE_SIZE)
        assert again >= 0
        assert backend.get_page(again, KEY, 0) is None

    # -- 2, 3: put and get ---------------------------------------------------------------------

    def test_handles_differ_by_every_part_of_the_key_and_by_index(
        self, backend: Backend, any_pool: int
    ) -> None:
        handles = [(key, index) for key in (KEY, *OTHER_KEYS) for index in (0, 1, LAST_INDEX)]
        for key, index in handles:
            assert backend.get_page(any_pool, key, index) is None
            backend.put_page(any_pool, key, index, text((key, index)))
        for key, index in handles:
            assert backend.get_page(any_pool, key, index) == text((key, index))

    def test_a_get_returns_the_bytes_of_the_last_put(self, backend: Backend, any_pool: int) -> None:
        for page in (
            *(bytes(PAGE_SIZE), b"\xff" * PAGE_SIZE, b"12345678" * 512),
            *(text("x"), noise(1)),
        ):
            backend.put_page(any_pool, KEY, 7, page)
            got = backend.get_page(any_pool, KEY, 7)
            assert got in self.possible_results(page)
            assert got is None or type(got) is bytes
            backend.flush_inode(any_pool, KEY)

    def test_an_empty_put_has_no_effect(self, backend: Backend, any_pool: int) -> None:
        backend.put_pages(any_pool, KEY, [])
        assert backend.get_page(any_pool, KEY, 0) is None

    # -- 4: exclusive and shared -----------------------------------------------------------------

    def test_a_hit_on_a_private_pool_removes_the_page(self, backend: Backend, pool: int) -> None:
        backend.put_page(pool, KEY, 0, text("a"))
        assert backend.get_page(pool, KEY, 0) == text("a")
        assert backend.get_page(pool, KEY, 0) is None

    def test_a_hit_on_a_shared_pool_leaves_the_page_for_other_sharers(self, backend: Backend) -> None:
        mine = backend.init_shared_fs(UUID_A, PAGE_SIZE)
        theirs = backend.init_shared_fs(UUID_A, PAGE_SIZE)
        backend.put_page(mine, KEY, 0, text("a"))
        for pool in (theirs, mine, theirs):
            assert backend.get_page(pool, KEY, 0) == text("a")

    def test_a_page_returned_by_a_get_can_be_put_back(self, backend: Backend, any_pool: int) -> None:
        backend.put_page(any_pool, KEY, 0, text("a"))
        for _ in range(3):
            got = backend.get_page(any_pool, KEY, 0)
            assert got == text("a")
            backend.put_page(any_pool, KEY, 0, got)

    # -- 5: put-put-get, 6: get-get ---------------------------------------------------------------

    def test_put_put_get_returns_the_second_page(self, backend: Backend, any_pool: int) -> None:
        """For each pair of kinds: same-filled, compressible, incompressible."""
        for older in (bytes(PAGE_SIZE), text("AAA"), noise(1)):
            for newer in (b"\1" * PAGE_SIZE, text("BBB"), noise(2)):
                backend.put_page(any_pool, KEY, 0, older)
                backend.put_page(any_pool, KEY, 0, newer)
                assert backend.get_page(any_pool, KEY, 0) in self.possible_results(newer)
                backend.flush_inode(any_pool, KEY)

    def test_put_put_get_holds_within_one_call(self, backend: Backend, any_pool: int) -> None:
        backend.put_pages(any_pool, KEY, [(0, text("AAA")), (1, text("x")), (0, text("BBB"))])
        assert backend.get_pages(any_pool, KEY, 0, 2) == [text("BBB"), text("x")]

    def test_put_get_put_get_returns_the_second_page(self, backend: Backend, any_pool: int) -> None:
        backend.put_page(any_pool, KEY, 0, text("AAA"))
        backend.get_page(any_pool, KEY, 0)
        backend.put_page(any_pool, KEY, 0, text("BBB"))
        assert backend.get_page(any_pool, KEY, 0) == text("BBB")
        backend.put_page(any_pool, KEY, 0, text("CCC"))
        assert backend.get_page(any_pool, KEY, 0) == text("CCC")

    def test_a_second_put_that_is_refused_discards_the_first(
        self, backend: Backend, any_pool: int
    ) -> None:
        self.fill(backend, any_pool)
        backend.put_page(any_pool, KEY, 0, bytes(PAGE_SIZE))
        backend.put_page(any_pool, KEY, 0, noise(2))
        assert backend.get_page(any_pool, KEY, 0) is None

    def test_get_get_misses_until_the_next_put(self, backend: Backend, any_pool: int) -> None:
        for _ in range(3):
            assert backend.get_page(any_pool, KEY, 0) is None
        backend.put_page(any_pool, KEY, 0, text("a"))
        backend.flush_page(any_pool, KEY, 0)
        for _ in range(3):
            assert backend.get_page(any_pool, KEY, 0) is None

    # -- 7: flushes ----------------------------------------------------------------------------

    def _put_ten(self, backend: Backend, pool: int, key: FileKey = KEY) -> list[bytes | None]:
        pages = [(i, text((key, i))) for i in range(10)]
        backend.put_pages(pool, key, pages)
        return [page for _, page in pages]

    def test_flush_page_discards_that_page_only(self, backend: Backend, any_pool: int) -> None:
        expected = self._put_ten(backend, any_pool)
        other = self._put_ten(backend, any_pool, OTHER_KEYS[0])
        backend.flush_page(any_pool, KEY, 3)
        expected[3] = None
        assert backend.get_pages(any_pool, KEY, 0, 10) == expected
        assert backend.get_pages(any_pool, OTHER_KEYS[0], 0, 10) == other

    @pytest.mark.parametrize(
        ("start", "stop"), [(0, 10), (0, 1), (9, 10), (3, 7), (5, 5), (4, 1 << 50), (10, 20), (3, 4)]
    )
    def test_flush_pages_discards_a_half_open_range(
        self, backend: Backend, any_pool: int, start: int, stop: int
    ) -> None:
        expected = self._put_ten(backend, any_pool)
        other = self._put_ten(backend, any_pool, OTHER_KEYS[0])
        backend.flush_pages(any_pool, KEY, start, stop)
        expected[start:stop] = [None] * len(expected[start:stop])
        assert backend.get_pages(any_pool, KEY, 0, 10) == expected
        assert backend.get_pages(any_pool, OTHER_KEYS[0], 0, 10) == other

    @pytest.mark.parametrize(("stop", "left"), [(20, True), (21, False)])
    def test_a_range_longer_than_the_number_of_pages_is_half_open_too(
        self, backend: Backend, any_pool: int, stop: int, left: bool
    ) -> None:
        backend.put_pages(any_pool, KEY, [(0, text(0)), (1, text(1)), (20, text(20))])
        backend.flush_pages(any_pool, KEY, 1, stop)
        assert backend.get_pages(any_pool, KEY, 0, 2) == [text(0), None]
        assert backend.get_page(any_pool, KEY, 20) == (text(20) if left else None)

    @pytest.mark.parametrize("start", [0, 1, 9, 10, 1 << 50])
    def test_flush_pages_without_a_stop_discards_the_rest(
        self, backend: Backend, any_pool: int, start: int
    ) -> None:
        expected = self._put_ten(backend, any_pool)
        backend.put_page(any_pool, KEY, LAST_INDEX, text("last"))
        other = self._put_ten(backend, any_pool, OTHER_KEYS[0])
        backend.flush_pages(any_pool, KEY, start, None)
        expected[start:] = [None] * len(expected[start:])
        assert backend.get_pages(any_pool, KEY, 0, 10) == expected
        assert backend.get_page(any_pool, KEY, LAST_INDEX) is None
        assert backend.get_pages(any_pool, OTHER_KEYS[0], 0, 10) == other

    def test_flush_inode_discards_all_pages_of_that_file_only(
        self, backend: Backend, any_pool: int
    ) -> None:
        self._put_ten(backend, any_pool)
        others = {key: self._put_ten(backend, any_pool, key) for key in OTHER_KEYS}
        backend.flush_inode(any_pool, KEY)
        assert backend.get_pages(any_pool, KEY, 0, 10) == [None] * 10
        for key, pages in others.items():
            assert backend.get_pages(any_pool, key, 0, 10) == pages

    def test_a_flush_also_covers_pages_returned_by_a_get(self, backend: Backend, any_pool: int) -> None:
        self._put_ten(backend, any_pool)
        backend.get_pages(any_pool, KEY, 0, 10)
        backend.flush_page(any_pool, KEY, 0)
        backend.flush_pages(any_pool, KEY, 1, 5)
        backend.flush_inode(any_pool, KEY)
        assert backend.get_pages(any_pool, KEY, 0, 10) == [None] * 10

    def test_a_flush_of_pages_never_put_does_nothing(self, backend: Backend, any_pool: int) -> None:
        backend.flush_page(any_pool, KEY, 0)
        backend.flush_pages(any_pool, KEY, 0, None)
        backend.flush_inode(any_pool, KEY)
        assert backend.get_page(any_pool, KEY, 0) is None

    def test_pages_can_be_put_again_after_every_kind_of_flush(
        self, backend: Backend, any_pool: int
    ) -> None:
        backend.put_page(any_pool, KEY, 0, text(0))
        backend.flush_page(any_pool, KEY, 0)
        backend.put_page(any_pool, KEY, 0, text(1))
        backend.flush_pages(any_pool, KEY, 0, None)
        backend.put_page(any_pool, KEY, 0, text(2))
        backend.flush_inode(any_pool, KEY)
        backend.put_page(any_pool, KEY, 0, text(3))
        assert backend.get_page(any_pool, KEY, 0) == text(3)

    def test_flush_fs_leaves_nothing_for_the_next_pool(self, backend: Backend, pool: int) -> None:
        other = backend.init_fs(PAGE_SIZE)
        self._put_ten(backend, pool)
        kept = self._put_ten(backend, other)
        backend.flush_fs(pool)
        new = backend.init_fs(PAGE_SIZE)
        assert new >= 0
        assert new != other
        assert backend.get_pages(new, KEY, 0, 10) == [None] * 10
        assert backend.get_pages(other, KEY, 0, 10) == kept

    def test_only_the_flush_fs_of_the_last_sharer_discards_the_pages(self, backend: Backend) -> None:
        pools = [backend.init_shared_fs(UUID_A, PAGE_SIZE) for _ in range(3)]
        pages = self._put_ten(backend, pools[0])
        backend.flush_fs(pools[0])
        backend.flush_fs(pools[1])
        assert backend.get_pages(pools[2], KEY, 0, 10) == pages
        backend.flush_fs(pools[2])
        again = backend.init_shared_fs(UUID_A, PAGE_SIZE)
        assert backend.get_pages(again, KEY, 0, 10) == [None] * 10

    # -- range forms ---------------------------------------------------------------------------

    def test_get_pages_returns_the_same_as_single_gets(self, backend: Backend, any_pool: int) -> None:
        backend.put_pages(any_pool, KEY, [(i, text(i)) for i in (9, 2, 3)])
        backend.put_page(any_pool, OTHER_KEYS[0], 4, text("other"))
        expected = [None, text(2), text(3), *[None] * 5, text(9), None]
        assert backend.get_pages(any_pool, KEY, 1, 10) == expected
        assert backend.get_pages(any_pool, KEY, 100, 2) == [None] * 2

    def test_get_pages_removes_only_those_pages_from_a_private_pool(
        self, backend: Backend, pool: int
    ) -> None:
        pages = self._put_ten(backend, pool)
        assert backend.get_pages(pool, KEY, 3, 4) == pages[3:7]
        assert backend.get_pages(pool, KEY, 0, 10) == [*pages[:3], *[None] * 4, *pages[7:]]

    # -- beyond the contract: borrowing ------------------------------------------------------------

    def borrower(self, backend: Backend) -> BorrowOps:
        """Return the backend if it can lend ranges; skip the test otherwise."""
        if not isinstance(backend, BorrowOps):
            pytest.skip("borrowing is optional")
        return backend

    def test_borrowed_pages_stay(self, backend: Backend, any_pool: int) -> None:
        pages = [text(f"page {i}") for i in range(9)]
        backend.put_pages(any_pool, KEY, list(enumerate(pages, 5)))
        for _ in range(3):
            assert self.borrower(backend).borrow_pages(any_pool, KEY, 5, 9) == b"".join(pages)
            assert self.borrower(backend).borrow_pages(any_pool, KEY, 7, 1) == pages[2]
        assert backend.get_pages(any_pool, KEY, 5, 9) == pages

    @pytest.mark.parametrize("missing", [0, 4, 8])
    def test_no_page_is_borrowed_if_one_is_missing(
        self, backend: Backend, any_pool: int, missing: int
    ) -> None:
        pages: list[bytes | None] = [None if i == missing else text(f"{i}") for i in range(9)]
        backend.put_pages(any_pool, KEY, [(i, page) for i, page in enumerate(pages) if page])
        assert self.borrower(backend).borrow_pages(any_pool, KEY, 0, 9) is None
        assert backend.get_pages(any_pool, KEY, 0, 9) == pages

    def test_nothing_is_borrowed_from_a_file_without_pages(
        self, backend: Backend, any_pool: int
    ) -> None:
        assert self.borrower(backend).borrow_pages(any_pool, KEY, 0, 9) is None

    def test_a_page_returned_by_a_get_cannot_be_borrowed_until_it_is_put_back(
        self, backend: Backend, pool: int
    ) -> None:
        backend.put_pages(pool, KEY, [(0, text("a")), (1, text("b"))])
        [page] = backend.get_pages(pool, KEY, 1, 1)
        assert page is not None
        assert self.borrower(backend).borrow_pages(pool, KEY, 0, 2) is None
        backend.put_page(pool, KEY, 1, page)
        assert self.borrower(backend).borrow_pages(pool, KEY, 0, 2) == text("a") + text("b")

    def test_a_put_and_a_flush_replace_borrowed_pages(self, backend: Backend, any_pool: int) -> None:
        backend.put_pages(any_pool, KEY, [(0, text("a")), (1, text("b"))])
        assert self.borrower(backend).borrow_pages(any_pool, KEY, 0, 2) == text("a") + text("b")
        backend.put_page(any_pool, KEY, 1, text("c"))
        assert self.borrower(backend).borrow_pages(any_pool, KEY, 0, 2) == text("a") + text("c")
        backend.flush_page(any_pool, KEY, 0)
        assert self.borrower(backend).borrow_pages(any_pool, KEY, 0, 2) is None
        assert self.borrower(backend).borrow_pages(any_pool, KEY, 1, 1) == text("c")

    def test_the_limit_can_be_read_and_changed(self, backend: Backend) -> None:
        limit = 2 * backend.pool_limit
        backend.resize(limit)
        assert backend.pool_limit == limit
        assert all(isinstance(value, int) for value in backend.counters().values())
