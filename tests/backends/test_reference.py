"""zcache in Python: the contract, and what is its own: the limit, poor pages, loans, counters."""

# ruff: noqa: SLF001  the books are checked against what they are about

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from cleanfs import backends
from cleanfs.backends import reference, zcache
from cleanfs.backends.options import BackendOptions
from cleanfs.backends.reference import ENTRY_BYTES, LOAN_SHARE, MIN_POOL_LIMIT, ReferenceZcache
from cleanfs.cleancache import Cleancache
from cleanfs.ops import Backend, FileKey
from tests.backends.conformance import (
    KEY,
    OTHER_KEYS,
    PAGE_SIZE,
    UUID_A,
    BackendConformance,
    noise,
    text,
)
from tests.backends.machine import MIB, ZcacheMachine, same

ZERO = bytes(PAGE_SIZE)
LOAN_ROOM = LOAN_SHARE * MIN_POOL_LIMIT / PAGE_SIZE
"""Pages that can be on loan at the smallest limit."""


def recomputed_use(z: ReferenceZcache) -> int:
    """Bytes that count against the limit, from the tables."""
    kept = [*z._zpages.values(), *z._raw.values(), *(zpage for zpage, _ in z._loans.values())]
    lent = sum(len(page) for _, page in z._loans.values())
    return sum(map(reference._cost, kept)) + lent + reference.OBJECT_BYTES * len(z._objects)


def check_books(z: ReferenceZcache) -> None:
    """The invariants that the code states, and every gauge against the tables."""
    queues: list[dict[int, Any]] = [z._zpages, z._raw, z._loans]
    ids = [zid for queue in queues for zid in queue]
    assert len(ids) == len(set(ids))
    assert sorted(ids) == sorted(zid for obj in z._objects.values() for zid in obj.ids)
    assert all(obj.ids for obj in z._objects.values()), "an object without pages"
    by_pool = [obj for pool in z._pools.values() for obj in pool.objects.values()]
    assert {id(obj) for obj in by_pool} == {id(obj) for obj in z._objects.values()}
    for serial, obj in z._objects.items():
        assert all(zid >> reference.INDEX_BITS == serial for zid in obj.ids)
    counters = z.counters()
    assert counters["pool_used"] == recomputed_use(z) <= z.pool_limit
    lent = sum(len(page) for _, page in z._loans.values())
    assert z._loan_bytes == lent <= z.pool_limit * LOAN_SHARE
    kept = [*z._zpages.values(), *z._raw.values(), *(zpage for zpage, _ in z._loans.values())]
    assert counters["eph_zbytes"] == sum(len(zpage) for zpage in kept if isinstance(zpage, bytes))
    assert counters["eph_zpages"] == len(z._zpages) + len(z._raw)
    assert counters["raw_pages"] == len(z._raw)
    assert counters["loaned_zpages"] == len(z._loans)
    assert counters["obj_count"] == len(z._objects)
    assert counters["same_filled_pages"] == sum(isinstance(zpage, int) for zpage in kept)
    assert counters["zero_filled_pages"] == kept.count(0)


@pytest.fixture
def z() -> Iterator[ReferenceZcache]:
    """A zcache whose books must balance when the test is over."""
    made = ReferenceZcache(BackendOptions(MIB))
    yield made
    check_books(made)


@pytest.fixture
def pool(z: ReferenceZcache) -> int:
    return z.init_fs(PAGE_SIZE)


class TestConformance(BackendConformance):
    """The contract."""

    def make(self) -> Backend:
        return ReferenceZcache(BackendOptions(16 * MIB))

    def fill(self, backend: Backend, pool_id: int) -> None:
        backend.resize(MIN_POOL_LIMIT)
        pages = [(i, same(i + 1)) for i in range(MIN_POOL_LIMIT // ENTRY_BYTES)]
        backend.put_pages(pool_id, FileKey(9, 9, b""), pages)


def test_it_is_found_by_name() -> None:
    assert "zcache" in backends.names()
    made = backends.load("zcache")(BackendOptions(MIB, "lz4hc:3"))
    assert (made.name, made.engine, made.pool_limit) == ("zcache", zcache.engine_name(), MIB)
    with pytest.raises(backends.UnknownBackendError, match=r"nosuch.*zcache"):
        backends.load("nosuch")


# -- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [-1, 0, MIN_POOL_LIMIT - 1])
def test_a_limit_that_is_too_small_is_refused_and_changes_nothing(
    z: ReferenceZcache, pool: int, limit: int
) -> None:
    z.put_page(pool, KEY, 0, text("a"))
    with pytest.raises(ValueError, match="limit"):
        z.resize(limit)
    with pytest.raises(ValueError, match="limit"):
        ReferenceZcache(BackendOptions(limit))
    assert z.pool_limit == MIB
    assert z.get_page(pool, KEY, 0) == text("a")


def test_an_unknown_compression_is_refused() -> None:
    with pytest.raises(ValueError, match="compression"):
        ReferenceZcache(BackendOptions(MIB, "zip"))


@pytest.mark.parametrize(
    "options",
    [
        BackendOptions(MIB, "zstd"),
        BackendOptions(MIB, "zstd:3+dict"),
        BackendOptions(MIB, "none"),
        BackendOptions(MIB, allocator="zbud"),
        BackendOptions(MIB, poor="refuse"),
        BackendOptions(MIB, admission="was-active"),
    ],
)
def test_what_the_python_engine_can_not_do_is_refused(options: BackendOptions) -> None:
    with pytest.raises(ValueError, match="needs the native engine"):
        ReferenceZcache(options)


def test_options_that_say_what_the_python_engine_does_are_fine() -> None:
    ReferenceZcache(BackendOptions(MIB, "lz4hc:3", "log", "keep", "all", checksum=False))


@pytest.mark.parametrize("page_size", [-4096, 0, 1, 2048, 4095, 4097, 3 * 4096, 2 * MIB])
def test_page_sizes_that_are_no_power_of_two_in_range_are_refused(
    z: ReferenceZcache, page_size: int
) -> None:
    assert z.init_fs(page_size) < 0
    assert z.init_shared_fs(UUID_A, page_size) < 0


@pytest.mark.parametrize("page", [b"", text("x")[:-1], text("x") + b"y"])
def test_a_page_of_the_wrong_size_is_refused(z: ReferenceZcache, pool: int, page: bytes) -> None:
    with pytest.raises(ValueError, match="4096"):
        z.put_pages(pool, KEY, [(0, text("a")), (1, page)])
    assert z.counters()["obj_count"] == 0


def test_a_put_that_raises_discards_the_older_page_through_the_frontend(z: ReferenceZcache) -> None:
    cleancache = Cleancache()
    cleancache.register(z)
    fs = cleancache.init_fs(PAGE_SIZE)
    fs.put_page(KEY, 0, text("AAA"))
    fs.put_page(KEY, 0, b"short")
    assert fs.get_page(KEY, 0) is None


def test_pool_ids_are_never_used_again(z: ReferenceZcache) -> None:
    seen = set()
    for _ in range(5):
        pool = z.init_fs(PAGE_SIZE)
        assert pool not in seen
        seen.add(pool)
        z.flush_fs(pool)


# -- the limit ----------------------------------------------------------------------------------


def kept(z: ReferenceZcache, pool: int, indices: range, key: FileKey = KEY) -> set[int]:
    """Which pages a get would find, without getting them."""
    obj = z._pools[pool].objects.get(key)
    base = obj.base if obj else 0
    return {i for i in indices if base + i in z._zpages or base + i in z._raw}


def test_the_oldest_put_goes_first(z: ReferenceZcache, pool: int) -> None:
    n = MIB // ENTRY_BYTES
    for i in range(n + 100):
        z.put_page(pool, KEY, i, same(i))
    evicted = z.counters()["evicted_eph_zpages"]
    assert 100 <= evicted < 110
    assert kept(z, pool, range(n + 100)) == set(range(evicted, n + 100))


def test_a_page_that_was_put_again_is_young(z: ReferenceZcache, pool: int) -> None:
    n = (MIB - reference.OBJECT_BYTES) // ENTRY_BYTES
    z.put_pages(pool, KEY, [(i, same(i)) for i in range(n)])
    z.put_page(pool, KEY, 0, same(77))
    for i in range(n, n + 3):
        z.put_page(pool, KEY, i, same(i))
    assert kept(z, pool, range(n + 3)) == {0, *range(4, n + 3)}


def test_a_hit_on_a_shared_pool_makes_the_page_young(z: ReferenceZcache) -> None:
    pool = z.init_shared_fs(UUID_A, PAGE_SIZE)
    n = (MIB - reference.OBJECT_BYTES) // ENTRY_BYTES
    z.put_pages(pool, KEY, [(i, same(i)) for i in range(n)])
    assert z.get_page(pool, KEY, 0) == same(0)
    for i in range(n, n + 3):
        z.put_page(pool, KEY, i, same(i))
    assert kept(z, pool, range(n + 3)) == {0, *range(4, n + 3)}


def test_one_queue_spans_all_pools(z: ReferenceZcache, pool: int) -> None:
    other = z.init_fs(PAGE_SIZE)
    z.put_page(pool, KEY, 0, same(1))
    z.put_pages(other, KEY, [(i, same(i)) for i in range(MIB // ENTRY_BYTES)])
    assert z.get_page(pool, KEY, 0) is None


def test_a_lower_limit_evicts_at_once(z: ReferenceZcache, pool: int) -> None:
    z.resize(4 * MIB)
    z.put_pages(pool, KEY, [(i, text(i)) for i in range(1500)])
    z.put_pages(pool, OTHER_KEYS[0], [(i, noise(i)) for i in range(300)])
    z.get_pages(pool, KEY, 0, 50)
    assert z.counters()["pool_used"] > MIB
    z.resize(MIB)
    check_books(z)
    assert z.pool_limit == z.counters()["pool_limit"] == MIB


def test_a_higher_limit_is_used(z: ReferenceZcache, pool: int) -> None:
    z.resize(4 * MIB)
    z.put_pages(pool, KEY, [(i, noise(i)) for i in range(800)])
    assert z.counters()["eph_zpages"] == 800


def test_the_limit_holds_within_one_large_put(z: ReferenceZcache, pool: int) -> None:
    peak = 0
    compress = z._compress

    def watched(page: bytes) -> bytes:
        nonlocal peak
        peak = max(peak, z.counters()["pool_used"])
        return compress(page)

    z._compress = watched
    z.put_pages(pool, KEY, [(i, text(i) if i % 2 else noise(i)) for i in range(2000)])
    assert peak <= MIB + 64 * PAGE_SIZE  # a page cache that is dropped puts all of it in one call


def test_many_small_files_stay_within_the_limit(z: ReferenceZcache, pool: int) -> None:
    for i in range(3000):
        z.put_page(pool, FileKey(1, i, b""), 0, same(i))
        assert z.counters()["pool_used"] <= MIB
    assert z.counters()["obj_count"] * (ENTRY_BYTES + 600) < MIB


# -- poor and same-filled pages -------------------------------------------------------------------


def test_a_poor_page_is_kept_raw_while_there_is_room(z: ReferenceZcache, pool: int) -> None:
    z.put_page(pool, KEY, 0, noise(1))
    assert z.counters()["raw_pages"] == z.counters()["compress_poor"] == 1
    assert z.get_page(pool, KEY, 0) == noise(1)


@pytest.mark.parametrize(("random_bytes", "raw"), [(3400, 0), (3800, 1)])
def test_poor_is_what_takes_more_than_seven_eighths(
    z: ReferenceZcache, pool: int, random_bytes: int, raw: int
) -> None:
    z.put_page(pool, KEY, 0, noise(1)[:random_bytes].ljust(PAGE_SIZE, b"\0"))
    assert z.counters()["raw_pages"] == raw


def test_a_poor_page_never_displaces_a_compressed_one(z: ReferenceZcache, pool: int) -> None:
    z.put_pages(pool, KEY, [(i, same(i)) for i in range(MIB // ENTRY_BYTES)])
    before = z.counters()["eph_zpages"]
    for i in range(10):
        z.put_page(pool, OTHER_KEYS[0], i, noise(i))
    assert z.counters()["eph_zpages"] == before
    assert z.counters()["failed_eph_puts"] == 10


def test_raw_pages_are_eaten_before_older_compressed_ones(z: ReferenceZcache, pool: int) -> None:
    z.put_page(pool, KEY, 0, text("old"))
    z.put_pages(pool, OTHER_KEYS[0], [(i, noise(i)) for i in range(300)])
    c = z.counters()
    assert c["evicted_raw_pages"] + c["raw_pages"] == 300
    oldest = c["evicted_raw_pages"]
    assert oldest > 0
    assert kept(z, pool, range(300), OTHER_KEYS[0]) == set(range(oldest, 300))
    z.put_pages(pool, OTHER_KEYS[1], [(i, same(i)) for i in range(3000)])
    assert kept(z, pool, range(1)) == {0}
    assert z.counters()["evicted_eph_zpages"] == 0


@pytest.mark.parametrize("word", [0, 1, 0xFF, 0x0102030405060708, (1 << 64) - 1])
def test_a_same_filled_page_is_kept_as_its_word(z: ReferenceZcache, pool: int, word: int) -> None:
    z.put_page(pool, KEY, 0, same(word))
    c = z.counters()
    assert (c["same_filled_pages"], c["zero_filled_pages"], c["eph_zbytes"]) == (1, word == 0, 0)
    assert z.get_page(pool, KEY, 0) == same(word)


@pytest.mark.parametrize("at", [0, 7, 8, 15, 16, 2048, 4088, 4095])
def test_a_page_with_one_other_byte_is_not_same_filled(z: ReferenceZcache, pool: int, at: int) -> None:
    page = ZERO[:at] + b"x" + ZERO[at + 1 :]
    z.put_page(pool, KEY, 0, page)
    assert z.counters()["same_filled_pages"] == 0
    assert z.get_page(pool, KEY, 0) == page


# -- loans --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [ZERO, text("x"), noise(1)], ids=["same-filled", "zpage", "raw"])
def test_the_very_page_handed_out_is_revived_without_compressing(
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


def test_an_equal_page_is_not_the_very_page(z: ReferenceZcache, pool: int) -> None:
    z.put_page(pool, KEY, 0, text("x"))
    assert z.get_page(pool, KEY, 0) == text("x")
    z.put_page(pool, KEY, 0, text("x"))
    assert z.counters()["revived_zpages"] == 0
    assert z.counters()["loaned_zpages"] == 0


def test_the_very_page_put_at_another_handle_is_compressed_anew(z: ReferenceZcache, pool: int) -> None:
    z.put_page(pool, KEY, 0, text("x"))
    z.put_page(pool, KEY, 1, text("y"))
    x, y = z.get_pages(pool, KEY, 0, 2)
    assert x is not None
    assert y is not None
    z.put_pages(pool, KEY, [(0, y), (1, x)])
    assert z.counters()["revived_zpages"] == 0
    assert z.get_pages(pool, KEY, 0, 2) == [y, x]


def test_a_flush_ends_the_loan(z: ReferenceZcache, pool: int) -> None:
    for flush in (
        lambda: z.flush_page(pool, KEY, 0),
        lambda: z.flush_pages(pool, KEY, 0, 5),
        lambda: z.flush_inode(pool, KEY),
    ):
        z.put_page(pool, KEY, 0, text("x"))
        got = z.get_page(pool, KEY, 0)
        assert got is not None
        flush()
        assert z.counters()["pool_used"] == 0
        z.put_page(pool, KEY, 0, got)
        assert z.counters()["revived_zpages"] == 0
        z.flush_inode(pool, KEY)


def test_loans_are_bounded_and_the_oldest_end_first(z: ReferenceZcache, pool: int) -> None:
    n = int(LOAN_ROOM)
    z.put_pages(pool, KEY, [(i, text(i)) for i in range(2 * n)])
    pages = [z.get_page(pool, KEY, i) for i in range(2 * n)]
    assert 0 < z.counters()["loaned_zpages"] <= n
    youngest, oldest = pages[-1], pages[0]
    assert youngest is not None
    assert oldest is not None
    z.put_page(pool, KEY, 2 * n - 1, youngest)
    assert z.counters()["revived_zpages"] == 1
    z.put_page(pool, KEY, 0, oldest)
    assert z.counters()["revived_zpages"] == 1
    assert z.get_page(pool, KEY, 0) == text(0)


def test_a_loan_ends_before_its_page_is_more_than_its_share() -> None:
    z = ReferenceZcache(BackendOptions(MIN_POOL_LIMIT))
    pool = z.init_fs(MIB)
    z.put_page(pool, KEY, 0, text("x", MIB))
    assert z.get_page(pool, KEY, 0) == text("x", MIB)
    assert z.counters()["loaned_zpages"] == 0
    check_books(z)


def test_a_shared_pool_makes_no_loans(z: ReferenceZcache) -> None:
    pool = z.init_shared_fs(UUID_A, PAGE_SIZE)
    z.put_page(pool, KEY, 0, text("x"))
    z.get_page(pool, KEY, 0)
    assert z.counters()["loaned_zpages"] == 0


# -- corrupt pages and failing puts -----------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("how", ["broken", "short"])
def test_a_corrupt_page_becomes_a_miss(z: ReferenceZcache, shared: bool, how: str) -> None:
    pool = z.init_shared_fs(UUID_A, PAGE_SIZE) if shared else z.init_fs(PAGE_SIZE)
    z.put_page(pool, KEY, 0, text("x"))
    [(zid, zpage)] = z._zpages.items()
    assert isinstance(zpage, bytes)
    # "short" decompresses without an error, to less than a page.
    bad = b"\xff" * len(zpage) if how == "broken" else z._compress(b"x" * 100)
    z._account(z._objects[zid >> reference.INDEX_BITS], zpage, -1)
    z._account(z._objects[zid >> reference.INDEX_BITS], bad, 1)
    z._zpages[zid] = bad
    assert z.get_page(pool, KEY, 0) is None
    assert z.counters()["corrupt_zpages"] == 1
    assert z.counters()["pool_used"] == 0
    z.put_page(pool, KEY, 0, text("y"))
    assert z.get_page(pool, KEY, 0) == text("y")


def test_a_put_that_fails_on_the_way_discards_the_older_page(z: ReferenceZcache, pool: int) -> None:
    z.put_pages(pool, KEY, [(0, text("a")), (1, text("b"))])

    def failing(page: bytes) -> bytes:
        raise MemoryError

    z._compress = failing
    with pytest.raises(MemoryError):
        z.put_page(pool, KEY, 0, text("c"))
    assert z.get_pages(pool, KEY, 0, 2) == [None, text("b")]


# -- counters -------------------------------------------------------------------------------------


def test_flush_counters_tell_what_was_found(z: ReferenceZcache, pool: int) -> None:
    z.put_pages(pool, KEY, [(i, same(i)) for i in range(10)])
    z.flush_page(pool, KEY, 0)
    z.flush_page(pool, KEY, 0)
    z.flush_pages(pool, KEY, 5, None)
    z.flush_page(pool, OTHER_KEYS[0], 0)
    z.flush_inode(pool, KEY)
    z.flush_inode(pool, KEY)
    c = z.counters()
    assert (c["flush_total"], c["flush_found"]) == (4, 6)
    assert (c["flobj_total"], c["flobj_found"]) == (2, 1)


def test_maxima_remember(z: ReferenceZcache, pool: int) -> None:
    z.put_pages(pool, KEY, [(i, same(i)) for i in range(10)])
    z.put_page(pool, OTHER_KEYS[0], 0, ZERO)
    z.flush_fs(pool)
    c = z.counters()
    assert (c["obj_count"], c["obj_count_max"], c["eph_zpages"], c["eph_zpages_max"]) == (0, 2, 0, 11)
    assert c["pool_used"] == 0


def test_counters_are_a_snapshot(z: ReferenceZcache, pool: int) -> None:
    before = z.counters()
    z.put_page(pool, KEY, 0, ZERO)
    assert before["eph_zpages"] == 0


# -- against a model --------------------------------------------------------------------------------


class ReferenceMachine(ZcacheMachine):
    """Against a dict of what was put last."""

    def make(self) -> ReferenceZcache:
        return ReferenceZcache(BackendOptions(MIN_POOL_LIMIT))

    def check(self) -> None:
        check_books(self.z)


TestAgainstAModel = ReferenceMachine.TestCase
TestAgainstAModel.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
