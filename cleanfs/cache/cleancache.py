"""The cleancache frontend: file systems above, one backend below, four counters.

After ``mm/cleancache.c``. A file system is recorded when it mounts (``init_fs``), with or without a
backend; a backend that registers later gives the recorded ones their pools then, exactly once (the
lazy initialisation that Dan Magenheimer sketched in 2011 and Linux 3.10 got). A second backend is
refused while one is registered.

A backend that raises never hurts a reader. The frontend counts the error, reports a miss,
and takes the backend out of service after ``MAX_ERRORS`` in a row. It does so at once when the
backend fails to *discard*: what it still holds cannot be trusted any more.

Main thread only; no call awaits.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from uuid import UUID

from cleanfs.backends.ops import Backend, BorrowOps, FastOps, FileKey
from cleanfs.cache.state import CacheState

log = logging.getLogger(__name__)

MAX_ERRORS = 8
"""Calls that may raise in a row before the backend is taken out of service."""

T = TypeVar("T")


class BackendBusyError(Exception):
    """Says that a backend is registered already."""


@dataclass(frozen=True, slots=True)
class CleancacheStats:
    """The four counters of the kernel's frontend, and the faults that were kept from readers."""

    succ_gets: int
    """Pages that gets found."""
    failed_gets: int
    """Pages that gets did not find."""
    puts: int
    """Pages offered to the backend."""
    flushes: int
    """Flush hooks called: of a page, a range, a file or a file system."""
    backend_errors: int
    """Backend calls that raised, or gave a page of the wrong size."""


class CleancacheFs:
    """One mounted file system's view: the kernel's ``sb->cleancache_poolid`` and the hooks.

    Made by ``Cleancache.init_fs``. Without a pool each hook costs one comparison.
    """

    __slots__ = ("_cleancache", "_right_sizes", "page_size", "state", "uuid")

    def __init__(self, cleancache: "Cleancache", page_size: int, uuid: UUID | None) -> None:
        """Record the file system; the pool comes with ``_init_pool``."""
        self._cleancache = cleancache
        self.page_size = page_size
        self._right_sizes = {page_size}
        self.uuid = uuid
        self.state = CacheState(page_size)
        """What the FUSE channel may know of this pool."""

    @property
    def pool_id(self) -> int:
        """The pool's id, or a negative number if there is none."""
        return self.state.pool_id

    @pool_id.setter
    def pool_id(self, pool_id: int) -> None:
        self.state.pool_id = pool_id

    def get_page(self, key: FileKey, index: int) -> bytes | None:
        """Get one page."""
        if self.pool_id < 0:
            return None
        pages = self._cleancache.call(lambda ops: [ops.get_page(self.pool_id, key, index)], None)
        return self._checked(key, index, 1, pages)[0]

    def get_pages(self, key: FileKey, first: int, count: int) -> list[bytes | None] | None:
        """Get ``count`` pages from index ``first`` on; None if there is no pool."""
        if self.pool_id < 0:
            return None
        call = self._cleancache.call
        pages = call(lambda ops: ops.get_pages(self.pool_id, key, first, count), None)
        return self._checked(key, first, count, pages)

    def _checked(
        self, key: FileKey, first: int, count: int, pages: list[bytes | None] | None
    ) -> list[bytes | None]:
        """Check the pages that a backend returned (None: it raised), and count hits and misses."""
        if pages is None:
            pages = [None] * count
            self._cleancache.failed_gets += count
            return pages
        # All of them at once first: this is the path of every hit.
        if None not in pages and set(map(len, pages)) == self._right_sizes and len(pages) == count:  # type: ignore[arg-type]  # no None
            self._cleancache.went_well()
            self._cleancache.succ_gets += count
            return pages
        if self._all_right(key, first, count, pages):
            self._cleancache.went_well()
        misses = pages.count(None)
        self._cleancache.failed_gets += misses
        self._cleancache.succ_gets += count - misses
        return pages

    def _all_right(self, key: FileKey, first: int, count: int, pages: list[bytes | None]) -> bool:
        """Tell whether the returned pages are sound; turn bad ones into misses, and discard them."""
        sound = len(pages) == count
        if not sound:
            pages[:] = [None] * count
            self._cleancache.count_error("gave the wrong number of pages")
            self._discard(lambda ops: ops.flush_pages(self.pool_id, key, first, first + count))
        for i, page in enumerate(pages):
            if page is not None and len(page) != self.page_size:
                sound = False
                pages[i] = None
                self._cleancache.count_error("gave a page of the wrong size")
                self._discard(partial(_flush_page, self.pool_id, key, first + i))
        return sound

    def borrow_pages(self, key: FileKey, first: int, count: int) -> bytes | None:
        """Copy a range of pages that stays in the backend, as if each were got and put back.

        None if one of them is not there, or the backend cannot do that: then nothing was counted.
        """
        cc = self._cleancache
        if self.pool_id < 0 or cc.borrow is None:
            return None
        try:
            pages = cc.borrow(self.pool_id, key, first, count)
        except Exception as exc:
            cc.count_error("raised", exc)
            return None
        if pages is None:
            return None
        if len(pages) != count * self.page_size:
            cc.count_error("gave the wrong number of bytes")
            self._discard(lambda ops: ops.flush_pages(self.pool_id, key, first, first + count))
            return None
        cc.went_well()
        cc.succ_gets += count
        cc.puts += count
        return pages

    def put_page(self, key: FileKey, index: int, page: bytes) -> None:
        """Offer one clean page."""
        if self.pool_id >= 0:
            self.put_pages(key, [(index, page)])

    def put_pages(self, key: FileKey, pages: Sequence[tuple[int, bytes]]) -> None:
        """Offer clean pages. One on which the backend fails is discarded there (put-put-get)."""
        if self.pool_id < 0:
            return
        cc = self._cleancache
        cc.puts += len(pages)
        if cc.call_ok(lambda ops: ops.put_pages(self.pool_id, key, pages)):
            cc.went_well()
        else:
            for index, _ in pages:
                self._discard(partial(_flush_page, self.pool_id, key, index))

    def kept_pages(self) -> int:
        """Return the pages in the backend by its own counter; 0 if it has no such counter."""
        counters: Mapping[str, int] = self._cleancache.call(lambda ops: ops.counters(), {})
        return counters.get("eph_pagebytes", 0) // self.page_size

    def flush_page(self, key: FileKey, index: int) -> None:
        """Discard one page."""
        if self.pool_id >= 0:
            self._cleancache.flushes += 1
            self._discard(lambda ops: ops.flush_page(self.pool_id, key, index))

    def flush_pages(self, key: FileKey, start: int, stop: int | None) -> None:
        """Discard ``start <= index < stop``, or all from ``start`` on."""
        if self.pool_id >= 0:
            self._cleancache.flushes += 1
            self._discard(lambda ops: ops.flush_pages(self.pool_id, key, start, stop))

    def flush_inode(self, key: FileKey) -> None:
        """Discard all pages of a file."""
        if self.pool_id >= 0:
            self._cleancache.flushes += 1
            self._discard(lambda ops: ops.flush_inode(self.pool_id, key))

    def flush_fs(self) -> None:
        """Surrender the pool and forget the file system: it is unmounted."""
        self._cleancache.forget_fs(self)
        self.surrender_pool()

    def drop_pool(self) -> None:
        """Discard every page but stay mounted: surrender the pool and take a new one.

        On a shared pool the pages of the other sharers stay, and so do ours while they share it.
        """
        if self.pool_id >= 0:
            self.surrender_pool()
            self.init_pool()

    def init_pool(self) -> None:
        """Ask the registered backend for a pool, unless there is one already."""
        if self.pool_id >= 0:
            return
        if self.uuid is None:
            pool_id = self._cleancache.call(lambda ops: ops.init_fs(self.page_size), -1)
        else:
            uuid = self.uuid
            pool_id = self._cleancache.call(lambda ops: ops.init_shared_fs(uuid, self.page_size), -1)
        self.pool_id = pool_id
        if pool_id >= 0:
            self.state.use_backend(self._cleancache.fast_ops)
        elif self._cleancache.backend is not None:
            log.warning("the backend refused a pool; the mount goes on without cleancache")

    def surrender_pool(self) -> None:
        """Give the pool id back, if there is one."""
        if self.pool_id >= 0:
            self._cleancache.flushes += 1
            pool_id = self.pool_id
            self.no_pool()
            self._discard(lambda ops: ops.flush_fs(pool_id))

    def no_pool(self) -> None:
        """Note that there is no pool any more."""
        self.pool_id = -1
        self.state.use_backend(None)

    def _discard(self, flush: Callable[[Backend], None]) -> None:
        if not self._cleancache.call_ok(flush):
            self._cleancache.out_of_service("it failed to discard pages")


def _flush_page(pool_id: int, key: FileKey, index: int, ops: Backend) -> None:
    ops.flush_page(pool_id, key, index)


class Cleancache:
    """Registration, the mounted file systems, and the counters. One per process, as in a kernel."""

    def __init__(self) -> None:
        """Start with no backend and nothing mounted."""
        self.backend: Backend | None = None
        self.borrow: Callable[[int, FileKey, int, int], bytes | None] | None = None
        """The backend's ``borrow_pages``, if it has one."""
        self.fast_ops: object = None
        """The backend's ``fast_ops``, if it has them."""
        self.succ_gets = 0
        self.failed_gets = 0
        self.puts = 0
        self.flushes = 0
        self.backend_errors = 0
        self._errors_in_a_row = self._served_at_error = 0
        self._mounted: list[CleancacheFs] = []

    # Invariant: a CleancacheFs has pool_id >= 0 only while self.backend is the one that gave it.

    def register(self, backend: Backend) -> None:
        """Put a backend into service and give every mounted file system its pool.

        Raises BackendBusyError if one is registered; nothing has changed then.
        """
        self.check_free()
        self.backend = backend
        self.borrow = backend.borrow_pages if isinstance(backend, BorrowOps) else None
        self.fast_ops = backend.fast_ops() if isinstance(backend, FastOps) else None
        self._errors_in_a_row = 0
        for fs in self._mounted:
            fs.init_pool()

    def check_free(self) -> None:
        """Raise BackendBusyError if a backend is registered."""
        if self.backend is not None:
            raise BackendBusyError(f"backend {self.backend.name} is registered already")

    def unregister(self) -> None:
        """Take the backend out of service in an orderly way: every pool is surrendered."""
        for fs in self._mounted:
            fs.surrender_pool()
        self.backend = self.borrow = self.fast_ops = None

    def init_fs(self, page_size: int, uuid: UUID | None = None) -> CleancacheFs:
        """Record a file system at mount; it has a pool at once if a backend is registered.

        With ``uuid`` it joins the shared pool of that name (the kernel's ``init_shared_fs``).
        """
        fs = CleancacheFs(self, page_size, uuid)
        self._mounted.append(fs)
        if self.backend is not None:
            fs.init_pool()
        return fs

    def forget_fs(self, fs: CleancacheFs) -> None:
        """Drop an unmounted file system from the record."""
        if fs in self._mounted:
            self._mounted.remove(fs)
            self.succ_gets += fs.state.succ_gets
            self.puts += fs.state.puts
            self.flushes += fs.state.flushes
            self.failed_gets += fs.state.failed_gets

    def stats(self) -> CleancacheStats:
        """Return a snapshot of the counters."""
        return CleancacheStats(
            self.succ_gets + sum(fs.state.succ_gets for fs in self._mounted),
            self.failed_gets + sum(fs.state.failed_gets for fs in self._mounted),
            self.puts + sum(fs.state.puts for fs in self._mounted),
            self.flushes + sum(fs.state.flushes for fs in self._mounted),
            self.backend_errors,
        )

    def call(self, use: Callable[[Backend], T], otherwise: T) -> T:
        """Return ``use(backend)``, or ``otherwise`` if there is none or it raises."""
        backend = self.backend
        if backend is None:
            return otherwise
        try:
            return use(backend)
        except Exception as exc:
            self.count_error("raised", exc)
            return otherwise

    def went_well(self) -> None:
        """Reset the errors in a row: a put was taken, or a get gave a good page.

        That a discard works proves little, so it does not reset them.
        """
        self._errors_in_a_row = 0

    def call_ok(self, use: Callable[[Backend], None]) -> bool:
        """Tell whether ``use(backend)`` went through; trivially so without a backend."""

        def done(backend: Backend) -> bool:
            use(backend)
            return True

        return self.call(done, self.backend is None)

    def count_error(self, what: str, exc: Exception | None = None) -> None:
        """Account for a fault of the backend; too many in a row end its service."""
        served = sum(fs.state.succ_gets for fs in self._mounted)
        if served != self._served_at_error:  # these went well
            self._errors_in_a_row, self._served_at_error = 0, served
        self.backend_errors += 1
        self._errors_in_a_row += 1
        log.warning("backend %s", what, exc_info=exc)
        if self._errors_in_a_row >= MAX_ERRORS:
            self.out_of_service(f"{self._errors_in_a_row} errors in a row")

    def out_of_service(self, why: str) -> None:
        """Drop the backend without another call to it: from here on, every get misses."""
        if self.backend is None:
            return
        log.error("backend %s is taken out of service: %s", self.backend.name, why)
        self.backend = self.borrow = self.fast_ops = None
        for fs in self._mounted:
            fs.no_pool()
