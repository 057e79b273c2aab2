"""The cleancache contract: what a frontend may request and what a backend must keep.

After ``struct cleancache_ops`` of Linux 3.0 to 5.16 (``include/linux/cleancache.h``, Dan
Magenheimer's patch series of 2010). A page is named by a *handle*: pool id, file key, page index.

 1. ``init_fs`` gives a pool id >= 0 or refuses with a negative one. ``init_shared_fs`` gives
    the same id to everyone who names the same UUID, or refuses.
 2. A put always "succeeds" for the caller; a later get may hit or miss. Only clean pages are put.
 3. A get gives the page's bytes, all ``page_size`` of them, or None.
 4. A hit on a private pool removes the page (exclusive cache); on a shared pool it stays.
 5. put-put-get: after AAA and then BBB were put at one handle, no get gives AAA, also when the
    second put was refused or dropped: a failed put still discards the older copy.
 6. get-get: after a miss, every get of that handle misses until the next put.
 7. When ``flush_page``, ``flush_pages``, ``flush_inode`` or ``flush_fs`` returns, no get can give
    what was there before. ``flush_fs`` also surrenders the pool id; on a shared pool it ends one
    sharer's use, and the last one's takes the pages with it. "Flush" means discard, never write.
 8. No ordering is promised between two callers that race on one handle: the caller holds the page.

A backend is called from one thread, never while another call is in progress. It may raise: the
frontend turns that into a miss. It must not wait for anything.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable
from uuid import UUID


class FileKey(NamedTuple):
    """Names a file for as long as the file exists, unlike an inode number, which is used again.

    ``generation`` is the opaque identity that the source file system gives (its NFS file handle),
    empty where it gives none.
    """

    device: int
    inode: int
    generation: bytes


@runtime_checkable
class CleancacheOps(Protocol):
    """Declares what the frontend calls. Indices are >= 0; pages are bytes of the pool's page size."""

    def init_fs(self, page_size: int) -> int:
        """Open a private pool of pages of ``page_size`` bytes: its id, or a negative number."""

    def init_shared_fs(self, uuid: UUID, page_size: int) -> int:
        """Open or join the pool that ``uuid`` names: its id, or a negative number.

        Refuses a page size other than the one that the pool already has.
        """

    def get_page(self, pool_id: int, key: FileKey, index: int) -> bytes | None:
        """Get a page; None if it is not there."""

    def put_page(self, pool_id: int, key: FileKey, index: int, page: bytes) -> None:
        """Offer a clean page."""

    def get_pages(self, pool_id: int, key: FileKey, first: int, count: int) -> list[bytes | None]:
        """Make ``count`` gets, from index ``first`` on, in one call. One FUSE read is 32 pages."""

    def put_pages(self, pool_id: int, key: FileKey, pages: Sequence[tuple[int, bytes]]) -> None:
        """Make many puts, of (index, page), in one call."""

    def flush_page(self, pool_id: int, key: FileKey, index: int) -> None:
        """Discard one page."""

    def flush_pages(self, pool_id: int, key: FileKey, start: int, stop: int | None) -> None:
        """Discard the pages ``start <= index < stop``; all from ``start`` on if stop is None."""

    def flush_inode(self, pool_id: int, key: FileKey) -> None:
        """Discard all pages of a file."""

    def flush_fs(self, pool_id: int) -> None:
        """Surrender a pool (see 7)."""


@runtime_checkable
class BorrowOps(Protocol):
    """Declares what a backend may offer besides, for ranges that the caller does not keep."""

    def borrow_pages(self, pool_id: int, key: FileKey, first: int, count: int) -> bytes | None:
        """Get ``count`` pages from index ``first`` on, and put them back, in one call.

        Returns their bytes, one page after the other. If one of them is not there, returns None and
        leaves the backend as it was.
        """


@runtime_checkable
class FastOps(Protocol):
    """What a native backend may offer, so that the FUSE channel can serve hits without Python."""

    def fast_ops(self) -> object:
        """A capsule with a table of C++ functions (``native/fast_ops.hpp``), valid as long as this."""


@runtime_checkable
class Backend(CleancacheOps, Protocol):
    """A ``CleancacheOps`` that an operator can look at and size while it runs."""

    name: str

    engine: str
    """What does the work, for the operator: ``native``, ``python``."""

    @property
    def pool_limit(self) -> int:
        """Return the bytes of RAM that the backend may use, metadata included."""

    def resize(self, pool_limit: int) -> None:
        """Change the limit, evicting down to it at once.

        Raises ValueError, and changes nothing, for a limit below what works.
        """

    def counters(self) -> Mapping[str, int]:
        """Return a snapshot of the backend's own counters, by name."""
