"""Compare a zcache with a dict of the pages put last: a get returns that page or misses.

``Twin`` performs the steps. ``ZcacheMachine`` lets hypothesis choose them, ``check/stress_zcache`` a
random generator.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cleanfs.backends.ops import FileKey
from tests.backends.pages import (
    FILLER,
    FILLER_PAGES,
    KEY,
    MIB,
    OTHER_KEYS,
    PAGE_SIZE,
    UUID_A,
    UUID_B,
    noise,
    same,
    text,
)

KEYS = [KEY, *OTHER_KEYS]
UUIDS = [UUID_A, UUID_B]
INDICES = st.integers(0, 60)
WHICH = st.integers(0, 1 << 16)

Handle = tuple[int, FileKey, int]


MAKERS: dict[str, Callable[[int, int], bytes]] = {"same": same, "text": text, "noise": noise}


class Twin:
    """Holds a backend, and a model of the pages that it may return."""

    def __init__(self, z: Any) -> None:  # noqa: ANN401  # a Backend with methods that only some have
        self.z = z
        self.private: dict[int, int] = {}  # page size by pool id
        self.shared: dict[int, int] = {}
        self.sharers: dict[int, int] = {}
        self.uuids: dict[UUID, int] = {}
        self.model: dict[Handle, bytes] = {}
        self.got: dict[Handle, bytes] = {}
        self.tags = count(1)
        self.fillers = count()
        self.excess = 0
        """The most bytes above the limit, right after a sync or a resize."""

    @property
    def pools(self) -> list[int]:
        """Return the ids of all pools."""
        return sorted({*self.private, *self.shared})

    def page_size(self, pool: int) -> int:
        """Return the page size of a pool."""
        return (self.private if pool in self.private else self.shared)[pool]

    def open(self, page_size: int) -> None:
        """Open a private pool. zcache may refuse it if the limit is small for such pages."""
        pool = self.z.init_fs(page_size)
        if pool < 0:
            return
        assert pool not in self.pools
        self.private[pool] = page_size

    def join(self, uuid: UUID, page_size: int) -> None:
        """Join a shared pool. zcache must refuse it if the pool has another page size."""
        pool = self.z.init_shared_fs(uuid, page_size)
        there = self.uuids.get(uuid)
        if there is not None and self.shared[there] != page_size:
            assert pool < 0
            return
        if pool < 0:
            assert there is None
            return
        assert pool == there if there is not None else pool not in self.pools
        self.uuids[uuid] = pool
        self.shared[pool] = page_size
        self.sharers[pool] = self.sharers.get(pool, 0) + 1

    def close(self, pool: int) -> None:
        """Close a private pool, or leave a shared pool."""
        self.z.flush_fs(pool)
        if self.sharers.get(pool, 0) > 1:
            self.sharers[pool] -= 1
            return
        self.private.pop(pool, None)
        self.shared.pop(pool, None)
        self.sharers.pop(pool, None)
        self.uuids = {uuid: other for uuid, other in self.uuids.items() if other != pool}
        self.model = {handle: page for handle, page in self.model.items() if handle[0] != pool}
        self.got = {handle: page for handle, page in self.got.items() if handle[0] != pool}

    def put(self, pool: int, key: FileKey, first: int, n: int, kind: str) -> None:
        """Put ``n`` new pages."""
        size = self.page_size(pool)
        pages = [(first + i, MAKERS[kind](next(self.tags), size)) for i in range(n)]
        self.z.put_pages(pool, key, pages)
        for index, page in pages:
            self.model[pool, key, index] = page

    def put_back(self, handles: Iterable[Handle]) -> None:
        """Put back the very page objects that gets returned, file by file."""
        by_file: dict[tuple[int, FileKey], list[tuple[int, bytes]]] = {}
        for handle in handles:
            pool, key, index = handle
            by_file.setdefault((pool, key), []).append((index, self.got[handle]))
            self.model[handle] = self.got[handle]
        for (pool, key), pages in by_file.items():
            self.z.put_pages(pool, key, pages)

    def get(self, pool: int, key: FileKey, first: int, n: int) -> None:
        """Get pages, as a list."""
        pages = self.z.get_pages(pool, key, first, n)
        assert len(pages) == n
        self._saw(pool, key, first, pages)
        for index, page in enumerate(pages, first):
            if page is not None:
                self.got[pool, key, index] = page

    def get_into(self, pool: int, key: FileKey, first: int, n: int) -> None:
        """Get pages into a buffer. The buffer stays unchanged where no page was found."""
        size = self.page_size(pool)
        before = b"\xa5" * size
        buffer = bytearray(before * (n + 1))
        found = self.z.get_pages_into(pool, key, first, memoryview(buffer)[: n * size])
        assert len(found) == n
        assert set(found) <= {0, 1}
        pages = [bytes(buffer[at * size : (at + 1) * size]) for at in range(n + 1)]
        assert all(page == before for page, hit in zip(pages, [*found, 0], strict=True) if not hit)
        hits = [page if hit else None for page, hit in zip(pages, found, strict=False)]
        self._saw(pool, key, first, hits)

    def borrow(self, pool: int, key: FileKey, first: int, n: int) -> None:
        """Borrow all pages of a range or none. Borrowed pages stay in zcache."""
        pages = self.z.borrow_pages(pool, key, first, n)
        if pages is not None:
            expected = [self.model[pool, key, first + i] for i in range(n)]
            assert pages == b"".join(expected), (pool, key, first, n)

    def _saw(self, pool: int, key: FileKey, first: int, pages: Sequence[bytes | None]) -> None:
        for index, page in enumerate(pages, first):
            if page is not None:
                assert page == self.model.get((pool, key, index)), (pool, key, index)
            if page is None or pool in self.private:
                self.model.pop((pool, key, index), None)  # get-get, exclusive

    def flush(self, pool: int, key: FileKey, start: int, n: int | None) -> None:
        """Discard ``n`` pages, or all from ``start`` on, by the call that fits."""
        stop = None if n is None else start + n
        if n == 1:
            self.z.flush_page(pool, key, start)
        elif start == 0 and n is None:
            self.z.flush_inode(pool, key)
        else:
            self.z.flush_pages(pool, key, start, stop)
        for handle in list(self.model):
            if handle[:2] == (pool, key) and start <= handle[2] < (1 << 60 if stop is None else stop):
                del self.model[handle]

    def fill(self, pool: int, n: int) -> None:
        """Put pages that only use memory."""
        pages = FILLER_PAGES
        if (size := self.page_size(pool)) != PAGE_SIZE:
            pages = [page * (size // PAGE_SIZE) for page in pages[:20]]
            n //= size // PAGE_SIZE
        indices = [next(self.fillers) for _ in range(n)]
        self.z.put_pages(pool, FILLER, [(i, pages[i % len(pages)]) for i in indices])

    def sync(self) -> None:
        """Wait until all pages are compressed."""
        self.z.sync()
        self._note_excess()

    def resize(self, limit: int) -> None:
        """Change the limit and note how far it is exceeded."""
        self.z.resize(limit)
        self._note_excess()

    def _note_excess(self) -> None:
        counters = self.z.counters()
        self.excess = max(self.excess, counters["pool_used"] - counters["pool_limit"])


class ZcacheMachine(RuleBasedStateMachine):
    """Lets hypothesis choose the steps. A subclass makes the engine and checks its invariants."""

    PAGE_SIZES = (PAGE_SIZE, 4 * PAGE_SIZE, 16 * PAGE_SIZE)
    LIMITS = (MIB, MIB + 100_000, 2 * MIB)
    NATIVE = False

    def make(self) -> Any:  # noqa: ANN401  # one of two engine classes
        """Make a backend with the first of the limits."""
        raise NotImplementedError

    def check(self) -> None:
        """Fail unless the counters agree with the data structures."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.z = self.make()
        self.twin = Twin(self.z)
        self.twin.open(PAGE_SIZE)
        self.twin.join(UUID_A, PAGE_SIZE)
        assert len(self.twin.pools) == 2

    # The values that hypothesis draws must not depend on which pages are stored: that depends on the
    # timing of the native engine's worker, and a test case could not be replayed. So a step draws
    # numbers, and does nothing where there is nothing to choose from.

    def pool(self, which: int) -> int | None:
        """Choose a pool, if there are any."""
        return self.twin.pools[which % len(self.twin.pools)] if self.twin.pools else None

    @rule(
        which=WHICH,
        key=st.sampled_from(KEYS),
        first=INDICES,
        n=st.sampled_from([1, 2, 20, 80]),
        kind=st.sampled_from(sorted(MAKERS)),
    )
    def put(self, which: int, key: FileKey, first: int, n: int, kind: str) -> None:
        """Put new pages."""
        pool = self.pool(which)
        if pool is not None:
            self.twin.put(pool, key, first, n, kind)

    @rule(which=WHICH, whole_file=st.booleans())
    def put_back(self, which: int, whole_file: bool) -> None:
        """Put back the very objects that gets returned."""
        if not self.twin.got:
            return
        handle = sorted(self.twin.got)[which % len(self.twin.got)]
        handles = [other for other in self.twin.got if other[:2] == handle[:2]]
        self.twin.put_back(handles if whole_file else [handle])

    @rule(which=WHICH, key=st.sampled_from(KEYS), first=INDICES, n=st.sampled_from([1, 5, 40]))
    def get(self, which: int, key: FileKey, first: int, n: int) -> None:
        """Get pages as a list."""
        pool = self.pool(which)
        if pool is not None:
            self.twin.get(pool, key, first, n)

    @precondition(lambda self: self.NATIVE)
    @rule(which=WHICH, key=st.sampled_from(KEYS), first=INDICES, n=st.sampled_from([0, 1, 5, 40]))
    def get_into(self, which: int, key: FileKey, first: int, n: int) -> None:
        """Get pages into a buffer."""
        pool = self.pool(which)
        if pool is not None:
            self.twin.get_into(pool, key, first, n)

    @rule(which=WHICH, key=st.sampled_from(KEYS), first=INDICES, n=st.sampled_from([0, 1, 2, 20]))
    def borrow(self, which: int, key: FileKey, first: int, n: int) -> None:
        """Borrow all pages of a range."""
        pool = self.pool(which)
        if pool is not None:
            self.twin.borrow(pool, key, first, n)

    @rule(which=WHICH, key=st.sampled_from(KEYS), start=INDICES, n=st.none() | st.integers(0, 99))
    def flush(self, which: int, key: FileKey, start: int, n: int | None) -> None:
        """Discard a page, a range or a file."""
        pool = self.pool(which)
        if pool is not None:
            self.twin.flush(pool, key, start, n)

    @rule(which=WHICH, n=st.sampled_from([50, 400]))
    def fill(self, which: int, n: int) -> None:
        """Force evictions."""
        pool = self.pool(which)
        if pool is not None:
            self.twin.fill(pool, n)

    @rule(which=WHICH)
    def open(self, which: int) -> None:
        """Open a private pool."""
        self.twin.open(self.PAGE_SIZES[which % len(self.PAGE_SIZES)])

    @rule(which=WHICH, uuid=st.sampled_from(UUIDS))
    def join(self, which: int, uuid: UUID) -> None:
        """Join a shared pool."""
        self.twin.join(uuid, self.PAGE_SIZES[which % len(self.PAGE_SIZES)])

    @rule(which=WHICH)
    def close(self, which: int) -> None:
        """Close a private pool, or leave a shared pool."""
        pool = self.pool(which)
        if pool is not None:
            self.twin.close(pool)

    @rule(which=WHICH)
    def resize(self, which: int) -> None:
        """Change the limit."""
        self.twin.resize(self.LIMITS[which % len(self.LIMITS)])

    @precondition(lambda self: self.NATIVE)
    @rule()
    def sync(self) -> None:
        """Wait until all pages are compressed."""
        self.twin.sync()

    @invariant()
    def counters_agree(self) -> None:
        """Check the invariants after each step."""
        self.check()
