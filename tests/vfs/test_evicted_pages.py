"""Test which evicted pages are put: the rules, one by one, on a ring in memory."""

import stat as stat_module
from collections.abc import Iterator

import pytest

from cleanfs.backends.engines import native_module
from cleanfs.backends.ops import FileKey
from cleanfs.backends.options import BackendOptions
from cleanfs.backends.zcache import make
from cleanfs.cache.cleancache import Cleancache
from cleanfs.cache.files import CachedFile
from cleanfs.cache.fingerprint import Fingerprint
from cleanfs.cache.pagecache import PageCache
from cleanfs.cache.resident import make_resident
from cleanfs.cache.state import HandleState, KernelState
from cleanfs.vfs.evictions import EvictedPages
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inode_state import InodeStates
from tests.harness.eviction_ring import BUSY, DISCARDED, PAGE, RING_BYTES, Ring

native = native_module("cleanfs.vfs._evictions")

pytestmark = pytest.mark.skipif(native is None, reason="this build lacks the kernel's evictions")

NODE = 77
OLD, NEW = b"o" * PAGE, b"n" * PAGE


class Rig:
    """Holds a pool, one file of 10 pages, and a ring of what the kernel evicts."""

    def __init__(self) -> None:
        self.ring = Ring()
        cleancache = Cleancache()
        cleancache.register(make(BackendOptions(16 << 20)))
        self.fs = cleancache.init_fs(PAGE)
        self.pagecache = PageCache(0, self.fs, make_resident(PAGE))
        self.states = InodeStates()
        self.file = self.new_file(FileKey(1, NODE, b"first"))
        self.inode = self.look_up(self.file)
        assert native is not None
        self.pages: EvictedPages = native.EvictedPages(
            self.ring.fd, RING_BYTES, self.states, self.fs.state
        )
        self.fs.state.use_evictions(self.pages.table())

    def new_file(self, key: FileKey) -> CachedFile:
        file = self.pagecache.file(key)
        file.fingerprint = Fingerprint(10 * PAGE, 1, 1, racy=False)
        file.size = 10 * PAGE
        return file

    def look_up(self, file: CachedFile) -> Inode:
        """Let the kernel know the file as NODE."""
        inode = Inode(file.key.device, NODE, stat_module.S_IFREG, NODE, 1)
        inode.set_file(file.key, file)
        self.states.add(inode)
        return inode

    def evict(self, index: int, page: bytes, **fields: int) -> int:
        return self.ring.evict(NODE, index, page, **fields)  # type: ignore[arg-type]  # readable is a bool

    def drain(self) -> None:
        self.pages.drain(1000)

    def kept(self, index: int) -> bytes | None:
        return self.fs.borrow_pages(self.file.key, index, 1)

    def counted(self, name: str) -> int:
        return self.pages.counters()[name]

    def close(self) -> None:
        self.fs.state.use_evictions(None)
        self.ring.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def test_an_evicted_page_is_put(rig: Rig) -> None:
    rig.evict(3, NEW)
    rig.drain()
    assert rig.kept(3) == NEW
    assert rig.counted("put") == 1
    assert rig.counted("ring_high_water") > PAGE


def test_it_counts_as_a_put_of_cleancache(rig: Rig) -> None:
    rig.evict(3, NEW)
    rig.drain()
    assert rig.fs.state.puts == 1


def test_a_flush_drops_what_was_evicted_before(rig: Rig) -> None:
    place = rig.evict(3, OLD, flags=BUSY)  # it cannot be drained first
    rig.pagecache.invalidate(rig.file, 3 * PAGE, 4 * PAGE)
    rig.ring.complete(place)
    rig.drain()
    assert rig.kept(3) is None
    rig.evict(3, NEW)
    rig.drain()
    assert rig.kept(3) == NEW


def test_a_flush_of_a_range_leaves_the_evicted_pages_of_others(rig: Rig) -> None:
    rig.evict(3, OLD)
    rig.evict(4, NEW)
    rig.pagecache.invalidate(rig.file, 3 * PAGE, 4 * PAGE)
    assert rig.kept(3) is None
    assert rig.kept(4) == NEW


def test_an_invalidation_of_the_whole_file_drops_all_that_was_evicted(rig: Rig) -> None:
    rig.evict(3, OLD)
    rig.pagecache.invalidate(rig.file)
    rig.drain()
    assert rig.kept(3) is None


def test_nothing_is_put_while_the_kernel_has_yet_to_drop_the_pages(rig: Rig) -> None:
    rig.pagecache.invalidate(rig.file)
    rig.pages.hold(NODE)
    rig.evict(3, OLD)
    rig.drain()
    assert rig.kept(3) is None
    rig.evict(4, OLD)
    rig.pages.release(NODE)
    rig.evict(5, NEW)
    rig.drain()
    assert rig.kept(4) is None
    assert rig.kept(5) == NEW
    assert rig.counted("stale") == 2


def test_nothing_is_put_until_an_opener_has_run_for_whom_the_kernel_drops_the_pages(rig: Rig) -> None:
    handle = HandleState(rig.file, KernelState(), -1)
    handle.drop_due = True
    rig.file.drops_due += 1
    rig.evict(3, OLD)
    rig.drain()
    rig.evict(4, OLD)
    rig.fs.state.opener_ran(handle)
    rig.evict(5, NEW)
    rig.drain()
    assert (rig.kept(3), rig.kept(4), rig.kept(5)) == (None, None, NEW)


def test_what_waits_behind_an_incomplete_record_stays_held(rig: Rig) -> None:
    rig.pages.hold(NODE)
    place = rig.evict(3, OLD, flags=BUSY)
    rig.evict(4, OLD)
    rig.pages.release(NODE)
    rig.ring.complete(place)
    rig.drain()
    assert (rig.kept(3), rig.kept(4)) == (None, None)


def test_each_hold_is_released(rig: Rig) -> None:
    rig.pages.hold(NODE)
    rig.pages.hold(NODE)
    rig.pages.release(NODE)
    rig.evict(3, OLD)
    rig.drain()
    assert rig.kept(3) is None
    rig.pages.release(NODE)
    rig.evict(3, NEW)
    rig.drain()
    assert rig.kept(3) == NEW


def test_holds_that_ended_do_not_add_up(rig: Rig) -> None:
    rig.pages.hold(NODE)
    for node in range(NODE + 1, NODE + 20_000):
        rig.pages.hold(node)
        rig.pages.release(node)
    assert rig.counted("held_nodes") < 3000
    rig.evict(3, OLD)
    rig.drain()
    assert rig.kept(3) is None


def test_a_hold_concerns_one_node(rig: Rig) -> None:
    rig.pages.hold(NODE + 1)
    rig.evict(3, NEW)
    rig.drain()
    assert rig.kept(3) == NEW


def test_a_forgotten_inode_gets_its_pages_and_the_next_file_with_its_node_does_not(rig: Rig) -> None:
    rig.evict(2, OLD)
    place = rig.evict(3, OLD, flags=BUSY)
    rig.pages.forget(NODE)
    rig.states.remove(rig.inode)
    assert rig.kept(2) == OLD
    other = rig.new_file(FileKey(1, NODE, b"second"))
    rig.look_up(other)
    rig.ring.complete(place)
    rig.drain()
    assert rig.fs.borrow_pages(other.key, 3, 1) is None
    assert rig.counted("stale") == 1


def test_a_read_of_the_source_drops_what_was_evicted_before(rig: Rig) -> None:
    place = rig.evict(3, OLD, flags=BUSY)
    position = rig.fs.state.drain_evictions()
    rig.file.evictions_after = position  # as a read does, before it asks the source
    rig.ring.complete(place)
    rig.evict(3, NEW)
    rig.drain()
    assert rig.kept(3) == NEW


def test_a_page_that_the_pool_has_is_not_put_again(rig: Rig) -> None:
    for _ in range(2):
        rig.evict(3, NEW)
    rig.drain()
    assert (rig.counted("put"), rig.counted("kept")) == (1, 1)


def test_pages_of_unknown_nodes_and_forgotten_files_are_not_put(rig: Rig) -> None:
    rig.ring.evict(NODE + 1, 3, OLD)
    rig.drain()
    assert rig.counted("unknown") == 1
    rig.pagecache.forget(rig.file)
    rig.evict(3, OLD)
    rig.drain()
    assert rig.counted("unknown") == 2
    assert rig.kept(3) is None


def test_pages_past_the_end_are_not_put(rig: Rig) -> None:
    rig.file.size = 3 * PAGE
    for index in (3, 4, 1 << 50):
        rig.evict(index, OLD)
    rig.drain()
    assert rig.counted("past_end") == 3
    assert rig.kept(3) is None


def test_nothing_is_put_of_a_distrusted_file(rig: Rig) -> None:
    rig.file.size = 0
    rig.evict(0, OLD)
    rig.drain()
    assert rig.kept(0) is None


def test_what_a_program_stored_past_the_end_is_not_put(rig: Rig) -> None:
    rig.file.size = 3 * PAGE + 100
    rig.evict(3, NEW)
    rig.drain()
    assert rig.kept(3) == NEW[:100].ljust(PAGE, b"\0")


@pytest.mark.parametrize("kernel_size", [0, 3 * PAGE, 3 * PAGE + 99])
def test_a_page_of_which_the_kernel_sees_less_is_not_put(rig: Rig, kernel_size: int) -> None:
    rig.file.size = 3 * PAGE + 100
    rig.evict(3, NEW, file_size=kernel_size)
    rig.drain()
    assert rig.kept(3) is None
    rig.evict(3, NEW, file_size=3 * PAGE + 100)
    rig.drain()
    assert rig.kept(3) is not None


def test_unreadable_and_discarded_records_are_skipped(rig: Rig) -> None:
    rig.evict(3, OLD, readable=False)
    rig.evict(4, OLD, flags=DISCARDED)
    rig.evict(5, NEW)
    rig.drain()
    assert (rig.kept(3), rig.kept(4), rig.kept(5)) == (None, None, NEW)


def test_an_incomplete_record_stops_the_drain(rig: Rig) -> None:
    place = rig.evict(3, NEW, flags=BUSY)
    rig.evict(4, NEW)
    rig.drain()
    assert rig.kept(4) is None
    rig.ring.complete(place)
    rig.drain()
    assert (rig.kept(3), rig.kept(4)) == (NEW, NEW)


def test_without_a_pool_pages_are_refused(rig: Rig) -> None:
    rig.fs.surrender_pool()
    rig.evict(3, OLD)
    rig.drain()
    assert rig.counted("refused") == 1


def test_a_drain_has_a_limit(rig: Rig) -> None:
    for index in range(5):
        rig.evict(index, NEW)
    assert rig.pages.drain(3) == 3
    assert rig.kept(3) is None
    assert rig.pages.drain(3) == 2
