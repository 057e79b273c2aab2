"""In-flight reads: reads of the source that are under way, which later reads of the same pages join.

Main thread only, like all of the page cache. A read joins another one (*singleflight*) only if that
began at the same version of the file: it then brings the bytes that a read of its own would bring.
"""

import trio

Buffer = bytes | bytearray | memoryview


class InFlightRead:
    """A source read under way: pages ``first <= index < stop`` at one version."""

    __slots__ = ("data", "done", "error", "first", "keeps", "page_size", "stop", "version")

    def __init__(
        self, first: int, stop: int, version: int, page_size: int, *, keeps: bool = True
    ) -> None:
        """Describe a read that is about to begin. ``keeps`` says whether its pages are inserted."""
        self.keeps = keeps
        self.first = first
        self.stop = stop
        self.version = version
        self.page_size = page_size
        self.done = trio.Event()
        self.data: Buffer = b""
        self.error: OSError | None = None

    @property
    def offset(self) -> int:
        """Return where it begins, in bytes."""
        return self.first * self.page_size

    @property
    def size(self) -> int:
        """Return how many bytes it requests."""
        return (self.stop - self.first) * self.page_size

    @property
    def short_end(self) -> int | None:
        """Return where the source ended, if the read came short."""
        return None if len(self.data) == self.size else self.offset + len(self.data)

    def within(self, first: int, count: int) -> slice:
        """Return the slice that its pages are of ``count`` pages from index ``first`` on."""
        low = max(self.first - first, 0)
        return slice(low, max(min(self.stop - first, count), low))

    def raise_error(self) -> None:
        """Raise its error anew, if it failed: each reader gets an exception of its own."""
        if self.error is not None:
            raise OSError(*self.error.args)

    def fill(self, first: int, pages: list[bytes | None]) -> None:
        """Copy its pages into the gaps of ``pages``; the last one is padded with zeros."""
        page_size = self.page_size
        view = memoryview(self.data)
        for index in range(max(self.first, first), min(self.stop, first + len(pages))):
            if pages[index - first] is None:
                start = (index - self.first) * page_size
                page = bytes(view[start : start + page_size])
                if page:
                    pages[index - first] = page.ljust(page_size, b"\0")


def missing_runs(pages: list[bytes | None]) -> list[tuple[int, int]]:
    """Return the half-open index ranges in which ``pages`` is None."""
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
