"""The bounded page cache: misses are sought in cleancache, evictions feed it.

It runs on the main thread without locks; what is atomic lies between two checkpoints.

* Between two awaits nothing else runs. A lookup, the gets of what is missing and the insertion of
  what was got happen without an await, and so do an eviction and its puts, and a flush.
* A read that must wait for the source remembers the file's *version* and inserts its pages only if
  it is still the same (``source_reads``). Every invalidation moves the version on. A mutation
  invalidates before it touches the source and after (``changes``).
* A miss of a page that is being read at the same version waits for that read (``in_flight``).

Invariant: a page is resident here or kept by cleancache, not both (private pools are exclusive).
"""

from dataclasses import dataclass

from cleanfs.backends.ops import FileKey
from cleanfs.cache.changes import Changing, Mutating
from cleanfs.cache.cleancache import CleancacheFs
from cleanfs.cache.files import MIN_FILES, CachedFile, FileRecords
from cleanfs.cache.in_flight import Buffer, InFlightRead, missing_runs
from cleanfs.cache.resident import PythonResident, Resident
from cleanfs.cache.source_reads import SourceFile, SourceReads
from cleanfs.cache.state import HandleState
from cleanfs.latency import CLEANCACHE_HIT, PAGECACHE_HIT, SOURCE_READ
from cleanfs.source.identity import Dentry

AHEAD = 32
"""Pages evicted ahead of need for the channel: a call for each would cost more than the read."""


@dataclass(frozen=True, slots=True)
class PageCacheStats:
    """A snapshot. Pages unless said otherwise."""

    limit: int
    """Bytes that resident pages may take, overhead included."""
    used: int
    """Bytes that they take."""
    resident: int
    files: int
    """File records."""
    hits: int
    misses: int
    evictions: int
    """Pages evicted by reclaim, all of them offered to cleancache."""
    shared_reads: int
    """Misses that waited for another reader's read of the source."""
    stale_reads: int
    """Source reads whose pages were not inserted: the file had changed meanwhile."""
    lost_files: int
    """Files given up because no name leads to them: it stands for another file now, or for none."""
    lost_pages: int
    """Their pages, here and in cleancache."""


class PageCache:
    """The page cache of one mount (see the module)."""

    def __init__(
        self,
        limit: int,
        cleancache: CleancacheFs,
        resident: Resident,
        max_files: int = MIN_FILES,
    ) -> None:
        """Start empty. ``limit`` is in bytes; with 0 every page goes through cleancache."""
        self.page_size = cleancache.page_size
        self._limit = limit
        self._cleancache = cleancache
        self._resident = resident
        self._cost = self.page_size + resident.overhead
        self._records = FileRecords(max_files, self.invalidate)
        self._source_reads = SourceReads(self.page_size, self._insert)
        pages = None if isinstance(resident, PythonResident) else resident
        cleancache.state.use_resident(pages, self._reclaim_ahead)
        self._update_state()
        self._hits = self._misses = self._evictions = 0
        self._lost_files = self._lost_pages = 0

    @property
    def clock(self) -> int:
        """Count versions: a file whose version is later than a remembered clock has changed since."""
        return self._cleancache.state.clock

    @property
    def takes_evictions(self) -> bool:
        """Tell whether the kernel hands over what it evicts, and reads make no pages resident here."""
        return self._cleancache.state.takes_evictions

    # -- files ------------------------------------------------------------------------------

    @property
    def max_files(self) -> int:
        """Return how many file records are kept, beside those in use."""
        return self._records.max_files

    @max_files.setter
    def max_files(self, number: int) -> None:
        self._records.max_files = number

    def file(self, key: FileKey, dentry: Dentry | None = None) -> CachedFile:
        """Return the record of a file, made if need be."""
        return self._records.use(key, dentry)

    def known(self, key: FileKey) -> CachedFile | None:
        """Return the record of a file, if there is one."""
        return self._records.get(key)

    def files(self) -> list[CachedFile]:
        """Return all records."""
        return self._records.all()

    def forget(self, file: CachedFile) -> None:
        """Flush a file that no longer exists, and drop its record."""
        self._records.forget(file)

    def lost(self, key: FileKey) -> None:
        """Forget a file that may exist, but that no name leads to: its pages could never be hit."""
        file = self.known(key)
        if file is None:
            return
        before = len(self._resident) + self._cleancache.kept_pages()
        self.forget(file)
        self._lost_files += 1
        self._lost_pages += before - len(self._resident) - self._cleancache.kept_pages()

    # -- reading ----------------------------------------------------------------------------

    async def read(
        self, file: CachedFile, source: SourceFile, offset: int, size: int, *, direct: bool = False
    ) -> tuple[Buffer, int]:
        """Read the bytes ``offset <= i < offset + size`` of the file, short at its end.

        ``direct`` says that the kernel will not cache them, and so never evict them.
        Returns them and where they were found (a kind of read in ``latency``). Raises OSError.
        """
        end = min(offset + size, file.size)
        if end <= offset:
            # Past the end that is known here.
            return await source.read(offset, size, file.size), SOURCE_READ
        evicted = self._cleancache.state.drain_evictions()
        page_size = self.page_size
        first = offset // page_size
        start = first * page_size
        count = (end - 1) // page_size + 1 - first
        pages = self._resident.look_up(file.serial, first, count, offset - start, end - start)
        if isinstance(pages, bytes):
            self._hits += count
            return pages, PAGECACHE_HIT
        missing = pages.count(None)
        self._hits += count - missing
        self._misses += missing
        if missing == count:
            borrowed = self._cleancache.borrow_pages(file.key, first, count)
            if borrowed is not None:
                return _cut(borrowed, offset - start, end - start), CLEANCACHE_HIT
        self._get_missing(file, first, pages)
        if None not in pages:
            return self._join_pages(pages, first, offset, end), CLEANCACHE_HIT
        file.evictions_after = max(file.evictions_after, evicted)  # the kernel will have newer pages
        keeps = direct or not self.takes_evictions
        data = await self._read_source(file, source, first, pages, offset, end, keeps=keeps)
        return data, SOURCE_READ

    async def _read_source(
        self,
        file: CachedFile,
        source: SourceFile,
        first: int,
        pages: list[bytes | None],
        offset: int,
        end: int,
        *,
        keeps: bool,
    ) -> Buffer:
        """Read ``offset <= i < end``, of which ``pages`` from index ``first`` on has a part."""
        start, count = first * self.page_size, len(pages)
        exact = offset == start and end in (file.size, start + count * self.page_size)
        exact = exact and all(f.first >= first and f.stop <= first + count for f in file.in_flight)
        try:
            if not file.in_flight and pages.count(None) == count:
                data = await self._source_reads.read_whole(file, source, first, count, keeps=keeps)
                return memoryview(data)[offset - start : end - start]
            read = self._source_reads.read_missing
            end = min(end, await read(file, source, first, pages, keeps=keeps))
        except OSError:
            # The error may concern bytes that this read did not request: the rest of a page, or of
            # another read's range.
            if exact:
                raise
            return await source.read(offset, end - offset, file.size)
        return self._join_pages(pages, first, offset, end)

    def _join_pages(self, pages: list[bytes | None], first: int, offset: int, end: int) -> Buffer:
        """Cut ``offset <= i < end`` out of pages from index ``first`` on, up to the first gap."""
        if None in pages:
            pages = pages[: pages.index(None)]
        start = first * self.page_size
        return _cut(b"".join(pages), offset - start, max(end - start, 0))  # type: ignore[arg-type]  # no None is left

    def _get_missing(self, file: CachedFile, first: int, pages: list[bytes | None]) -> None:
        """Get each run of missing pages from cleancache, and make them resident."""
        for start, stop in missing_runs(pages):
            got = self._cleancache.get_pages(file.key, first + start, stop - start)
            if got is None:
                return
            pages[start:stop] = got
            self._resident.insert(file.serial, first + start, got)
            self._reclaim()

    # -- residence --------------------------------------------------------------------------

    def _insert(self, file: CachedFile, read: InFlightRead) -> None:
        """Make resident what a read of the source brought.

        A page that ends before the end of the file that is known here (the file shrank in the source)
        is part of the reply, but nothing to keep.
        """
        if not self._limit and self._cleancache.pool_id < 0:
            return
        data = read.data
        if len(data) < min(read.offset + read.size, file.size) - read.offset:
            data = memoryview(data)[: len(data) // self.page_size * self.page_size]
        self._resident.insert_data(file.serial, read.first, data)
        self._reclaim()

    def _update_state(self) -> None:
        """Tell the channel the limit."""
        self._cleancache.state.limit_pages = self._limit // self._cost

    def _reclaim_ahead(self) -> None:
        """Evict down to below the limit, since the channel inserts a page at a time."""
        self._reclaim(min(AHEAD * self._cost, self._limit // 8))

    def _reclaim(self, ahead: int = 0) -> None:
        """Evict down to ``ahead`` bytes below the limit, and offer every victim to cleancache.

        That is done in runs of one file.
        """
        over = len(self._resident) * self._cost - self._limit + ahead
        if over <= 0:
            return
        for serial, pages in self._resident.evict(-(-over // self._cost)):
            self._evictions += len(pages)
            self._cleancache.put_pages(self._records.of_serial(serial).key, pages)

    # -- invalidation -----------------------------------------------------------------------

    def invalidate(self, file: CachedFile, start: int = 0, stop: int | None = None) -> None:
        """Flush the bytes ``start <= i < stop`` (to the end if None): they are not what they were.

        Moves the version on: reads under way will not insert what they bring.
        """
        self._cleancache.state.drain_evictions()  # for the pages that stay valid
        self.new_version(file)
        first = start // self.page_size
        last = None if stop is None else -(-stop // self.page_size)
        if first == 0 and last is None:
            self._cleancache.flush_inode(file.key)
        else:
            self._cleancache.flush_pages(file.key, first, last)
        self._resident.discard(file.serial, first, last)

    def opener_ran(self, handle: HandleState) -> None:
        """Note that the opener of a file has run: the kernel has dropped what the reply told it to."""
        self._cleancache.state.opener_ran(handle)

    def new_version(self, file: CachedFile) -> None:
        """Make reads that began before now stale."""
        self._cleancache.state.new_version(file)

    def changing(self, file: CachedFile) -> Changing:
        """Return the context for a change of the file by cleanfs: one at a time."""
        return Changing(file)

    def mutating(self, file: CachedFile, start: int = 0, stop: int | None = None) -> Mutating:
        """Return the context for a change of these bytes: invalidate before and after.

        Without a stop the change moves the end of the file.
        """
        return Mutating(self.invalidate, file, start, stop)

    # -- operator's controls ------------------------------------------------------------------

    @property
    def limit(self) -> int:
        """Return how many bytes resident pages may take."""
        return self._limit

    @property
    def used(self) -> int:
        """Return how many bytes they take."""
        return len(self._resident) * self._cost

    def resize(self, limit: int) -> None:
        """Change the limit and evict down to it at once."""
        self._limit = limit
        self._update_state()
        self._reclaim()

    def drop(self) -> None:
        """Evict every page; cleancache may keep them (as the kernel's ``drop_caches`` did)."""
        limit, self._limit = self._limit, 0
        self._reclaim()
        self._limit = limit

    def stats(self) -> PageCacheStats:
        """Return a snapshot."""
        return PageCacheStats(
            limit=self._limit,
            used=self.used,
            resident=len(self._resident),
            files=len(self._records),
            hits=self._hits + self._cleancache.state.hits,
            misses=self._misses + self._cleancache.state.misses,
            evictions=self._evictions,
            shared_reads=self._source_reads.shared_pages,
            stale_reads=self._source_reads.stale_reads,
            lost_files=self._lost_files,
            lost_pages=self._lost_pages,
        )


def _cut(data: bytes, start: int, stop: int) -> Buffer:
    """Return the bytes ``start <= i < stop`` of ``data``, without a copy."""
    whole = start == 0 and stop == len(data)
    return data if whole else memoryview(data)[start:stop]
