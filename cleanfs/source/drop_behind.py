"""Drop-behind: decide which reads stay in the source's page cache for a while, and when they go.

RWF_DONTCACHE drops what was read at once, but not what the kernel reads ahead because of it. Read-ahead
begins with a read at offset 0, and with the second of two consecutive reads (Linux 6.18). RWF_DONTCACHE
is right for a lone read elsewhere. In a stream it is not: read-ahead brings large folios, and the
requests of the mount overlap and overtake each other. What is dropped after the first use is then read
from the disk again for the second (at least a tenth more reads were seen). So a stream is read as any
program would, and dropped some way behind. Pure: no I/O in here.
"""

from typing import TYPE_CHECKING, Final

from cleanfs.cache.state import native

NEAR: Final = 4 << 20
"""A read within so many bytes of what a stream has read belongs to it. The kernel sends read-ahead in
several requests at a time, in any order."""

READ_AHEAD: Final = 32 << 10
"""The least size, in bytes, of read-ahead requests that may overtake each other. A smaller read belongs
to a stream only if it begins where that ends. Otherwise random reads would be taken for a stream, and
all of the file be dropped again and again, also what was not read yet, or just written."""

WINDOW: Final = 3 * NEAR
"""Bytes that a stream may leave in the source's page cache, before all but ``NEAR`` are dropped."""

FOLIO: Final = 2 << 20
"""Bytes before a range that are dropped with it. No folio is larger, and one that straddled the end of
the range before was left."""

AHEAD: Final = 16 << 20
"""Bytes behind the end of a stream that are dropped with it when the handle is closed: the source's
read-ahead may have brought them. 8 MiB were seen where read_ahead_kb is 2560."""

Span = tuple[int, int]
"""Bytes ``offset, length`` of a file."""


class PythonStream:
    """The reads of one handle."""

    __slots__ = ("_expected", "_start", "_stop")

    def __init__(self) -> None:
        """Start without a read."""
        self._start = self._stop = 0
        """The range that these reads may have left in the source's page cache."""
        self._expected = 0
        """The end of the last lone read: a read that begins here makes it a stream."""

    def lingers(self, offset: int, size: int, file_size: int) -> bool:
        """Tell whether a read is part of a stream, so that it is not dropped at once."""
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
        """Note a read that lingers. Returns the span to drop now, if any."""
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
        """Return the span to drop when the handle is closed, if any."""
        return _span(self._start, self._stop + AHEAD) if self._stop else None


def _span(start: int, stop: int) -> Span:
    start = max(start - FOLIO, 0)
    return start, stop - start


Stream = PythonStream
if native is not None and not TYPE_CHECKING:
    Stream = native.Stream
