"""Test the page cache between a source that can be paused and a backend that records its calls."""

# ruff: noqa: SLF001  # invariants are checked on private tables

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random
from uuid import UUID

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import assert_no_checkpoints, wait_all_tasks_blocked

from cleanfs.backends import zcache
from cleanfs.backends.ops import Backend, FileKey
from cleanfs.backends.options import BackendOptions
from cleanfs.cache.cleancache import Cleancache
from cleanfs.cache.files import MIN_FILES, CachedFile, max_files
from cleanfs.cache.pagecache import PageCache
from cleanfs.cache.resident import make_resident
from cleanfs.latency import CLEANCACHE_HIT, PAGECACHE_HIT, SOURCE_READ

PAGE = 4096
COST = PAGE + make_resident(PAGE).overhead
KEY = FileKey(1, 2, b"g")


class Store:
    """Implements an exclusive backend over a dict, with a log of its calls."""

    name = "store"
    engine = "python"
    pool_limit = 1 << 30

    def __init__(self) -> None:
        self.pages: dict[tuple[FileKey, int], bytes] = {}
        self.got: list[int] = []
        self.put: list[tuple[FileKey, int]] = []
        self.flushed: list[tuple[int, int | None]] = []

    def init_fs(self, page_size: int) -> int:
        return 0

    def init_shared_fs(self, uuid: UUID, page_size: int) -> int:
        return -1

    def get_page(self, pool_id: int, key: FileKey, index: int) -> bytes | None:
        return self.get_pages(pool_id, key, index, 1)[0]

    def put_page(self, pool_id: int, key: FileKey, index: int, page: bytes) -> None:
        self.put_pages(pool_id, key, [(index, page)])

    def get_pages(self, pool_id: int, key: FileKey, first: int, count: int) -> list[bytes | None]:
        self.got += range(first, first + count)
        return [self.pages.pop((key, index), None) for index in range(first, first + count)]

    def put_pages(self, pool_id: int, key: FileKey, pages: Sequence[tuple[int, bytes]]) -> None:
        for index, page in pages:
            assert len(page) == PAGE
            self.put.append((key, index))
            self.pages[key, index] = page

    def flush_page(self, pool_id: int, key: FileKey, index: int) -> None:
        self.flush_pages(pool_id, key, index, index + 1)

    def flush_pages(self, pool_id: int, key: FileKey, start: int, stop: int | None) -> None:
        self.flushed.append((start, stop))
        for k, i in list(self.pages):
            if k == key and start <= i and (stop is None or i < stop):
                del self.pages[k, i]

    def flush_inode(self, pool_id: int, key: FileKey) -> None:
        self.flush_pages(pool_id, key, 0, None)

    def flush_fs(self, pool_id: int) -> None:
        self.pages.clear()

    def resize(self, pool_limit: int) -> None:
        raise NotImplementedError

    def counters(self) -> Mapping[str, int]:
        return {}


class Source:
    """Simulates a file of the source. Held reads wait and sample the bytes before or after that."""

    def __init__(self, pages: int, tail: int = 0) -> None:
        self.data = bytearray(
            b"".join(b"page %06d\n...." % i * 256 for i in range(pages + 1))[: pages * PAGE + tail]
        )
        self.reads: list[tuple[int, int]] = []
        self.error: OSError | None = None
        self.bad: int | None = None
        """Offset of a byte that cannot be read."""
        self.gate = trio.Event()
        self.gate.set()
        self.sample_late = False

    async def read(self, offset: int, size: int, file_size: int) -> bytes:
        assert size > 0
        self.reads.append((offset, size))
        data = bytes(self.data[offset : offset + size])
        await self.gate.wait()
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        if self.bad is not None and offset <= self.bad < offset + size:
            raise OSError(5, "bad")
        return bytes(self.data[offset : offset + size]) if self.sample_late else data

    def hold(self) -> None:
        self.gate = trio.Event()

    def release(self) -> None:
        self.gate.set()

    def pages_read(self) -> list[int]:
        return [i for at, size in self.reads for i in range(at // PAGE, -(-(at + size) // PAGE))]


class Rig:
    """Holds a page cache of ``pages`` pages with its source, cleancache and one file."""

    def __init__(
        self, pages: int, source: Source, backend: Backend | None, max_files: int = 64
    ) -> None:
        self.cleancache = Cleancache()
        if backend is not None:
            self.cleancache.register(backend)
        self.fs = self.cleancache.init_fs(PAGE)
        self.cache = PageCache(pages * COST, self.fs, make_resident(PAGE), max_files)
        self.source = source
        self.file = self.cache.file(KEY)
        self.file.pins += 1
        self.update_size()

    def update_size(self) -> None:
        """Set the size, as a new fingerprint does."""
        self.file.size = len(self.source.data)

    async def read(self, offset: int, size: int) -> bytes:
        data, _ = await self.cache.read(self.file, self.source, offset, size)
        return bytes(data)

    async def read_kind(self, offset: int, size: int) -> int:
        """Read, and return where the pages were found."""
        _, found_in = await self.cache.read(self.file, self.source, offset, size)
        return found_in

    async def read_pages(self, *indices: int) -> None:
        for index in indices:
            data = self.source.data[index * PAGE : (index + 1) * PAGE]
            assert await self.read(index * PAGE, PAGE) == data

    def resident(self) -> set[int]:
        return set(self.cache._resident.indices(self.file.serial))

    def check(self) -> None:
        cache = self.cache
        resident = sum(len(cache._resident.indices(file.serial)) for file in cache.files())
        assert len(cache._resident) == resident
        assert cache.stats().used == resident * COST <= max(cache.limit, 0)
        assert not any(file.in_flight for file in cache.files())


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


@asynccontextmanager
async def held(source: Source) -> AsyncIterator[trio.Nursery]:
    """Let reads started in the block wait for the source until the block ends."""
    source.hold()
    async with trio.open_nursery() as nursery:
        yield nursery
        await wait_all_tasks_blocked()
        source.release()


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


# -- singleflight ---------------------------------------------------------------------------------


class Readers:
    """Starts concurrent reads of a rig, and collects their results in order."""

    def __init__(self, rig: Rig, nursery: trio.Nursery) -> None:
        self._rig, self._nursery = rig, nursery
        self.results: list[bytes | OSError | None] = []

    async def start(self, offset: int, size: int) -> None:
        place = len(self.results)
        self.results.append(None)

        async def run() -> None:
            try:
                self.results[place] = await self._rig.read(offset, size)
            except OSError as exc:
                self.results[place] = exc

        self._nursery.start_soon(run)
        await wait_all_tasks_blocked()


async def test_concurrent_misses_of_one_page_share_one_read(rig: Rig) -> None:
    async with held(rig.source) as nursery:
        readers = Readers(rig, nursery)
        for _ in range(3):
            await readers.start(0, PAGE)
    assert readers.results == [bytes(rig.source.data[:PAGE])] * 3
    assert rig.source.reads == [(0, PAGE)]
    assert rig.cache.stats().shared_reads == 2


async def test_an_overlapping_read_reads_only_the_rest(rig: Rig) -> None:
    async with held(rig.source) as nursery:
        readers = Readers(rig, nursery)
        await readers.start(2 * PAGE, 2 * PAGE)
        await readers.start(100, 6 * PAGE - 200)
        await readers.start(3 * PAGE, PAGE)
    data = bytes(rig.source.data)
    assert readers.results == [
        data[2 * PAGE : 4 * PAGE],
        data[100 : 6 * PAGE - 100],
        data[3 * PAGE : 4 * PAGE],
    ]
    assert sorted(rig.source.pages_read()) == [0, 1, 2, 3, 4, 5]


async def test_an_error_reaches_every_reader_that_joined_and_is_not_kept(rig: Rig) -> None:
    async with held(rig.source) as nursery:
        readers = Readers(rig, nursery)
        await readers.start(0, PAGE)
        await readers.start(0, 2 * PAGE)
        rig.source.error = OSError(110, "timed out")
    errors = [result for result in readers.results if isinstance(result, OSError)]
    assert [error.errno for error in errors] == [110, 110]
    assert errors[0] is not errors[1]
    rig.source.error = None
    await rig.read_pages(0, 1)


@pytest.mark.parametrize(("offset", "size"), [(2 * PAGE, PAGE), (PAGE + 5, 10), (0, 2 * PAGE)])
async def test_an_error_does_not_reach_a_reader_of_other_bytes(
    rig: Rig, offset: int, size: int
) -> None:
    async with held(rig.source) as nursery:
        readers = Readers(rig, nursery)
        await readers.start(0, 4 * PAGE)
        await readers.start(offset, size)
        rig.source.bad = 3 * PAGE + 1
    assert isinstance(readers.results[0], OSError)
    assert readers.results[1] == bytes(rig.source.data[offset : offset + size])
    rig.source.bad = None
    await rig.read_pages(0, 1, 2, 3)


async def test_an_error_of_one_run_is_the_error_of_the_read(rig: Rig) -> None:
    await rig.read_pages(1)
    rig.source.error = PermissionError(13, "no")
    with pytest.raises(PermissionError):
        await rig.read(0, 3 * PAGE)


async def test_a_reader_that_joined_a_cancelled_read_gets_an_error_not_an_end_of_file(rig: Rig) -> None:
    scope = trio.CancelScope()

    async def cancelled() -> None:
        with scope:
            await rig.read(0, PAGE)

    async with held(rig.source) as nursery:
        nursery.start_soon(cancelled)
        await wait_all_tasks_blocked()
        readers = Readers(rig, nursery)
        await readers.start(0, PAGE)
        scope.cancel()
    assert scope.cancelled_caught
    assert isinstance(readers.results[0], OSError)
    await rig.read_pages(0)


# -- versions and mutations --------------------------------------------------------------------


async def test_pages_read_before_an_invalidation_are_not_inserted(rig: Rig, store: Store) -> None:
    async with held(rig.source) as nursery:
        await Readers(rig, nursery).start(0, PAGE)
        rig.cache.invalidate(rig.file, PAGE, 2 * PAGE)  # any part of the file
    assert rig.resident() == set()
    assert rig.cache.stats().stale_reads == 1
    assert store.pages == {}
    await rig.read_pages(0)
    assert len(rig.source.reads) == 2


async def test_a_read_does_not_join_a_flight_of_an_older_version(rig: Rig) -> None:
    async with held(rig.source) as nursery:
        readers = Readers(rig, nursery)
        await readers.start(0, PAGE)
        rig.source.data[:PAGE] = b"N" * PAGE
        rig.cache.invalidate(rig.file, 0, PAGE)
        await readers.start(0, PAGE)
    assert readers.results[1] == b"N" * PAGE
    assert await rig.read(0, PAGE) == b"N" * PAGE
    assert len(rig.source.reads) == 2


async def test_a_mutation_hides_the_old_pages_before_it_starts(rig: Rig, store: Store) -> None:
    await rig.read_pages(0, 1, 2, 3, 4)  # 0 is in the store, 1 to 4 are resident
    async with rig.cache.mutating(rig.file, 0, 2 * PAGE):
        rig.source.data[: 2 * PAGE] = b"N" * (2 * PAGE)
        assert await rig.read(0, 2 * PAGE) == b"N" * (2 * PAGE)
    assert await rig.read(0, 3 * PAGE) == rig.source.data[: 3 * PAGE]


async def test_a_mutation_discards_pages_read_during_it(rig: Rig) -> None:
    async with rig.cache.mutating(rig.file, 0, PAGE):
        await rig.read_pages(0)  # the old page, resident now
        rig.source.data[:PAGE] = b"N" * PAGE
    assert await rig.read(0, PAGE) == b"N" * PAGE


async def test_a_read_that_outlives_an_overlapping_mutation_inserts_nothing(rig: Rig) -> None:
    async with held(rig.source) as nursery, rig.cache.mutating(rig.file, 0, PAGE):
        await Readers(rig, nursery).start(0, PAGE)
        rig.source.data[:PAGE] = b"N" * PAGE
    assert rig.resident() == set()
    assert await rig.read(0, PAGE) == b"N" * PAGE


async def test_a_mutation_that_fails_invalidates_as_well(rig: Rig) -> None:
    async def failing() -> None:
        async with rig.cache.mutating(rig.file, 0, PAGE):
            await rig.read_pages(0)
            rig.source.data[:10] = b"N" * 10
            raise OSError(28, "full")

    with pytest.raises(OSError, match="full"):
        await failing()
    await rig.read_pages(0)
    assert rig.file.mutations == 0


async def test_mutations_of_one_file_take_turns_and_pin_it(rig: Rig) -> None:
    order = []

    async def mutate(name: str) -> None:
        async with rig.cache.mutating(rig.file):
            order.append(name)
            assert rig.file.mutations == 1
            assert rig.file.pins > 1
            await trio.lowlevel.checkpoint()
            order.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(mutate, "a")
        nursery.start_soon(mutate, "b")
    assert order in (["a", "a", "b", "b"], ["b", "b", "a", "a"])
    assert rig.file.mutations == 0


@pytest.mark.parametrize(
    ("start", "stop", "gone"),
    [
        (0, None, {0, 1, 2, 3, 9}),
        (0, 1, {0}),
        (4095, 4097, {0, 1}),
        (4096, 8192, {1}),
        (2 * PAGE, None, {2, 3, 9}),
        (2 * PAGE - 1, None, {1, 2, 3, 9}),
        (PAGE, 1 << 62, {1, 2, 3, 9}),
        (PAGE, 9 * PAGE, {1, 2, 3}),
        (PAGE, 9 * PAGE + 1, {1, 2, 3, 9}),
        (20 * PAGE, None, set()),
        (PAGE, PAGE, set()),
    ],
)
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "cleancache"])
async def test_an_invalidation_discards_every_page_it_touches_and_no_other(
    store: Store, start: int, stop: int | None, gone: set[int], resident: bool
) -> None:
    rig = Rig(8 if resident else 0, Source(16), store)
    await rig.read_pages(0, 1, 2, 3, 9)
    version = rig.file.version
    rig.cache.invalidate(rig.file, start, stop)
    assert rig.resident() | {i for _, i in store.pages} == {0, 1, 2, 3, 9} - gone
    assert rig.file.version > version
    rig.check()


async def test_an_invalidation_leaves_other_files_alone(rig: Rig, store: Store) -> None:
    other = rig.cache.file(FileKey(1, 3, b""))
    other.size = PAGE
    await rig.cache.read(other, rig.source, 0, PAGE)
    await rig.read_pages(0)
    version = other.version
    rig.cache.invalidate(rig.file)
    assert rig.cache._resident.indices(other.serial) == [0]
    assert other.version == version


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


# -- records of files -----------------------------------------------------------------------------


def key(i: int) -> FileKey:
    return FileKey(5, i, b"")


async def test_a_key_has_one_record(rig: Rig) -> None:
    assert rig.cache.known(key(1)) is None
    file = rig.cache.file(key(1))
    assert rig.cache.file(key(1)) is file is rig.cache.known(key(1))


def test_the_number_of_records_follows_from_the_pool_limit() -> None:
    assert max_files(1 << 20) == MIN_FILES
    assert max_files(512 << 20) == 131_072


@pytest.mark.parametrize("max_files", [1, 8, 64])
async def test_records_are_bounded_and_the_least_recently_used_is_dropped(
    store: Store, max_files: int
) -> None:
    rig = Rig(4, Source(16), store, max_files)
    rig.file.pins = 0
    for i in range(200):
        rig.cache.file(key(i))
    assert rig.cache.stats().files <= max_files
    assert rig.cache.known(key(199)) is not None
    assert rig.cache.known(key(0)) is None


async def test_a_dropped_record_flushes_its_pages(store: Store) -> None:
    rig = Rig(2, Source(16), store, max_files=16)
    await rig.read_pages(0, 1, 2)
    rig.file.pins = 0
    for i in range(16):
        rig.cache.file(key(i))
    assert rig.cache.known(KEY) is None
    assert store.pages == {}
    assert rig.cache.stats().resident == 0
    rig.check()


async def test_a_record_in_use_is_not_dropped(store: Store) -> None:
    rig = Rig(4, Source(16), store, max_files=16)
    await rig.read_pages(0)
    used = rig.cache.file(key(0))
    for i in range(1, 100):
        rig.cache.file(key(i))
        rig.cache.file(key(0))  # used again and again
    assert rig.cache.known(KEY) is rig.file  # pinned
    assert rig.resident() == {0}
    assert rig.cache.known(key(0)) is used
    assert rig.cache.known(key(50)) is None


async def test_a_removed_file_is_flushed_and_its_record_dropped(rig: Rig, store: Store) -> None:
    await rig.read_pages(0, 1, 2, 3, 4)
    rig.cache.forget(rig.file)
    assert store.pages == {}
    assert rig.resident() == set()
    assert rig.cache.known(KEY) is rig.file  # pinned: still readable through open fds
    await rig.read_pages(0)
    rig.file.pins = 0
    rig.cache.forget(rig.file)
    assert rig.cache.known(KEY) is None
    assert rig.cache.stats().resident == 0
    rig.file.pins = 1


async def test_a_read_in_progress_pins_the_record(rig: Rig) -> None:
    rig.file.pins = 0
    async with held(rig.source) as nursery:
        await Readers(rig, nursery).start(0, PAGE)
        assert rig.file.pins == 1
        rig.cache.forget(rig.file)
        assert rig.cache.known(KEY) is rig.file
    assert rig.file.pins == 0
    rig.file.pins = 1


# -- against a bytearray ----------------------------------------------------------------------------

SIZE = 6 * PAGE
OFFSETS = st.integers(0, SIZE) | st.sampled_from([i * PAGE + d for i in range(6) for d in (-1, 0, 1)])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["read", "read", "write", "truncate", "source change", "drop", "resize"]),
        OFFSETS.map(lambda offset: max(offset, 0)),
        st.integers(1, 2 * PAGE),
    ),
    max_size=40,
)


@pytest.mark.parametrize("backend", [True, False])
@given(pages=st.integers(0, 4), tail=st.integers(0, PAGE - 1), steps=STEPS)
@settings(max_examples=150, deadline=None)
def test_reads_match_a_bytearray(
    backend: bool, pages: int, tail: int, steps: list[tuple[str, int, int]]
) -> None:
    async def run() -> None:
        source = Source(3, tail)
        rig = Rig(pages, source, zcache.make(BackendOptions(1 << 20)) if backend else None)
        for action, offset, size in steps:
            if action == "read":
                expected = source.data[offset : offset + size]
                assert await rig.read(offset, size) == expected
            elif action == "write":
                async with rig.cache.mutating(rig.file, offset, offset + size):
                    source.data.extend(bytes(max(0, offset - len(source.data))))
                    source.data[offset : offset + size] = bytes([size % 256]) * size
                    rig.update_size()
            elif action == "truncate":
                async with rig.cache.mutating(rig.file, min(offset, rig.file.size)):
                    del source.data[offset:]
                    source.data.extend(bytes(offset - len(source.data)))
                    rig.update_size()
            elif action == "source change":
                source.data[:] = bytes([offset % 256]) * size
                rig.cache.invalidate(rig.file)
                rig.update_size()
            elif action == "drop":
                rig.cache.drop()
            else:
                rig.cache.resize(size * 3)
            rig.check()

    trio.run(run)


BLOCK = 1024


class History:
    """Records the values of each block of a file, and until when a reader may have seen them.

    A write counts from the moment it reaches the source. The value that it replaces may be seen until
    the write has returned.
    """

    def __init__(self, blocks: int) -> None:
        self.now = 0
        self._values: list[list[tuple[int, int, float]]] = [
            [(0, 0, float("inf"))] for _ in range(blocks)
        ]

    def wrote(self, block: int, value: int) -> None:
        self._values[block].append((value, self.now, float("inf")))

    def settle(self, block: int) -> None:
        """End the period in which values before the last write may be seen."""
        values = self._values[block]
        values[:-1] = [(value, start, min(end, self.now)) for value, start, end in values[:-1]]

    def allowed(self, block: int, since: int) -> set[int]:
        return {
            value for value, start, end in self._values[block] if end >= since and start <= self.now
        }


@given(seed=st.integers(0, 2**32), pages=st.integers(0, 6), backend=st.booleans())
@settings(max_examples=200, deadline=None)
def test_concurrent_reads_never_return_values_overwritten_before_they_began(
    seed: int, pages: int, backend: bool
) -> None:
    rng = Random(seed)
    blocks = SIZE // BLOCK

    async def yield_some_times() -> None:
        for _ in range(rng.randrange(4)):
            await trio.lowlevel.checkpoint()

    async def run() -> None:
        source = Source(6)
        source.data[:] = bytes(SIZE)
        rig = Rig(pages, source, zcache.make(BackendOptions(1 << 20)) if backend else None)
        history = History(blocks)

        class SlowSource:
            async def read(self, offset: int, size: int, file_size: int) -> bytes:
                await yield_some_times()
                data = bytes(source.data[offset : offset + size])
                await yield_some_times()
                return data

        async def reader() -> None:
            for _ in range(15):
                first = rng.randrange(blocks)
                count = rng.randrange(1, blocks - first + 1)
                history.now += 1
                since = history.now
                found, _ = await rig.cache.read(rig.file, SlowSource(), first * BLOCK, count * BLOCK)
                data = bytes(found)
                history.now += 1
                assert len(data) == count * BLOCK
                for i in range(count):
                    assert data[i * BLOCK] in history.allowed(first + i, since)
                    assert len(set(data[i * BLOCK : (i + 1) * BLOCK])) == 1
                await yield_some_times()

        async def writer(values: Iterator[int]) -> None:
            for _ in range(8):
                first = rng.randrange(blocks)
                stop = rng.randrange(first, blocks) + 1
                value = next(values)
                async with rig.cache.mutating(rig.file, first * BLOCK, stop * BLOCK):
                    await yield_some_times()
                    history.now += 1
                    source.data[first * BLOCK : stop * BLOCK] = bytes([value]) * (
                        (stop - first) * BLOCK
                    )
                    for block in range(first, stop):
                        history.wrote(block, value)
                    await yield_some_times()
                history.now += 1
                for block in range(first, stop):
                    history.settle(block)
                history.now += 1
                await yield_some_times()
                if rng.random() < 0.2:
                    rig.cache.drop()

        values = iter(range(1, 256))
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(reader)
            for _ in range(2):
                nursery.start_soon(writer, values)
        rig.check()

    trio.run(run)


def test_a_new_file_record_is_empty() -> None:
    file = CachedFile(KEY, 1)
    assert (file.size, file.fingerprint, file.pins, file.in_flight) == (0, None, 0, [])


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
    ("offset", "size"), [(0, 16 * PAGE), (0, 17 * PAGE), (PAGE, 8 * PAGE), (100, 12 * PAGE + 7)]
)
async def test_a_large_read_leaves_its_pages_in_cleancache(offset: int, size: int) -> None:
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


async def test_a_small_read_makes_its_pages_resident() -> None:
    store = Lender()
    rig = await all_in_cleancache(store)
    await rig.read(0, 7 * PAGE)
    assert store.borrowed == []
    assert rig.resident() == set(range(7))


async def test_a_read_that_finds_some_pages_resident_borrows_none() -> None:
    store = Lender()
    rig = await all_in_cleancache(store)
    await rig.read_pages(3)
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
    for _ in ("from cleancache", "from the page cache, if it was small"):
        with assert_no_checkpoints():
            assert await rig.read(0, pages * PAGE) == expected
