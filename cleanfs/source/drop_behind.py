"""What the reads of one handle leave in the source's page cache, and when it is to go.

RWF_DONTCACHE drops what was read at once, but not what the source's kernel reads ahead because of it:
that begins with a read at offset 0, and with the second of two that follow each other (Linux 6.18). For
a lone read elsewhere it is right. In a stream it is not: the source's read-ahead brings large folios,
the requests of the mount overlap and overtake each other, and what is dropped after the first use is
read from the disk again for the second (a tenth and more on top was seen). So a stream is read as any
program would, and dropped some way behind. Pure: no I/O in here.
"""

from typing import Final

NEAR: Final = 4 << 20
"""Bytes from what a stream has read within which a read belongs to it. The kernel sends read-ahead in
several requests at a time, in any order."""

READ_AHEAD: Final = 32 << 10
"""Bytes that a request of read-ahead has, at least, once it may overtake another. A smaller one belongs
to a stream only where that ends: random reads of some file would be taken for a stream else, and all of
the file be dropped again and again, also what was not read yet, or just written."""

WINDOW: Final = 3 * NEAR
"""Bytes that a stream may leave in the source's page cache, before all but ``NEAR`` are dropped."""

FOLIO: Final = 2 << 20
"""Bytes before a range that are dropped with it: no folio is larger, and one that the end of the last
range cut through was left."""

AHEAD: Final = 16 << 20
"""Bytes behind the end of a stream that are dropped with it when the handle is closed, as read-ahead of
the source may have brought them: 8 MiB were seen where read_ahead_kb is 2560."""

Span = tuple[int, int]
"""Bytes ``offset, length`` of a file."""


class Stream:
    """The reads of one handle."""

    __slots__ = ("_expected", "_start", "_stop")

    def __init__(self) -> None:
        """No read yet."""
        self._start = self._stop = 0
        """What may be in the source's page cache because of us."""
        self._expected = 0
        """Where a read would begin that makes a stream of the one before."""

    def lingers(self, offset: int, size: int, file_size: int) -> bool:
        """Whether a read is part of a stream, so that it is not to be dropped at once."""
        if offset == 0 and size >= file_size > 0:
            return False  # all that there is to read
        if self._stop and size >= READ_AHEAD:
            near = self._start - NEAR <= offset <= self._stop + NEAR
        else:
            near = self._stop > 0 and offset == self._stop
        if near:
            return True
        if offset == self._expected:
            return True
        self._expected = offset + size
        return False

    def passed(self, offset: int, size: int) -> Span | None:
        """A read that lingers was made. What is to be dropped now, if anything."""
        start, stop = self._start, self._stop
        if not stop or not start - NEAR <= offset <= stop + NEAR:
            self._start, self._stop = offset, offset + size  # a new stream
            return _span(start, stop) if stop else None
        start = self._start = min(start, offset)
        self._stop = max(stop, offset + size)
        if self._stop - self._start <= WINDOW:
            return None
        self._start = self._stop - NEAR
        return _span(start, self._start)

    def rest(self) -> Span | None:
        """What is to be dropped when the handle is closed, if anything."""
        return _span(self._start, self._stop + AHEAD) if self._stop else None


def _span(start: int, stop: int) -> Span:
    start = max(start - FOLIO, 0)
    return start, stop - start
