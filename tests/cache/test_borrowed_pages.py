"""Test reads of pages that are all in cleancache, and stay there."""

import pytest
from trio.testing import assert_no_checkpoints

from cleanfs.backends.ops import FileKey
from cleanfs.cache.cleancache import Cleancache
from tests.cache.rig import KEY, PAGE, Rig, Source, Store


class Lender(Store):
    """Implements a store that lends ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.borrowed: list[tuple[int, int]] = []
        self.lends: bytes | Exception | None = None
        """The result or error of every borrow, if set."""

    def borrow_pages(self, pool_id: int, key: FileKey, first: int, count: int) -> bytes | None:
        self.borrowed.append((first, count))
        if isinstance(self.lends, Exception):
            raise self.lends
        if self.lends is not None:
            return self.lends
        pages = [self.pages.get((key, index)) for index in range(first, first + count)]
        return None if None in pages else b"".join(page for page in pages if page is not None)


async def all_in_cleancache(store: Lender) -> Rig:
    """Make a rig whose pages have all been read and dropped from the page cache."""
    rig = Rig(64, Source(16, tail=100), store)
    await rig.read(0, 17 * PAGE)
    rig.cache.drop()
    assert len(store.pages) == 17
    store.borrowed.clear()
    return rig


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 1), (PAGE, PAGE), (0, 16 * PAGE), (0, 17 * PAGE), (PAGE, 8 * PAGE), (100, 12 * PAGE + 7)],
)
async def test_a_read_leaves_its_pages_in_cleancache(offset: int, size: int) -> None:
    store = Lender()
    rig = await all_in_cleancache(store)
    before = rig.cleancache.stats()
    reads = len(rig.source.reads)
    data = rig.source.data[offset : offset + size]
    assert await rig.read(offset, size) == data
    assert len(rig.source.reads) == reads
    assert rig.resident() == set()
    assert len(store.pages) == 17
    [(_, count)] = store.borrowed
    after = rig.cleancache.stats()
    assert after.succ_gets - before.succ_gets == after.puts - before.puts == count
    rig.check()


async def test_a_read_that_finds_some_pages_resident_borrows_none() -> None:
    store = Lender()
    rig = await all_in_cleancache(store)
    del store.pages[KEY, 3]
    await rig.read_pages(3)
    store.borrowed.clear()
    assert await rig.read(0, 16 * PAGE) == rig.source.data[: 16 * PAGE]
    assert store.borrowed == []
    assert rig.resident() == set(range(16))


async def test_a_page_missing_from_cleancache_is_read_and_the_others_are_got() -> None:
    store = Lender()
    rig = await all_in_cleancache(store)
    del store.pages[KEY, 5]
    rig.source.reads.clear()
    assert await rig.read(0, 16 * PAGE) == rig.source.data[: 16 * PAGE]
    assert rig.source.pages_read() == [5]
    assert rig.cleancache.stats().succ_gets == 15


@pytest.mark.parametrize("wrong", [b"", b"x" * (16 * PAGE - 1), ValueError("broken")])
async def test_a_failing_borrow_does_not_fail_the_read(wrong: bytes | Exception) -> None:
    store = Lender()
    rig = await all_in_cleancache(store)
    store.lends = wrong
    assert await rig.read(0, 16 * PAGE) == rig.source.data[: 16 * PAGE]
    assert rig.cleancache.stats().backend_errors == 1


async def test_an_invalidation_discards_borrowed_pages_too() -> None:
    store = Lender()
    rig = await all_in_cleancache(store)
    await rig.read(0, 16 * PAGE)
    rig.source.data[5 * PAGE] = 0
    rig.cache.invalidate(rig.file, 5 * PAGE, 5 * PAGE + 1)
    assert await rig.read(0, 16 * PAGE) == rig.source.data[: 16 * PAGE]


def test_only_a_backend_that_lends_is_asked_for_pages() -> None:
    cleancache = Cleancache()
    fs = cleancache.init_fs(PAGE)
    cleancache.register(Store())
    assert fs.borrow_pages(KEY, 0, 8) is None
    cleancache.unregister()
    lender = Lender()
    cleancache.register(lender)
    assert fs.borrow_pages(KEY, 0, 8) is None
    assert lender.borrowed == [(0, 8)]
    cleancache.unregister()
    assert fs.borrow_pages(KEY, 0, 8) is None
    assert lender.borrowed == [(0, 8)]


@pytest.mark.parametrize("pages", [1, 7, 16])
async def test_a_hit_is_not_a_checkpoint(pages: int) -> None:
    rig = await all_in_cleancache(Lender())
    expected = rig.source.data[: pages * PAGE]
    with assert_no_checkpoints():
        assert await rig.read(0, pages * PAGE) == expected
