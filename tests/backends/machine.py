"""A zcache against a dict of what was put last: every get gives that or a miss, never more.

``Twin`` takes the steps, for whoever chooses them: ``ZcacheMachine`` lets hypothesis do so, and
``scripts/stress-zcache`` a random generator.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cleanfs.ops import FileKey
from tests.backends.conformance import KEY, OTHER_KEYS, PAGE_SIZE, UUID_A, UUID_B, noise, text

MIB = 1 << 20
KEYS = [KEY, *OTHER_KEYS]
UUIDS = [UUID_A, UUID_B]
FILLER = FileKey(1, 2, b"filler")
"""A file whose pages are put for the room that they take; nobody asks for them."""
FILLER_PAGES = [noise(i)[: 1000 + 27 * i % 2000].ljust(PAGE_SIZE, b"\0") for i in range(300)]
INDICES = st.integers(0, 60)
WHICH = st.integers(0, 1 << 16)

Handle = tuple[int, FileKey, int]


def same(word: int, page_size: int = PAGE_SIZE) -> bytes:
    """A same-filled page."""
    return word.to_bytes(8, "little") * (page_size // 8)


MAKERS: dict[str, Callable[[int, int], bytes]] = {"same": same, "text": text, "noise": noise}


class Twin:
    """A backend, and what it may answer."""

    def __init__(self, z: Any) -> None:  # noqa: ANN401  a Backend, and what some have beyond that
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
        """Bytes above the limit, at most, right after a sync or a resize."""

    @property
    def pools(self) -> list[int]:
        """All that there are."""
        return sorted({*self.private, *self.shared})

    def page_size(self, pool: int) -> int:
        """Of a pool."""
        return (self.private if pool in self.private else self.shared)[pool]

    def open(self, page_size: int) -> None:
        """One more private pool, or a refusal if the limit is small for such pages."""
        pool = self.z.init_fs(page_size)
        if pool < 0:
            return
        assert pool not in self.pools
        self.private[pool] = page_size

    def join(self, uuid: UUID, page_size: int) -> None:
        """One more sharer, or a refusal, always if the page size is another."""
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
        """One sharer less, or a pool less."""
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
        """Put the very pages that gets gave, file by file."""
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
        """Get pages into a buffer; where there was none it stays as it is."""
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
        """Get pages that stay; all or none."""
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
        """Discard ``n`` pages, or all from ``start`` on; in the form that is made for it."""
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
        """Use room up."""
        pages = FILLER_PAGES
        if (size := self.page_size(pool)) != PAGE_SIZE:
            pages = [page * (size // PAGE_SIZE) for page in pages[:20]]
            n //= size // PAGE_SIZE
        indices = [next(self.fillers) for _ in range(n)]
        self.z.put_pages(pool, FILLER, [(i, pages[i % len(pages)]) for i in indices])

    def sync(self) -> None:
        """Have all pages compressed."""
        self.z.sync()
        self._note_excess()

    def resize(self, limit: int) -> None:
        """Change the limit, which holds at once, but for what can not be given back."""
        self.z.resize(limit)
        self._note_excess()

    def _note_excess(self) -> None:
        counters = self.z.counters()
        self.excess = max(self.excess, counters["pool_used"] - counters["pool_limit"])


class ZcacheMachine(RuleBasedStateMachine):
    """The steps, chosen by hypothesis. A subclass says what is made, and what must hold always."""

    PAGE_SIZES = (PAGE_SIZE, 4 * PAGE_SIZE, 16 * PAGE_SIZE)
    LIMITS = (MIB, MIB + 100_000, 2 * MIB)
    NATIVE = False

    def make(self) -> Any:  # noqa: ANN401
        """A new backend with the first of the limits."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise unless the books balance."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.z = self.make()
        self.twin = Twin(self.z)
        self.twin.open(PAGE_SIZE)
        self.twin.join(UUID_A, PAGE_SIZE)
        assert len(self.twin.pools) == 2

    # What hypothesis draws must not depend on what is kept: the native engine's worker decides that
    # with its own timing, and a test case could not be run again. So a step draws numbers, and does
    # nothing where there is nothing to choose from.

    def pool(self, which: int) -> int | None:
        """One of them, if there are any."""
        return self.twin.pools[which % len(self.twin.pools)] if self.twin.pools else None

    @rule(
        which=WHICH,
        key=st.sampled_from(KEYS),
        first=INDICES,
        n=st.sampled_from([1, 2, 20, 80]),
        kind=st.sampled_from(sorted(MAKERS)),
    )
    def put(self, which: int, key: FileKey, first: int, n: int, kind: str) -> None:
        """New pages."""
        pool = self.pool(which)
        if pool is not None:
            self.twin.put(pool, key, first, n, kind)

    @rule(which=WHICH, whole_file=st.booleans())
    def put_back(self, which: int, whole_file: bool) -> None:
        """The very objects that were got."""
        if not self.twin.got:
            return
        handle = sorted(self.twin.got)[which % len(self.twin.got)]
        handles = [other for other in self.twin.got if other[:2] == handle[:2]]
        self.twin.put_back(handles if whole_file else [handle])

    @rule(which=WHICH, key=st.sampled_from(KEYS), first=INDICES, n=st.sampled_from([1, 5, 40]))
    def get(self, which: int, key: FileKey, first: int, n: int) -> None:
        """As a list."""
        pool = self.pool(which)
        if pool is not None:
            self.twin.get(pool, key, first, n)

    @precondition(lambda self: self.NATIVE)
    @rule(which=WHICH, key=st.sampled_from(KEYS), first=INDICES, n=st.sampled_from([0, 1, 5, 40]))
    def get_into(self, which: int, key: FileKey, first: int, n: int) -> None:
        """Into a buffer."""
        pool = self.pool(which)
        if pool is not None:
            self.twin.get_into(pool, key, first, n)

    @rule(which=WHICH, key=st.sampled_from(KEYS), first=INDICES, n=st.sampled_from([0, 1, 2, 20]))
    def borrow(self, which: int, key: FileKey, first: int, n: int) -> None:
        """All pages of a range, which stay."""
        pool = self.pool(which)
        if pool is not None:
            self.twin.borrow(pool, key, first, n)

    @rule(which=WHICH, key=st.sampled_from(KEYS), start=INDICES, n=st.none() | st.integers(0, 99))
    def flush(self, which: int, key: FileKey, start: int, n: int | None) -> None:
        """A page, a range, a file."""
        pool = self.pool(which)
        if pool is not None:
            self.twin.flush(pool, key, start, n)

    @rule(which=WHICH, n=st.sampled_from([50, 400]))
    def fill(self, which: int, n: int) -> None:
        """So that there are evictions."""
        pool = self.pool(which)
        if pool is not None:
            self.twin.fill(pool, n)

    @rule(which=WHICH)
    def open(self, which: int) -> None:
        """A private pool."""
        self.twin.open(self.PAGE_SIZES[which % len(self.PAGE_SIZES)])

    @rule(which=WHICH, uuid=st.sampled_from(UUIDS))
    def join(self, which: int, uuid: UUID) -> None:
        """A shared pool."""
        self.twin.join(uuid, self.PAGE_SIZES[which % len(self.PAGE_SIZES)])

    @rule(which=WHICH)
    def close(self, which: int) -> None:
        """A pool, or one sharer's use."""
        pool = self.pool(which)
        if pool is not None:
            self.twin.close(pool)

    @rule(which=WHICH)
    def resize(self, which: int) -> None:
        """Up or down."""
        self.twin.resize(self.LIMITS[which % len(self.LIMITS)])

    @precondition(lambda self: self.NATIVE)
    @rule()
    def sync(self) -> None:
        """Staged pages become compressed ones."""
        self.twin.sync()

    @invariant()
    def books_balance(self) -> None:
        """After each step."""
        self.check()
