"""Ranges of an open file that were read since they were last written: their pages may be stale.

The kernel copies a program's write into its own pages first, page by page, and sends it when all are
filled. If it drops a filled page meanwhile, and a program reads it, the READ reaches the daemon before
the WRITE. Its reply holds the old bytes of the source, and the kernel keeps the page made of it. So
pages that were read before they are written are invalidated upon the write.

Nothing bounds the time between filling and sending: the program may wait for a page that is being read,
or its data may be in a mapping of another file. So reads are remembered until the pages are written.

Only a read that comes after such a drop can bring a stale page. Where the kernel drops pages by itself,
when it learns of another mtime (FUSE_AUTO_INVAL_DATA), every read may be one. Where it drops them only
when told to (FUSE_EXPLICIT_INVAL_DATA), reads are remembered from the first drop on that can have hit
a filled page. ``docs/coherency.md`` lists all that drops a page.

Main thread only; no call awaits.
"""

from bisect import bisect_left, bisect_right
from typing import Final

from cleanfs.cache.state import FileState

MAX_RANGES: Final = 1024
"""Ranges remembered of a file, 80 bytes each. Beyond, neighbours are merged: a write between them then
invalidates pages needlessly."""


class RangeSet:
    """The bytes of a file, open for writing, that were read since they were last written."""

    __slots__ = ("_file", "_starts", "_stops", "under_way", "writers")

    def __init__(self, file: FileState, *, dropped: bool) -> None:
        """Start empty: nothing of the file was read yet."""
        self._file = file
        self.writers = 0
        """Open handles that can write."""
        self.dropped = dropped
        self.under_way: list[tuple[int, int]] = []
        """Reads without a reply so far."""
        # Invariant: the ranges start <= i < stop are in order, and no two overlap or touch.
        self._starts: list[int] = []
        self._stops: list[int] = []

    @property
    def dropped(self) -> bool:
        """Whether the kernel may drop, or have dropped, a page between its filling and its sending.

        Only then are reads remembered.
        """
        return self._file.remembers_reads

    @dropped.setter
    def dropped(self, dropped: bool) -> None:
        self._file.remembers_reads = dropped

    def begin(self, start: int, stop: int) -> None:
        """Begin a read of these bytes. The kernel keeps the pages locked until the reply."""
        if self.dropped:
            self.read(start, stop)
        self.under_way.append((start, stop))

    def end(self, start: int, stop: int) -> None:
        """End a read, as its reply is about to be sent."""
        self.under_way.remove((start, stop))

    def being_read(self, start: int, stop: int) -> bool:
        """Tell whether a read of these bytes is under way."""
        return any(first < stop and start < end for first, end in self.under_way)

    def read(self, start: int, stop: int) -> None:
        """Remember that these bytes are read."""
        starts, stops = self._starts, self._stops
        first, end = bisect_left(stops, start), bisect_right(starts, stop)
        if first < end:  # those that it overlaps or touches
            start, stop = min(start, starts[first]), max(stop, stops[end - 1])
        starts[first:end] = [start]
        stops[first:end] = [stop]
        self._bound()

    def written(self, start: int, stop: int, page_size: int) -> bool:
        """Forget the pages of these bytes. Returns whether one of them was read."""
        start -= start % page_size
        stop += -stop % page_size
        starts, stops = self._starts, self._stops
        first, end = bisect_right(stops, start), bisect_left(starts, stop)
        if first >= end:
            return False
        before, after = (starts[first], start), (stop, stops[end - 1])
        left = [(begin, until) for begin, until in (before, after) if begin < until]
        starts[first:end] = [begin for begin, _ in left]
        stops[first:end] = [until for _, until in left]
        self._bound()
        return True

    def _bound(self) -> None:
        if len(self._starts) > MAX_RANGES:
            last = self._stops[-1]
            self._starts = self._starts[::2]
            self._stops = self._stops[1::2]
            if len(self._stops) < len(self._starts):
                self._stops.append(last)
