"""Connect a page cache to a source that can be paused and a backend that records its calls."""

# ruff: noqa: SLF001  # invariants are checked on private tables

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

import trio
from trio.testing import wait_all_tasks_blocked

from cleanfs.backends.ops import Backend, FileKey
from cleanfs.cache.cleancache import Cleancache
from cleanfs.cache.pagecache import PageCache
from cleanfs.cache.resident import make_resident

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


@asynccontextmanager
async def held(source: Source) -> AsyncIterator[trio.Nursery]:
    """Let reads started in the block wait for the source until the block ends."""
    source.hold()
    async with trio.open_nursery() as nursery:
        yield nursery
        await wait_all_tasks_blocked()
        source.release()


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
