"""A page that an exclusive get returned is revived when the same object is put back."""

import sys
from collections.abc import Callable

import pytest

from cleanfs.backends.ops import Backend
from tests.backends.engines import check, make, sync
from tests.backends.pages import KEY, MIB, PAGE_SIZE, UUID_A, halves, noise, text


@pytest.fixture(params=["python", "log"])
def engine(request: pytest.FixtureRequest) -> str:
    """Select the engines that keep poor pages: there, all kinds of pages can be on loan."""
    name: str = request.param
    return name


@pytest.fixture(params=["staged", "stored"])
def settle(request: pytest.FixtureRequest, z: Backend) -> Callable[[], None]:
    """Compress the pages that were put, or leave them in the staging area (native engine only)."""
    if request.param == "stored":
        return lambda: sync(z)
    return lambda: None


def loans(z: Backend) -> tuple[int, int]:
    """Return the number of pages on loan, and of loans that ended with the page's return."""
    counters = z.counters()
    return counters["loaned_zpages"], counters["revived_zpages"]


@pytest.mark.parametrize("page", [bytes(PAGE_SIZE), text("x"), noise(1)], ids=["same", "zpage", "raw"])
def test_the_same_page_object_is_revived(
    z: Backend, pool: int, settle: Callable[[], None], page: bytes
) -> None:
    z.put_page(pool, KEY, 0, page)
    settle()
    for times in range(1, 4):
        got = z.get_page(pool, KEY, 0)
        assert got == page
        assert loans(z) == (1, times - 1)
        assert z.get_page(pool, KEY, 0) is None
        z.put_page(pool, KEY, 0, got)
        assert loans(z) == (0, times)
        check(z)


def test_an_equal_page_is_not_the_same_object(
    z: Backend, pool: int, settle: Callable[[], None]
) -> None:
    z.put_page(pool, KEY, 0, text("x"))
    settle()
    got = z.get_page(pool, KEY, 0)
    assert sys.getrefcount(got) == 3
    z.put_page(pool, KEY, 0, text("x"))
    assert loans(z) == (0, 0)
    assert sys.getrefcount(got) == 2
    assert z.get_page(pool, KEY, 0) == text("x")


def test_the_same_object_put_at_another_handle_is_compressed_again(
    z: Backend, pool: int, settle: Callable[[], None]
) -> None:
    z.put_pages(pool, KEY, [(0, text("x")), (1, text("y"))])
    settle()
    x, y = z.get_pages(pool, KEY, 0, 2)
    assert x is not None
    assert y is not None
    z.put_pages(pool, KEY, [(0, y), (1, x)])
    assert loans(z) == (0, 0)
    assert z.get_pages(pool, KEY, 0, 2) == [y, x]


def test_a_page_on_loan_from_one_zcache_is_not_on_loan_from_another(
    engine: str, z: Backend, pool: int
) -> None:
    other = make(engine, MIB)
    other_pool = other.init_fs(PAGE_SIZE)
    z.put_page(pool, KEY, 0, text("x"))
    other.put_page(other_pool, KEY, 0, text("x"))
    page = z.get_page(pool, KEY, 0)
    assert page is not None
    other.get_page(other_pool, KEY, 0)
    other.put_page(other_pool, KEY, 0, page)
    assert loans(other) == (0, 0)
    assert loans(z) == (1, 0)


@pytest.mark.parametrize("end", ["page", "range", "file", "pool", "other put", "limit", "deleted"])
@pytest.mark.parametrize("stored", [False, True])
def test_the_end_of_a_loan_releases_the_reference(engine: str, stored: bool, end: str) -> None:
    z = make(engine, 8 * MIB)
    pool = z.init_fs(PAGE_SIZE)
    z.put_pages(pool, KEY, halves(range(150)))
    if stored:
        sync(z)
    got = z.get_pages(pool, KEY, 0, 100)
    assert loans(z) == (100, 0)
    assert {sys.getrefcount(page) for page in got} == {
        4
    }  # references: the list, the loan, page, argument
    page = got[50]
    assert page is not None
    if end == "page":
        z.flush_page(pool, KEY, 50)
    elif end == "range":
        z.flush_pages(pool, KEY, 40, None)
    elif end == "file":
        z.flush_inode(pool, KEY)
    elif end == "pool":
        z.flush_fs(pool)
    elif end == "other put":
        z.put_page(pool, KEY, 50, text("y"))
    elif end == "limit":
        z.resize(MIB)
    else:
        del z
    if end in ("page", "range", "file"):
        z.put_page(pool, KEY, 50, page)
        assert loans(z)[1] == 0
        assert z.get_page(pool, KEY, 50) == page
    del page
    ended = {"page": 1, "other put": 1, "range": 60, "limit": 68}.get(end, 100)
    counts = [sys.getrefcount(page) for page in got]
    assert counts.count(3) == ended
    assert counts.count(4) == 100 - ended


def test_loans_are_bounded_and_the_oldest_end_first(z: Backend, pool: int) -> None:
    most = z.pool_limit // 8 // PAGE_SIZE
    z.put_pages(pool, KEY, [(i, text(i)) for i in range(2 * most)])
    sync(z)
    got = [z.get_page(pool, KEY, i) for i in range(2 * most)]
    assert loans(z) == (most, 0)
    counts = [sys.getrefcount(page) for page in got]
    assert counts == [3] * most + [4] * most
    youngest, oldest = got[-1], got[0]
    assert youngest is not None
    assert oldest is not None
    z.put_page(pool, KEY, 2 * most - 1, youngest)
    assert loans(z) == (most - 1, 1)
    z.put_page(pool, KEY, 0, oldest)
    assert loans(z) == (most - 1, 1)
    assert z.get_page(pool, KEY, 0) == text(0)


def test_loans_are_bounded_within_one_get(z: Backend, pool: int) -> None:
    z.put_pages(pool, KEY, [(i, text(i)) for i in range(500)])
    sync(z)
    got = z.get_pages(pool, KEY, 0, 500)
    assert [page == text(i) for i, page in enumerate(got)] == [True] * 500
    assert loans(z) == (z.pool_limit // 8 // PAGE_SIZE, 0)


def test_a_shared_pool_makes_no_loans(z: Backend) -> None:
    pool = z.init_shared_fs(UUID_A, PAGE_SIZE)
    z.put_page(pool, KEY, 0, text("x"))
    page = z.get_page(pool, KEY, 0)
    assert loans(z) == (0, 0)
    assert sys.getrefcount(page) == 2


def test_a_page_that_is_not_on_loan_is_not_referenced(z: Backend, pool: int) -> None:
    page = text("x")
    z.put_page(pool, KEY, 0, page)
    sync(z)
    assert sys.getrefcount(page) == 2


def test_a_page_that_is_compressed_while_on_loan_can_come_back(z: Backend, pool: int) -> None:
    z.put_page(pool, KEY, 0, text("x"))
    got = z.get_page(pool, KEY, 0)
    assert got is not None
    sync(z)
    check(z)
    assert z.get_page(pool, KEY, 0) is None
    z.put_page(pool, KEY, 0, got)
    assert loans(z) == (0, 1)
    assert z.get_page(pool, KEY, 0) == text("x")


def test_a_loan_ends_before_its_page_exceeds_the_share_of_loans(engine: str) -> None:
    z = make(engine, 4 * MIB)
    pool = z.init_fs(MIB)
    z.put_page(pool, KEY, 0, text("x", MIB))
    sync(z)
    assert z.get_page(pool, KEY, 0) == text("x", MIB)
    assert z.counters()["loaned_zpages"] == 0
    check(z)
