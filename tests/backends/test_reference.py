"""The Python engine keeps the contract when its own parts fail."""

# ruff: noqa: SLF001  # the tests replace and corrupt private parts

import pytest

from cleanfs.backends import reference
from cleanfs.backends.reference import ReferenceZcache
from cleanfs.cache.cleancache import Cleancache
from tests.backends.pages import KEY, PAGE_SIZE, UUID_A, noise, text


@pytest.fixture
def engine() -> str:
    """Select the Python engine."""
    return "python"


def test_a_put_that_raises_discards_the_older_page_through_the_frontend(z: ReferenceZcache) -> None:
    cleancache = Cleancache()
    cleancache.register(z)
    fs = cleancache.init_fs(PAGE_SIZE)
    fs.put_page(KEY, 0, text("AAA"))
    fs.put_page(KEY, 0, b"short")
    assert fs.get_page(KEY, 0) is None


def test_the_limit_holds_within_one_large_put(z: ReferenceZcache, pool: int) -> None:
    peak = 0
    compress = z._compress

    def watched(page: bytes) -> bytes:
        nonlocal peak
        peak = max(peak, z.counters()["pool_used"])
        return compress(page)

    z._compress = watched
    z.put_pages(pool, KEY, [(i, text(i) if i % 2 else noise(i)) for i in range(2000)])
    assert peak <= z.pool_limit + 64 * PAGE_SIZE  # a drop of the page cache puts all pages in one call


@pytest.mark.parametrize(
    "page", [bytes(PAGE_SIZE), text("x"), noise(1)], ids=["same-filled", "zpage", "raw"]
)
def test_the_same_page_object_is_revived_without_compressing(
    z: ReferenceZcache, pool: int, monkeypatch: pytest.MonkeyPatch, page: bytes
) -> None:
    z.put_page(pool, KEY, 0, page)
    got = z.get_page(pool, KEY, 0)
    assert got is not None
    monkeypatch.setattr(z, "_encode", lambda _: pytest.fail("compressed again"))
    z.put_page(pool, KEY, 0, got)
    assert z.counters()["revived_zpages"] == 1
    assert z.counters()["loaned_zpages"] == 0
    assert z.get_page(pool, KEY, 0) == page


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("how", ["broken", "short"])
def test_a_corrupt_page_becomes_a_miss(z: ReferenceZcache, shared: bool, how: str) -> None:
    pool = z.init_shared_fs(UUID_A, PAGE_SIZE) if shared else z.init_fs(PAGE_SIZE)
    z.put_page(pool, KEY, 0, text("x"))
    [(zid, zpage)] = z._zpages.items()
    assert isinstance(zpage, bytes)
    # "short" decompresses to less than a page, without an error.
    bad = b"\xff" * len(zpage) if how == "broken" else z._compress(b"x" * 100)
    z._account(z._objects[zid >> reference.INDEX_BITS], zpage, -1)
    z._account(z._objects[zid >> reference.INDEX_BITS], bad, 1)
    z._zpages[zid] = bad
    assert z.get_page(pool, KEY, 0) is None
    assert z.counters()["corrupt_zpages"] == 1
    assert z.counters()["pool_used"] == 0
    z.put_page(pool, KEY, 0, text("y"))
    assert z.get_page(pool, KEY, 0) == text("y")


def test_a_put_that_fails_while_compressing_discards_the_older_page(
    z: ReferenceZcache, pool: int
) -> None:
    z.put_pages(pool, KEY, [(0, text("a")), (1, text("b"))])

    def failing(page: bytes) -> bytes:
        raise MemoryError

    z._compress = failing
    with pytest.raises(MemoryError):
        z.put_page(pool, KEY, 0, text("c"))
    assert z.get_pages(pool, KEY, 0, 2) == [None, text("b")]
