"""Test hits, evictions, ends of files and limits of the page cache."""

import pytest
from trio.testing import wait_all_tasks_blocked

from cleanfs.backends.ops import FileKey
from cleanfs.latency import CLEANCACHE_HIT, PAGECACHE_HIT, SOURCE_READ
from tests.cache.rig import COST, KEY, PAGE, Rig, Source, Store, held

# -- hits, gets, evictions ------------------------------------------------------------------------


async def test_a_hit_asks_neither_cleancache_nor_source(rig: Rig, store: Store) -> None:
    await rig.read_pages(0, 1)
    del rig.source.reads[:], store.got[:]
    assert await rig.read(100, 5000) == rig.source.data[100:5100]
    assert rig.source.reads == []
    assert store.got == []
    stats = rig.cache.stats()
    assert (stats.hits, stats.misses, stats.resident) == (2, 2, 2)


async def test_cleancache_is_asked_before_the_source(rig: Rig, store: Store) -> None:
    for i in (1, 2, 5):
        store.pages[KEY, i] = b"%d" % i * PAGE  # differs from the source
    data = await rig.read(0, 4 * PAGE)
    assert (
        data
        == rig.source.data[:PAGE] + b"1" * PAGE + b"2" * PAGE + rig.source.data[3 * PAGE : 4 * PAGE]
    )
    assert store.got == [0, 1, 2, 3]
    assert sorted(rig.source.reads) == [(0, PAGE), (3 * PAGE, PAGE)]
    assert rig.resident() == {0, 1, 2, 3}
    assert set(store.pages) == {(KEY, 5)}


async def test_only_missing_pages_are_requested_in_runs(rig: Rig, store: Store) -> None:
    await rig.read_pages(1, 3)
    del rig.source.reads[:], store.got[:]
    await rig.read(0, 6 * PAGE)
    assert store.got == [0, 2, 4, 5]
    assert sorted(rig.source.reads) == [(0, PAGE), (2 * PAGE, PAGE), (4 * PAGE, 2 * PAGE)]


async def test_exactly_the_evicted_pages_are_put(rig: Rig, store: Store) -> None:
    await rig.read_pages(0, 1, 2, 3, 4, 5)
    assert store.put == [(KEY, 0), (KEY, 1)]
    assert store.pages == {(KEY, i): rig.source.data[i * PAGE : (i + 1) * PAGE] for i in (0, 1)}
    assert rig.resident() == {2, 3, 4, 5}
    assert rig.cache.stats().evictions == 2


async def test_evicted_pages_of_several_files_are_put_under_their_own_keys(
    rig: Rig, store: Store
) -> None:
    other = rig.cache.file(FileKey(9, 9, b""))
    other.size = 2 * PAGE
    await rig.read_pages(0)
    await rig.cache.read(other, rig.source, PAGE, PAGE)
    await rig.read_pages(1)
    rig.cache.drop()
    assert store.put == [(KEY, 0), (other.key, 1), (KEY, 1)]


async def test_a_page_is_in_one_cache_at_most(rig: Rig, store: Store) -> None:
    for index in [0, 1, 2, 3, 4, 5, 0, 1, 7, 2, 9, 0, 3, 3, 1]:
        await rig.read_pages(index)
        assert not rig.resident() & {i for _, i in store.pages}
    assert len(rig.source.reads) == len({0, 1, 2, 3, 4, 5, 7, 9})


async def test_a_read_larger_than_the_cache_is_complete(rig: Rig) -> None:
    assert await rig.read(0, 16 * PAGE) == rig.source.data
    assert len(rig.resident()) == 4
    assert await rig.read(0, 16 * PAGE) == rig.source.data
    assert rig.source.reads == [(0, 16 * PAGE)]


async def test_a_read_returns_where_it_found_its_pages(rig: Rig, store: Store) -> None:
    kinds = []

    async def read(first: int, count: int) -> None:
        kinds.append(await rig.read_kind(first * PAGE, count * PAGE))

    await read(0, 2)
    await read(0, 2)
    store.pages[KEY, 2] = b"2" * PAGE
    await read(1, 2)  # one page from either cache
    await read(1, 2)
    store.pages[KEY, 4] = b"4" * PAGE
    await read(2, 3)  # and one from the source in between
    await read(16, 1)  # past the end
    expected = [SOURCE_READ, PAGECACHE_HIT, CLEANCACHE_HIT, PAGECACHE_HIT, SOURCE_READ, SOURCE_READ]
    assert kinds == expected


async def test_overlapping_reads_do_not_mix_up_where_pages_were_found(rig: Rig) -> None:
    kinds: dict[str, int] = {}

    async def read(name: str, index: int) -> None:
        kinds[name] = await rig.read_kind(index * PAGE, PAGE)

    await read("before", 0)
    async with held(rig.source) as nursery:
        nursery.start_soon(read, "own", 1)
        await wait_all_tasks_blocked()
        nursery.start_soon(read, "joined", 1)
        await wait_all_tasks_blocked()
        await read("hit meanwhile", 0)
    assert kinds == {
        "before": SOURCE_READ,
        "hit meanwhile": PAGECACHE_HIT,
        "own": SOURCE_READ,
        "joined": SOURCE_READ,
    }


# -- ends of files ----------------------------------------------------------------------------


async def test_the_last_page_is_stored_padded_and_returned_clipped(store: Store) -> None:
    rig = Rig(4, Source(1, tail=904), store)
    data = rig.source.data
    for _ in range(2):  # from the source, then from the cache
        assert await rig.read(0, 8 * PAGE) == data
        assert await rig.read(PAGE, PAGE) == data[PAGE:]
        assert await rig.read(4999, 100) == data[4999:]
        assert await rig.read(10, 4990) == data[10:]
    rig.cache.drop()
    assert store.pages[KEY, 1] == data[PAGE:].ljust(PAGE, b"\0")
    assert await rig.read(0, 8 * PAGE) == data


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097])
async def test_files_around_one_page_are_read_to_the_byte(store: Store, size: int) -> None:
    rig = Rig(4, Source(0, tail=size), store)
    for _ in range(2):
        for offset, count in ((0, 1), (0, 8192), (size - 1, 1), (size - 1, 100), (0, size)):
            assert await rig.read(offset, count) == rig.source.data[offset : offset + count]


async def test_a_read_past_the_known_end_asks_the_source(rig: Rig) -> None:
    assert await rig.read(16 * PAGE, PAGE) == b""
    rig.source.data += b"grown"
    assert await rig.read(16 * PAGE, PAGE) == b"grown"
    assert rig.resident() == set()


async def test_a_file_of_unknown_size_goes_to_the_source_each_time(rig: Rig, store: Store) -> None:
    rig.file.size = 0
    for _ in range(2):
        assert await rig.read(0, PAGE) == rig.source.data[:PAGE]
    assert len(rig.source.reads) == 2
    assert store.got == []


async def test_pages_that_a_shrunk_source_cut_off_are_not_kept(rig: Rig) -> None:
    del rig.source.data[PAGE + 100 :]
    await rig.read(0, 4 * PAGE)
    assert rig.resident() == {0}


@pytest.mark.parametrize("left", [0, 100, PAGE, PAGE + 100])
async def test_a_reply_ends_where_the_source_ended(rig: Rig, left: int) -> None:
    del rig.source.data[left:]
    assert await rig.read(0, 4 * PAGE) == rig.source.data  # without zeros that it never contained


async def test_a_gap_in_the_source_ends_the_reply_though_later_pages_are_resident(rig: Rig) -> None:
    await rig.read_pages(2)
    del rig.source.data[PAGE:]
    assert await rig.read(0, 3 * PAGE) == rig.source.data


# -- operator's control ---------------------------------------------------------------------------


async def test_with_limit_0_every_page_goes_through_cleancache(store: Store) -> None:
    rig = Rig(0, Source(16), store)
    for _ in range(3):
        await rig.read_pages(0, 1)
        assert rig.resident() == set()
        assert {i for _, i in store.pages} == {0, 1}
    assert len(rig.source.reads) == 2
    rig.check()


async def test_with_limit_0_and_no_backend_nothing_is_kept() -> None:
    rig = Rig(0, Source(16), None)
    for _ in range(3):
        await rig.read_pages(0)
    assert len(rig.source.reads) == 3
    assert rig.cache.stats().evictions == 0
    rig.check()


async def test_without_a_backend_the_page_cache_still_works() -> None:
    rig = Rig(2, Source(16), None)
    await rig.read_pages(0, 1, 1, 2, 1)
    assert len(rig.source.reads) == 3
    rig.check()


async def test_resize_evicts_at_once_and_a_larger_limit_is_used(rig: Rig, store: Store) -> None:
    await rig.read_pages(0, 1, 2, 3)
    rig.cache.resize(2 * COST)
    assert rig.cache.limit == 2 * COST
    assert rig.resident() == {2, 3}
    assert store.put == [(KEY, 0), (KEY, 1)]
    rig.cache.resize(8 * COST)
    await rig.read_pages(0, 1, 4, 5, 6, 7)
    assert len(rig.resident()) == 8


@pytest.mark.parametrize(("limit", "pages"), [(COST - 1, 0), (COST, 1), (2 * COST - 1, 1), (1, 0)])
async def test_the_limit_counts_whole_pages_with_their_overhead(
    rig: Rig, limit: int, pages: int
) -> None:
    rig.cache.resize(limit)
    await rig.read_pages(0, 1, 2)
    assert len(rig.resident()) == pages


async def test_drop_evicts_all_into_cleancache_and_keeps_the_limit(rig: Rig, store: Store) -> None:
    await rig.read_pages(0, 1, 2)
    rig.cache.drop()
    assert rig.resident() == set()
    assert {i for _, i in store.pages} == {0, 1, 2}
    assert rig.cache.limit == 4 * COST
    await rig.read_pages(0, 1, 2)
    assert len(rig.source.reads) == 3
