"""Read what no cache has from the source, each page once at a time.

Main thread only. A read remembers the file's version when it begins. What it brings is handed to the
page cache only if no invalidation came meanwhile (the version is still the same). The readers get it
all the same: their requests came before the change was done.
"""

from collections.abc import Callable
from typing import Protocol

import trio

from cleanfs.cache.files import CachedFile
from cleanfs.cache.in_flight import Buffer, InFlightRead, missing_runs
from cleanfs.eager import before_wait


class SourceFile(Protocol):
    """One open file of the source."""

    async def read(self, offset: int, size: int, file_size: int) -> Buffer:
        """Read ``size`` bytes; short only at the end. Raises OSError.

        ``file_size`` is what is known of the file's size, 0 if nothing is.
        """


class SourceReads:
    """The reads of the source that the page cache makes (see the module)."""

    def __init__(self, page_size: int, insert: Callable[[CachedFile, InFlightRead], None]) -> None:
        """Call ``insert`` with each read whose pages are kept, if it succeeds and is not stale."""
        self._page_size = page_size
        self._insert = insert
        self.shared_pages = 0
        """Pages that were missing here and came with another reader's read."""
        self.stale_reads = 0
        """Reads whose pages were not inserted: the file had changed meanwhile."""

    async def read_whole(
        self, file: CachedFile, source: SourceFile, first: int, count: int, *, keeps: bool
    ) -> Buffer:
        """Read ``count`` pages from index ``first`` on, while nothing else reads the file's source.

        The same as ``read_missing`` without its bookkeeping, and without a copy page by page.
        """
        read = InFlightRead(first, first + count, file.version, self._page_size, keeps=keeps)
        file.in_flight.append(read)
        file.reads_in_flight += 1
        file.pins += 1
        try:
            await self._run(file, source, read)
        finally:
            file.pins -= 1
        read.raise_error()
        return read.data

    async def read_missing(
        self,
        file: CachedFile,
        source: SourceFile,
        first: int,
        pages: list[bytes | None],
        *,
        keeps: bool,
    ) -> int:
        """Fill the gaps of ``pages``: join reads under way, and start one for each gap that is left.

        Returns the offset at which the source was found to end, if a read came short, else the end
        of the last page.
        """
        file.pins += 1
        try:
            joined = self._join(file, first, pages)
            own = self._start(file, first, pages, joined, keeps=keeps)
            if len(own) == 1:
                await self._run(file, source, own[0])
            else:
                async with trio.open_nursery() as nursery:
                    for read in own:
                        nursery.start_soon(self._run, file, source, read)
            for read in joined:
                await before_wait()
                await read.done.wait()
        finally:
            file.pins -= 1
        reads = (*joined, *own)
        for read in reads:
            read.raise_error()
            read.fill(first, pages)
        short_ends = [read.short_end for read in reads]
        whole = (first + len(pages)) * self._page_size
        return min((end for end in short_ends if end is not None), default=whole)

    def _join(self, file: CachedFile, first: int, pages: list[bytes | None]) -> list[InFlightRead]:
        """Reads under way at the file's version that bring a missing page."""
        joined = []
        for read in file.in_flight:
            missing = pages[read.within(first, len(pages))].count(None)
            if missing and read.version == file.version:
                self.shared_pages += missing
                joined.append(read)
        return joined

    def _start(
        self,
        file: CachedFile,
        first: int,
        pages: list[bytes | None],
        joined: list[InFlightRead],
        *,
        keeps: bool,
    ) -> list[InFlightRead]:
        """Register a read for each run of missing pages that those joined do not bring."""
        wanted = pages.copy()
        for read in joined:
            covered = read.within(first, len(pages))
            wanted[covered] = [b""] * (covered.stop - covered.start)
        own = [
            InFlightRead(first + start, first + stop, file.version, self._page_size, keeps=keeps)
            for start, stop in missing_runs(wanted)
        ]
        file.in_flight.extend(own)
        file.reads_in_flight += len(own)
        return own

    async def _run(self, file: CachedFile, source: SourceFile, read: InFlightRead) -> None:
        """Make one registered read, and insert what it brought unless the file has changed."""
        try:
            read.data = await source.read(read.offset, read.size, file.size)
        except OSError as exc:
            read.error = exc
        except BaseException:
            read.error = OSError(5, "interrupted")  # for the reads that joined: this task is cancelled
            raise
        finally:
            file.in_flight.remove(read)
            file.reads_in_flight -= 1
            read.done.set()
        if read.version != file.version:
            self.stale_reads += 1
        elif read.error is None and read.keeps:
            self._insert(file, read)
