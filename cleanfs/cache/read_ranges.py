"""What the kernel may have put into its pages of a file before a program's write of them reaches us.

A program's write goes into the kernel's pages first, page by page, and is sent when all are filled.
If the kernel drops a filled page meanwhile, and somebody reads it, that read comes to us before the
write does, and finds what the source has; the page that is made of it stays. So pages that were read
before they are written are dropped upon the write.

Nothing bounds the time between filling and sending: the program may wait for a page that is being read,
or its data may be in a mapping of another file. So reads are remembered until the pages are written.

Only a read that comes after such a drop can find that. Where the kernel drops pages by itself, as it
is told of another mtime (FUSE_AUTO_INVAL_DATA), every read may be one. Where it does so only when it is
told to (FUSE_EXPLICIT_INVAL_DATA), reads are remembered from the first drop on that may have met a
write. ``docs/coherency.md`` lists all that drops a page.
"""

from bisect import bisect_left, bisect_right
from typing import Final

MAX_RANGES: Final = 1024
"""Ranges remembered of a file, 80 bytes each. Beyond, neighbours become one: a write between them has
the kernel drop pages for nothing."""


class RangeSet:
    """Bytes of a file that is open for writing which were read since they were last written."""

    __slots__ = ("_starts", "_stops", "dropped", "under_way", "writers")

    def __init__(self, *, dropped: bool) -> None:
        """Nothing was read yet."""
        self.writers = 0
        """Open handles that can write."""
        self.dropped = dropped
        """Whether the kernel may have dropped a page between its filling and its sending, or will."""
        self.under_way: list[tuple[int, int]] = []
        """Reads that are not answered yet."""
        # Ranges start <= i < stop in order, with bytes between any two.
        self._starts: list[int] = []
        self._stops: list[int] = []

    def begin(self, start: int, stop: int) -> None:
        """A read of these bytes came. The kernel keeps the pages locked until it is answered."""
        if self.dropped:
            self.read(start, stop)
        self.under_way.append((start, stop))

    def end(self, start: int, stop: int) -> None:
        """It is about to be answered."""
        self.under_way.remove((start, stop))

    def being_read(self, start: int, stop: int) -> bool:
        """Whether a read of these bytes is under way."""
        return any(first < stop and start < end for first, end in self.under_way)

    def read(self, start: int, stop: int) -> None:
        """These bytes are read."""
        starts, stops = self._starts, self._stops
        first, end = bisect_left(stops, start), bisect_right(starts, stop)
        if first < end:  # those that it overlaps or touches
            start, stop = min(start, starts[first]), max(stop, stops[end - 1])
        starts[first:end] = [start]
        stops[first:end] = [stop]
        self._bound()

    def written(self, start: int, stop: int, page_size: int) -> bool:
        """Whether a page of these bytes was read; from now on it was not."""
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
