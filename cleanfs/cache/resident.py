"""The resident pages of the page cache: found by file and index, evicted in the order of reclaim.

There are two engines. ``PythonResident`` is the reference: a dictionary and a policy of ``reclaim``.
The native one (``native/resident.hpp``) does the same, with ``TwoListReclaim``'s policy, and is faster.

A file is named by a serial number, which is never used again; a page is ``bytes``. Main thread only; no
call awaits.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol, cast

from cleanfs.backends.engines import native_module
from cleanfs.cache.reclaim import ReclaimPolicy, TwoListReclaim

INDEX_BITS = 52
"""A page id is ``serial of the file << INDEX_BITS | page index``: ranges of pages are int ranges."""

INDEX_MASK = (1 << INDEX_BITS) - 1

Run = tuple[int, list[tuple[int, bytes]]]
"""Pages of one file: its serial, and each page with its index."""


class Resident(Protocol):
    """See the module. Every call is linear in the pages that it names, or finds."""

    @property
    def overhead(self) -> int:
        """Return the measured RAM per resident page beyond its bytes, with an evicted page's shadow."""

    def __len__(self) -> int:
        """Return how many pages are resident."""

    @property
    def refaults(self) -> int:
        """Count the pages that came back soon after they were evicted."""

    @property
    def activations(self) -> int:
        """Count the pages that reclaim found referenced."""

    def look_up(
        self, file: int, first: int, count: int, start: int, stop: int
    ) -> bytes | list[bytes | None]:
        """Look up ``count`` pages from index ``first`` on, and mark them referenced.

        Returns the bytes ``start <= i < stop`` of the range if all are resident, else the pages, with
        None for each that is not.
        """

    def insert(self, file: int, first: int, pages: Sequence[bytes | None]) -> None:
        """Make pages from index ``first`` on resident, except None and those that are already."""

    def insert_data(self, file: int, first: int, data: bytes | bytearray | memoryview) -> None:
        """Insert pages that lie one after the other in ``data``; the last one is padded with zeros."""

    def evict(self, count: int) -> list[Run]:
        """Evict up to ``count`` pages. Returns them, the first to go first."""

    def discard(self, file: int, first: int, stop: int | None) -> None:
        """Forget the pages ``first <= index < stop``; all from ``first`` on if stop is None."""

    def indices(self, file: int) -> list[int]:
        """List the indices of a file's resident pages, in order."""


class PythonResident:
    """The reference (see the module)."""

    overhead = 768

    def __init__(self, page_size: int, policy: ReclaimPolicy | None = None) -> None:
        """Start with no page."""
        self._page_size = page_size
        self._policy = TwoListReclaim() if policy is None else policy
        self._pages: dict[int, bytes] = {}
        self._files: dict[int, set[int]] = {}

    def __len__(self) -> int:
        """Return how many pages are resident."""
        return len(self._pages)

    @property
    def refaults(self) -> int:
        """Count the pages that came back soon after they were evicted."""
        return self._policy.refaults

    @property
    def activations(self) -> int:
        """Count the pages that reclaim found referenced."""
        return self._policy.activations

    def look_up(
        self, file: int, first: int, count: int, start: int, stop: int
    ) -> bytes | list[bytes | None]:
        """Look pages up, and mark them referenced."""
        base = file << INDEX_BITS | first
        ids = range(base, base + count)
        pages = list(map(self._pages.get, ids))
        if None in pages:
            self._policy.touch(
                [page_id for page_id, page in zip(ids, pages, strict=True) if page is not None]
            )
            return pages
        self._policy.touch(ids)
        data = b"".join(cast(list[bytes], pages))
        return data if stop - start == len(data) else data[start:stop]

    def insert(self, file: int, first: int, pages: Sequence[bytes | None]) -> None:
        """Make pages resident."""
        base = file << INDEX_BITS | first
        resident = self._pages
        new = {
            base + i: page
            for i, page in enumerate(pages)
            if page is not None and base + i not in resident
        }
        if new:
            resident.update(new)
            self._files.setdefault(file, set()).update(new)
            self._policy.insert(new)

    def insert_data(self, file: int, first: int, data: bytes | bytearray | memoryview) -> None:
        """Cut pages, and make them resident."""
        view, size = memoryview(data), self._page_size
        pages = [bytes(view[at : at + size]).ljust(size, b"\0") for at in range(0, len(data), size)]
        self.insert(file, first, pages)

    def evict(self, count: int) -> list[Run]:
        """Evict victims, in runs of one file."""
        runs = []
        for file, ids in groupby(self._policy.victims(count), lambda page_id: page_id >> INDEX_BITS):
            run = list(ids)
            self._forget(file, run)
            pages = self._pages
            runs.append((file, [(page_id & INDEX_MASK, pages.pop(page_id)) for page_id in run]))
        return runs

    def discard(self, file: int, first: int, stop: int | None) -> None:
        """Forget a range."""
        known = self._files.get(file)
        if known is None:
            return
        low, high = file << INDEX_BITS | first, file << INDEX_BITS | INDEX_MASK
        if stop is not None:
            high = min(high, file << INDEX_BITS | stop)
        if high - low < len(known):
            gone = [page_id for page_id in range(low, high) if page_id in known]
        else:
            gone = [page_id for page_id in known if low <= page_id < high]
        self._forget(file, gone)
        for page_id in gone:
            del self._pages[page_id]
        self._policy.discard(gone)

    def indices(self, file: int) -> list[int]:
        """List the indices of a file's resident pages, in order."""
        return sorted(page_id & INDEX_MASK for page_id in self._files.get(file, ()))

    def _forget(self, file: int, ids: list[int]) -> None:
        known = self._files[file]
        known.difference_update(ids)
        if not known:
            del self._files[file]


def make_resident(page_size: int) -> Resident:
    """Make an empty one for pages of ``page_size`` bytes. Raises ValueError (``native_module``)."""
    native = native_module("cleanfs.cache._pagecache")
    if native is None:
        return PythonResident(page_size)
    resident: Resident = native.NativeResident(page_size)
    return resident
