"""The bounded page cache: misses ask cleancache, evictions feed it.

Runs on the main thread. The locking protocol is: there is none, there are checkpoints.

* Between two awaits nothing else runs. A lookup, the gets of what is missing and the insertion of
  what was got happen without an await, and so do an eviction and its puts, and a flush.
* A read that must wait for the source remembers the file's *version* and inserts its pages only if
  it is still the same. Every invalidation moves the version on. A mutation invalidates before it
  touches the source (later reads must not find the old pages) and after (reads that overlapped may
  have brought them back).
* A *flight* is a read of the source that is under way. Whoever misses the same page at the same
  version waits for it instead of reading it again.

Invariant: a page is resident here or kept by cleancache, not both (private pools are exclusive).
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Protocol

import trio

from cleanfs.backends.ops import FileKey
from cleanfs.cache.cleancache import CleancacheFs
from cleanfs.cache.read_ranges import RangeSet
from cleanfs.cache.resident import Resident
from cleanfs.latency import CLEANCACHE_HIT, PAGECACHE_HIT, SOURCE_READ
from cleanfs.source.identity import Dentry

if TYPE_CHECKING:
    from cleanfs.cache.fingerprint import Fingerprint

BORROWED = 8
"""Pages of a read, all of them in cleancache, from which on they stay there and do not become resident.
To move them here, and others from here there, was a quarter of what such a read costs (32 pages)."""

MIN_FILES = 1 << 14
POOL_BYTES_PER_FILE = 4096
"""File records kept, 0.7 KiB each: one for so many bytes that cleancache may use, at least MIN_FILES.
Beyond, the longest unused files are flushed and forgotten. A program that reads more files than that in
turn, again and again, finds none of them."""

FORGET_BATCH = 64
"""File records looked at when one must go."""

Buffer = bytes | bytearray | memoryview


class SourceFile(Protocol):
    """One open file of the source."""

    async def read(self, offset: int, size: int, file_size: int) -> Buffer:
        """Read ``size`` bytes; short only at the end. Raises OSError.

        ``file_size`` is what is known of the file's size, 0 if nothing is.
        """


def max_files(pool_limit: int) -> int:
    """How many file records go with a pool of that limit."""
    return max(MIN_FILES, pool_limit // POOL_BYTES_PER_FILE)


class _InFlightRead:
    """A source read under way: pages ``first <= index < stop`` at one version."""

    __slots__ = ("data", "done", "error", "first", "stop", "version")

    def __init__(self, first: int, stop: int, version: int) -> None:
        self.first = first
        self.stop = stop
        self.version = version
        self.done = trio.Event()
        self.data: Buffer = b""
        self.error: OSError | None = None

    def end(self, page_size: int) -> int | None:
        """Where the source ended, if the read came short."""
        whole = (self.stop - self.first) * page_size
        return None if len(self.data) == whole else self.first * page_size + len(self.data)


class Writing:
    """A write that is not done yet: bytes ``start <= i < stop``, to the end of the file if None.

    The kernel puts what a program writes into its own pages, and then sends it. If it drops such a page
    before the source has the bytes (upon a notification of ours, or because memory is short), it reads
    the page again, and would keep for good what the source had before. So such a read waits. It can: a
    write of the same page that comes later waits for it in the kernel, and no write waits for it here.
    """

    __slots__ = ("_done", "_ended", "start", "stop")

    def __init__(self, start: int, stop: int | None) -> None:
        """It has just been asked for."""
        self.start = start
        self.stop = stop
        self._done: trio.Event | None = None
        self._ended = False

    def touches(self, offset: int, size: int) -> bool:
        """Whether a read of that range may find what is about to change."""
        return self.start < offset + size and (self.stop is None or offset < self.stop)

    async def wait(self) -> None:
        """Return when the source has it, or refused it.

        It may have by now: who waits for several writes gets to the second after the first.
        """
        if self._ended:
            return
        if self._done is None:
            self._done = trio.Event()
        await self._done.wait()

    def end(self) -> None:
        """It has, or did."""
        self._ended = True
        if self._done is not None:
            self._done.set()


class CachedFile:
    """What is known of one file for as long as pages of it may be cached anywhere."""

    __slots__ = (
        "answers",
        "dentry",
        "drops_due",
        "fingerprint",
        "handles",
        "in_flight",
        "key",
        "lock",
        "mutations",
        "pins",
        "serial",
        "size",
        "version",
        "writes",
    )  # fmt: skip

    def __init__(self, key: FileKey, serial: int) -> None:
        """A file of which nothing is cached yet."""
        self.key = key
        self.dentry: Dentry | None = None
        """What the file is found again by, if not by its inode: kept as long as the record is."""
        self.serial = serial
        """Its name among the resident pages; never used again."""
        self.in_flight: list[_InFlightRead] = []
        self.version = 0
        """Stamp of the last invalidation, from the clock of the page cache (``PageCache.clock``)."""
        self.lock: trio.Lock | None = None
        """Held by the change of ours that is under way; made for the first one. Never held across
        a notification to the kernel."""
        self.mutations = 0
        """1 while there is one."""
        self.writes: list[Writing] = []
        """Writes that programs have asked for and the source does not have yet, in order."""
        self.answers: RangeSet | None = None
        """There while the file is open for writing."""
        self.handles = 0
        """Open handles."""
        self.drops_due = 0
        """Of these, those whose opening had the kernel drop the file's pages, perhaps not yet."""
        self.pins = 0
        """Users (open handles, reads under way): the record stays while there is one."""
        self.fingerprint: Fingerprint | None = None
        self.size = 0
        """Bytes, as of the fingerprint; 0 if there is none. Caches answer for these bytes only."""


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
    """Misses that waited for somebody else's read of the source."""
    stale_reads: int
    """Source reads whose pages were not inserted: the file had changed meanwhile."""
    lost_files: int
    """Files given up because nothing led to them any more: the name stands for another, or for none."""
    lost_pages: int
    """Their pages, here and in cleancache."""


class PageCache:
    """See the module."""

    def __init__(
        self,
        limit: int,
        cleancache: CleancacheFs,
        resident: Resident,
        max_files: int = MIN_FILES,
    ) -> None:
        """``limit`` in bytes; 0 keeps nothing, so that every page goes through cleancache."""
        self.page_size = cleancache.page_size
        self._limit = limit
        self._cleancache = cleancache
        self._resident = resident
        self.max_files = max_files
        """File records kept, except those in use."""
        self._cost = self.page_size + resident.overhead
        self._files: OrderedDict[FileKey, CachedFile] = OrderedDict()
        self._by_serial: dict[int, CachedFile] = {}
        self._serials = count(1)
        self.clock = 0
        """Counts versions: a file whose version is later than a remembered clock changed since."""
        self._hits = self._misses = self._evictions = self._shared_reads = self._stale_reads = 0
        self._lost_files = self._lost_pages = 0

    # -- files ------------------------------------------------------------------------------

    def file(self, key: FileKey, dentry: Dentry | None = None) -> CachedFile:
        """The record of a file, made if need be."""
        file = self._files.get(key)
        if file is None:
            serial = next(self._serials)
            file = CachedFile(key, serial)
            file.dentry = dentry
            self._files[key] = self._by_serial[serial] = file
            if len(self._files) > self.max_files:
                self._forget_oldest()
        else:
            self._files.move_to_end(key)
        return file

    def known(self, key: FileKey) -> CachedFile | None:
        """The record of a file, if there is one."""
        return self._files.get(key)

    def files(self) -> list[CachedFile]:
        """All records."""
        return list(self._files.values())

    def forget(self, file: CachedFile) -> None:
        """The file exists no more: flush it and drop its record."""
        self.invalidate(file)
        if self._files.get(file.key) is file and not file.pins:
            del self._files[file.key]
            del self._by_serial[file.serial]

    def lost(self, key: FileKey) -> None:
        """Nothing leads to a file any more, though it may be there. Its pages would wait in vain."""
        file = self._files.get(key)
        if file is None:
            return
        before = len(self._resident) + self._cleancache.kept_pages()
        self.forget(file)
        self._lost_files += 1
        self._lost_pages += before - len(self._resident) - self._cleancache.kept_pages()

    def _forget_oldest(self) -> None:
        # All but the newest, which is being made; some at a time, as many may be pinned.
        for file in list(islice(self._files.values(), min(len(self._files) - 1, FORGET_BATCH))):
            if len(self._files) <= self.max_files:
                return
            if file.pins:
                self._files.move_to_end(file.key)
            else:
                self.forget(file)

    # -- reading ----------------------------------------------------------------------------

    async def read(
        self, file: CachedFile, source: SourceFile, offset: int, size: int
    ) -> tuple[Buffer, int]:
        """Read the bytes ``offset <= i < offset + size`` of the file, short at its end.

        Returns them and where they were found (a kind of read in ``latency``). Raises OSError.
        """
        end = min(offset + size, file.size)
        if end <= offset:
            return await source.read(
                offset, size, file.size
            ), SOURCE_READ  # past the end that is known here
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
        if missing == count >= BORROWED:
            borrowed = self._cleancache.borrow_pages(file.key, first, count)
            if borrowed is not None:
                if end - offset < len(borrowed):
                    return memoryview(borrowed)[offset - start : end - start], CLEANCACHE_HIT
                return borrowed, CLEANCACHE_HIT
        version = file.version
        self._get_missing(file, first, pages)
        if None not in pages:
            return self._reply(pages, first, offset, end), CLEANCACHE_HIT
        exact = offset == start and end in (file.size, start + count * page_size)
        exact = exact and all(f.first >= first and f.stop <= first + count for f in file.in_flight)
        try:
            if not file.in_flight and pages.count(None) == count:
                data = await self._read_whole(file, source, version, first, count, offset, end)
                return data, SOURCE_READ
            end = min(end, await self._read_missing(file, source, version, first, pages))
        except OSError:
            # The error may concern bytes that this read did not ask for: the rest of a page, or of
            # another read's range.
            if exact:
                raise
            return await source.read(offset, end - offset, file.size), SOURCE_READ
        return self._reply(pages, first, offset, end), SOURCE_READ

    def _reply(self, pages: list[bytes | None], first: int, offset: int, end: int) -> Buffer:
        """Cut ``offset <= i < end`` out of pages from index ``first`` on, up to the first gap."""
        if None in pages:
            pages = pages[: pages.index(None)]
        data = b"".join(pages)  # type: ignore[arg-type]  # no None is left
        start = first * self.page_size
        if offset == start and end - start == len(data):
            return data
        return memoryview(data)[offset - start : max(end - start, 0)]

    def _get_missing(self, file: CachedFile, first: int, pages: list[bytes | None]) -> None:
        """Ask cleancache for each run of missing pages, and make what it has resident."""
        for start, stop in _runs(pages):
            got = self._cleancache.get_pages(file.key, first + start, stop - start)
            if got is None:
                return
            pages[start:stop] = got
            self._resident.insert(file.serial, first + start, got)
            self._reclaim()

    async def _read_whole(
        self,
        file: CachedFile,
        source: SourceFile,
        version: int,
        first: int,
        count: int,
        offset: int,
        end: int,
    ) -> Buffer:
        """``_read_missing`` where every page is, and nobody else reads the file's source."""
        flight = _InFlightRead(first, first + count, version)
        file.in_flight.append(flight)
        file.pins += 1
        try:
            await self._fly(file, source, flight)
        finally:
            file.pins -= 1
        if flight.error is not None:
            raise OSError(*flight.error.args)
        start = first * self.page_size
        return memoryview(flight.data)[offset - start : end - start]

    async def _read_missing(
        self,
        file: CachedFile,
        source: SourceFile,
        version: int,
        first: int,
        pages: list[bytes | None],
    ) -> int:
        """Fill what is still missing from the source: join flights, start one per remaining run.

        Returns the offset at which the source was found to end, if a read came short, else the end
        of the last page.
        """
        file.pins += 1
        try:
            joined = self._join(file, version, first, pages)
            wanted = pages.copy()
            for flight in joined:
                low, high = max(flight.first - first, 0), min(flight.stop - first, len(pages))
                wanted[low:high] = [b""] * (high - low)
            own = [_InFlightRead(first + start, first + stop, version) for start, stop in _runs(wanted)]
            file.in_flight.extend(own)
            if len(own) == 1:
                await self._fly(file, source, own[0])
            else:
                async with trio.open_nursery() as nursery:
                    for flight in own:
                        nursery.start_soon(self._fly, file, source, flight)
            for flight in joined:
                await flight.done.wait()
        finally:
            file.pins -= 1
        for flight in (*joined, *own):
            if flight.error is not None:
                raise OSError(*flight.error.args)
            self._take(flight, first, pages)
        ends = [flight.end(self.page_size) for flight in (*joined, *own)]
        return min(
            (end for end in ends if end is not None), default=(first + len(pages)) * self.page_size
        )

    def _join(
        self, file: CachedFile, version: int, first: int, pages: list[bytes | None]
    ) -> list[_InFlightRead]:
        """Flights of this version that bring a page that is missing."""
        joined = []
        for flight in file.in_flight:
            low, high = max(flight.first - first, 0), min(flight.stop - first, len(pages))
            if flight.version == version and low < high and None in pages[low:high]:
                self._shared_reads += pages[low:high].count(None)
                joined.append(flight)
        return joined

    async def _fly(self, file: CachedFile, source: SourceFile, flight: _InFlightRead) -> None:
        """Read the source for one flight and make its pages resident, unless the file changed."""
        page_size = self.page_size
        try:
            offset, size = flight.first * page_size, (flight.stop - flight.first) * page_size
            flight.data = await source.read(offset, size, file.size)
        except OSError as exc:
            flight.error = exc
        except BaseException:
            flight.error = OSError(5, "interrupted")  # for those who joined; we are cancelled
            raise
        finally:
            file.in_flight.remove(flight)
            flight.done.set()
        if flight.version != file.version:
            self._stale_reads += 1
        elif flight.error is None and (self._limit or self._cleancache.pool_id >= 0):
            data = flight.data
            # A page that ends before the end of the file that we know (the file shrank under us)
            # is an answer, but nothing to keep.
            if len(data) < min(flight.stop * page_size, file.size) - flight.first * page_size:
                data = memoryview(data)[: len(data) // page_size * page_size]
            self._resident.insert_data(file.serial, flight.first, data)
            self._reclaim()

    def _take(self, flight: _InFlightRead, first: int, pages: list[bytes | None]) -> None:
        """Copy a flight's pages into the gaps of ``pages``; the last one is padded with zeros."""
        page_size = self.page_size
        view = memoryview(flight.data)
        for index in range(max(flight.first, first), min(flight.stop, first + len(pages))):
            if pages[index - first] is None:
                start = (index - flight.first) * page_size
                page = bytes(view[start : start + page_size])
                if page:
                    pages[index - first] = page.ljust(page_size, b"\0")

    # -- residence --------------------------------------------------------------------------

    def _reclaim(self) -> None:
        """Evict down to the limit, offering every victim to cleancache, in runs of one file."""
        over = len(self._resident) * self._cost - self._limit
        if over <= 0:
            return
        for serial, pages in self._resident.evict(-(-over // self._cost)):
            self._evictions += len(pages)
            self._cleancache.put_pages(self._by_serial[serial].key, pages)

    # -- invalidation -----------------------------------------------------------------------

    def invalidate(self, file: CachedFile, start: int = 0, stop: int | None = None) -> None:
        """The bytes ``start <= i < stop`` (to the end if None) are no longer what they were.

        Moves the version on: reads under way will not insert what they bring.
        """
        self.new_version(file)
        first = start // self.page_size
        last = None if stop is None else -(-stop // self.page_size)
        if first == 0 and last is None:
            self._cleancache.flush_inode(file.key)
        else:
            self._cleancache.flush_pages(file.key, first, last)
        self._resident.discard(file.serial, first, last)

    def new_version(self, file: CachedFile) -> None:
        """What began before now is overtaken."""
        self.clock += 1
        file.version = self.clock

    def changing(self, file: CachedFile) -> "_Changing":
        """Around a change of ours to the file, one at a time.

        What one saw of the file after its change is what the next one sees before.
        """
        return _Changing(file)

    def mutating(self, file: CachedFile, start: int = 0, stop: int | None = None) -> "_Mutating":
        """Around a change of ours to these bytes of the source: invalidate before and after.

        Without a stop it moves the end of the file: from the old end on, if that is before
        ``start``, as the page that was the last one grows.
        """
        return _Mutating(self, file, start, stop)

    # -- operator's controls ------------------------------------------------------------------

    @property
    def limit(self) -> int:
        """Bytes that resident pages may take."""
        return self._limit

    @property
    def used(self) -> int:
        """Bytes that they take."""
        return len(self._resident) * self._cost

    def resize(self, limit: int) -> None:
        """Change the limit and evict down to it at once."""
        self._limit = limit
        self._reclaim()

    def drop(self) -> None:
        """Evict every page; cleancache may keep them (as the kernel's ``drop_caches`` did)."""
        limit, self._limit = self._limit, 0
        self._reclaim()
        self._limit = limit

    def stats(self) -> PageCacheStats:
        """A snapshot."""
        return PageCacheStats(
            limit=self._limit,
            used=self.used,
            resident=len(self._resident),
            files=len(self._files),
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
            shared_reads=self._shared_reads,
            stale_reads=self._stale_reads,
            lost_files=self._lost_files,
            lost_pages=self._lost_pages,
        )


class _Changing:
    """``PageCache.changing``. A class, as a generator and its wrapper take longer than a write."""

    __slots__ = ("_file",)

    def __init__(self, file: CachedFile) -> None:
        self._file = file

    async def __aenter__(self) -> None:
        file = self._file
        if file.lock is None:
            file.lock = trio.Lock()
        file.pins += 1
        try:
            # A free lock is taken without a checkpoint. It is fair: a released one is held by the
            # first who waits, at once.
            if file.lock.locked():
                await file.lock.acquire()
            else:
                file.lock.acquire_nowait()
        except BaseException:
            file.pins -= 1
            raise
        file.mutations += 1

    async def __aexit__(self, *exc: object) -> None:
        file = self._file
        assert file.lock is not None
        file.mutations -= 1
        file.lock.release()
        file.pins -= 1


class _Mutating(_Changing):
    """``PageCache.mutating``."""

    __slots__ = ("_pagecache", "_start", "_stop")

    def __init__(self, pagecache: PageCache, file: CachedFile, start: int, stop: int | None) -> None:
        super().__init__(file)
        self._pagecache = pagecache
        self._start = start
        self._stop = stop

    async def __aenter__(self) -> None:
        await super().__aenter__()
        if self._stop is None:
            self._start = min(self._start, self._file.size)
        self._pagecache.invalidate(self._file, self._start, self._stop)

    async def __aexit__(self, *exc: object) -> None:
        try:
            self._pagecache.invalidate(self._file, self._start, self._stop)
        finally:
            await super().__aexit__()


def _runs(pages: list[bytes | None]) -> list[tuple[int, int]]:
    """The half-open index ranges in which ``pages`` is None."""
    runs: list[tuple[int, int]] = []
    start = None
    for i, page in enumerate(pages):
        if page is None:
            if start is None:
                start = i
        elif start is not None:
            runs.append((start, i))
            start = None
    if start is not None:
        runs.append((start, len(pages)))
    return runs
