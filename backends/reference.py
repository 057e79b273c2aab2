"""Implements zcache in Python: the readable reference, used where the native engine was not built.

It follows ``drivers/staging/zcache`` and its rewrite (zcache2). It stores:

* *zpages*: compressed pages, in one queue over all pools, oldest put first. A hit on a private
  pool takes the page out and the next put brings it back at the young end, so the queue is in LRU
  order. When the limit is exceeded, the oldest pages are evicted until it holds again: a put of a
  compressible page never fails for lack of room (zcache2's "ouroboros", the cache that eats its own
  tail).
* *same-filled pages*: a page that repeats one 8-byte word is stored as that word.
* *raw pages*: a page that compresses to more than ``POOR`` of its size is stored uncompressed while
  there is room to spare, in a queue of its own that is evicted first. A page that costs twice the RAM
  must not displace two that could be kept. ``docs/poor-pages.md`` has the measurement.
* *loans*: a page that an exclusive get handed out is gone for every get. But most come back
  unchanged, when the page cache evicts them again, and compressing is five times the work of
  decompressing. So the compressed form waits, with a reference to the very object handed out. A
  put of that same object (by identity, not equality: no doubt and no comparing) revives it. Loans
  count against the limit, together with the page that they keep alive, and are bounded.

The limit counts the memory that Python really uses: each object with its allocator's overhead, and the
entries in the tables (``ENTRY_BYTES``, measured by ``scripts/run bench/zcache``).
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from uuid import UUID

from cleanfs.backends import codec
from cleanfs.backends.ops import FileKey
from cleanfs.backends.options import BackendOptions

POOR = 7 / 8
"""Compressed size over page size above which a page is poor (zcache's ``zv_max_zsize``)."""

ENTRY_BYTES = 240
"""RAM per stored page beyond its bytes: id, queue entry, member of its object's set."""

OBJECT_BYTES = 900
"""RAM per object: itself, its key, its empty set, its entries in two tables."""

LOAN_SHARE = 1 / 8
"""The part of the limit that loans may take."""

MIN_POOL_LIMIT = 1 << 20
"""The smallest limit, in bytes, that is more than bookkeeping."""

MIN_PAGE_SIZE = 4096
MAX_PAGE_SIZE = 1 << 20

INDEX_BITS = 52
"""Bits of the index in a page id, ``serial of the object << INDEX_BITS | page index``: one int names a
page, and a range of pages is a range of ints. 2**63 bytes of file in 4 KiB pages need 51 bits."""

WORD = 8
"""Bytes in the unit of a same-filled page, as in the kernel's zswap."""

Zpage = bytes | int
"""A stored page: compressed or raw bytes, or the word of a same-filled page."""


def _cost(zpage: Zpage) -> int:
    """Return the RAM that a stored page takes: its entry and its malloc chunk (33 is bytes' header)."""
    if isinstance(zpage, int):
        return ENTRY_BYTES
    return ENTRY_BYTES + (len(zpage) + 33 + 8 + 15 & ~15)


class _Object:
    """Represents a file with stored pages: tmem's object."""

    __slots__ = ("base", "ids", "key", "pool")

    def __init__(self, pool: "_Pool", key: FileKey, base: int) -> None:
        self.pool = pool
        self.key = key
        self.base = base
        self.ids: set[int] = set()  # stored or on loan


class _Pool:
    """Represents the pool of one mount, or of all that share a UUID."""

    __slots__ = ("decompress", "objects", "page_size", "sharers", "uuid")

    def __init__(self, page_size: int, uuid: UUID | None) -> None:
        self.page_size = page_size
        self.uuid = uuid
        self.sharers = 1
        self.objects: dict[FileKey, _Object] = {}
        self.decompress = codec.lz4_decompressor(page_size)


def _refuse_native_options(options: BackendOptions) -> None:
    """Raise ValueError for options that only the native engine has."""
    for option, value, ours in (
        ("allocator", options.allocator, "log"),  # the default: Python has no allocator
        ("poor", options.poor or "keep", "keep"),
        ("admission", options.admission, "all"),
        ("checksum", options.checksum, False),
    ):
        if value != ours:
            given = f"--{option}" if value is True else f"--{option} {value}"
            raise ValueError(f"{given} {codec.NEEDS_NATIVE}")


class ReferenceZcache:
    """Implements ``cleanfs.backends.ops.Backend`` (see the module)."""

    name = "zcache"
    engine = "python"

    def __init__(self, options: BackendOptions) -> None:
        """Raise ValueError for a limit that is too small and for options of the native engine."""
        _refuse_native_options(options)
        self._compress = codec.lz4_compressor(codec.parse(options.compression))
        self._pools: dict[int, _Pool] = {}
        self._pool_ids = count()
        self._objects: dict[int, _Object] = {}  # by serial
        self._serials = count(1)
        self._zpages: OrderedDict[int, Zpage] = OrderedDict()
        self._raw: OrderedDict[int, bytes] = OrderedDict()
        self._loans: OrderedDict[int, tuple[Zpage, bytes]] = OrderedDict()
        self._used = 0
        self._loan_bytes = 0
        self._limit = 0
        self._eph_zbytes = 0
        self._eph_pagebytes = 0
        self._same_filled_pages = 0
        self._zero_filled_pages = 0
        self._stats = dict.fromkeys(
            (
                "obj_count_max",
                "eph_zpages_max",
                "evicted_eph_zpages",
                "evicted_raw_pages",
                "compress_poor",
                "failed_eph_puts",
                "revived_zpages",
                "corrupt_zpages",
                "flush_total",
                "flush_found",
                "flobj_total",
                "flobj_found",
            ),
            0,
        )
        self.resize(options.pool_limit)

    # Invariants: an id is in at most one of _zpages, _raw and _loans. It is in its object's ids
    # exactly if it is in one of them. self._used is the sum of the _cost of all stored pages,
    # the size of all lent pages, and OBJECT_BYTES for each object. An object is in the tables
    # exactly while it has ids.

    # -- pools ------------------------------------------------------------------------------

    def init_fs(self, page_size: int) -> int:
        """Open a private pool; refuse a page size that is no power of two in range."""
        return self._new_pool(page_size, None)

    def init_shared_fs(self, uuid: UUID, page_size: int) -> int:
        """Open or join the pool of that UUID; refuse a page size other than its own."""
        for pool_id, pool in self._pools.items():
            if pool.uuid == uuid:
                if pool.page_size != page_size:
                    return -1
                pool.sharers += 1
                return pool_id
        return self._new_pool(page_size, uuid)

    def flush_fs(self, pool_id: int) -> None:
        """Close a pool, or one sharer's use; the last one's close discards the pages."""
        pool = self._pools[pool_id]
        pool.sharers -= 1
        if pool.sharers == 0:
            for obj in list(pool.objects.values()):
                self._drop_object(obj)
            del self._pools[pool_id]

    def _new_pool(self, page_size: int, uuid: UUID | None) -> int:
        if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
            return -1
        pool_id = next(self._pool_ids)
        self._pools[pool_id] = _Pool(page_size, uuid)
        return pool_id

    # -- get --------------------------------------------------------------------------------

    def get_page(self, pool_id: int, key: FileKey, index: int) -> bytes | None:
        """Get one page, or None."""
        return self.get_pages(pool_id, key, index, 1)[0]

    def get_pages(self, pool_id: int, key: FileKey, first: int, count: int) -> list[bytes | None]:
        """Get ``count`` pages from ``first`` on; exclusive on a private pool."""
        pool = self._pools[pool_id]
        obj = pool.objects.get(key)
        if obj is None:
            return [None] * count
        if pool.uuid is not None:
            return [
                self._get_shared(obj, zid) for zid in range(obj.base + first, obj.base + first + count)
            ]
        pages: list[bytes | None] = []
        lent = 0
        kept, loans = self._zpages, self._loans
        for zid in range(obj.base + first, obj.base + first + count):
            zpage = kept.pop(zid, None)
            if zpage is None:
                zpage = self._raw.pop(zid, None)
            page = None
            if zpage is not None:
                page = self._decode(obj, zid, zpage)
                if page is not None:
                    loans[zid] = (zpage, page)
                    lent += 1
            pages.append(page)
        self._used += lent * pool.page_size
        self._loan_bytes += lent * pool.page_size
        self._bound_loans()
        return pages

    def borrow_pages(self, pool_id: int, key: FileKey, first: int, count: int) -> bytes | None:
        """Get all pages of a range, which stay (``ops.BorrowOps``)."""
        pool = self._pools[pool_id]
        obj = pool.objects.get(key)
        if obj is None:
            return None
        ids = range(obj.base + first, obj.base + first + count)
        if not all(zid in self._zpages or zid in self._raw for zid in ids):
            return None
        pages = self.get_pages(pool_id, key, first, count)
        if pool.uuid is None:
            back = [(first + i, page) for i, page in enumerate(pages) if page is not None]
            self.put_pages(pool_id, key, back)
        return b"".join(page for page in pages if page is not None) if None not in pages else None

    def _get_shared(self, obj: _Object, zid: int) -> bytes | None:
        for queue in (self._zpages, self._raw):
            zpage = queue.get(zid)
            if zpage is not None:
                page = self._decode(obj, zid, zpage)
                if page is not None:
                    queue.move_to_end(zid)
                return page
        return None

    def _decode(self, obj: _Object, zid: int, zpage: Zpage) -> bytes | None:
        """Restore a page. If its stored form is corrupt, discard it and return None."""
        if isinstance(zpage, int):
            return zpage.to_bytes(WORD, "little") * (obj.pool.page_size // WORD)
        if len(zpage) == obj.pool.page_size:
            return zpage
        try:
            page = obj.pool.decompress(zpage)
        except codec.CorruptError:
            page = b""
        if len(page) == obj.pool.page_size:
            return page
        self._stats["corrupt_zpages"] += 1
        self._zpages[zid] = zpage  # where an exclusive get took it from
        self._evict(zid)
        return None

    # -- put --------------------------------------------------------------------------------

    def put_page(self, pool_id: int, key: FileKey, index: int, page: bytes) -> None:
        """Store one page."""
        self.put_pages(pool_id, key, ((index, page),))

    def put_pages(self, pool_id: int, key: FileKey, pages: Sequence[tuple[int, bytes]]) -> None:
        """Store pages, evicting the oldest if needed. Raises ValueError for one of the wrong size."""
        pool = self._pools[pool_id]
        if any(len(page) != pool.page_size or index < 0 for index, page in pages):
            raise ValueError(f"a page of this pool is {pool.page_size} bytes at an index >= 0")
        obj = pool.objects.get(key) or _Object(pool, key, next(self._serials) << INDEX_BITS)
        for index, page in pages:
            self._put(obj, obj.base + index, page)
            if self._used > self._limit:
                self._shrink_to(self._limit)
        stats = self._stats
        stats["obj_count_max"] = max(stats["obj_count_max"], len(self._objects))
        stats["eph_zpages_max"] = max(stats["eph_zpages_max"], self._eph_zpages)

    def _put(self, obj: _Object, zid: int, page: bytes) -> None:
        if zid in obj.ids:
            loan = self._loans.get(zid)
            if loan is not None and loan[1] is page:
                self._end_loan(obj, zid)
                self._keep(zid, loan[0], page)
                self._stats["revived_zpages"] += 1
                return
            self._evict(zid)  # before anything can fail: put-put-get
        zpage = self._encode(page)
        free = self._limit - self._used - (0 if obj.ids else OBJECT_BYTES)
        if zpage is page and not self._raw and _cost(zpage) > free:
            self._stats["failed_eph_puts"] += 1
            return
        if not obj.ids:
            self._remember(obj)
        self._keep(zid, zpage, page)
        obj.ids.add(zid)
        self._account(obj, zpage, 1)

    def _keep(self, zid: int, zpage: Zpage, page: bytes) -> None:
        """Enter a page at the young end of its queue."""
        if isinstance(zpage, bytes) and len(zpage) == len(page):
            self._raw[zid] = zpage
        else:
            self._zpages[zid] = zpage

    def _encode(self, page: bytes) -> Zpage:
        """Encode a page: the word of a same-filled one, else LZ4, else (poor) the page itself."""
        word = page[:WORD]
        if page[WORD : 2 * WORD] == word and page == word * (len(page) // WORD):
            return int.from_bytes(word, "little")
        zpage = self._compress(page)
        if len(zpage) > len(page) * POOR:
            self._stats["compress_poor"] += 1
            return page
        return zpage

    # -- flush ------------------------------------------------------------------------------

    def flush_page(self, pool_id: int, key: FileKey, index: int) -> None:
        """Discard one page."""
        self.flush_pages(pool_id, key, index, index + 1)

    def flush_pages(self, pool_id: int, key: FileKey, start: int, stop: int | None) -> None:
        """Discard a range, in time proportional to the range or the file's pages, the fewer."""
        self._stats["flush_total"] += 1
        obj = self._pools[pool_id].objects.get(key)
        if obj is None:
            return
        first = obj.base + start
        last = obj.base + stop if stop is not None else obj.base + (1 << INDEX_BITS)
        zids: Iterable[int]
        if last - first <= len(obj.ids):
            zids = [zid for zid in range(first, last) if zid in obj.ids]
        else:
            zids = [zid for zid in obj.ids if first <= zid < last]
        self._stats["flush_found"] += len(zids)
        for zid in zids:
            self._evict(zid)

    def flush_inode(self, pool_id: int, key: FileKey) -> None:
        """Discard all pages of a file."""
        self._stats["flobj_total"] += 1
        obj = self._pools[pool_id].objects.get(key)
        if obj is not None:
            self._stats["flobj_found"] += 1
            self._drop_object(obj)

    # -- size and counters --------------------------------------------------------------------

    @property
    def pool_limit(self) -> int:
        """Return the limit in bytes of RAM."""
        return self._limit

    def resize(self, pool_limit: int) -> None:
        """Set the limit and evict down to it. Raises ValueError below MIN_POOL_LIMIT."""
        if pool_limit < MIN_POOL_LIMIT:
            raise ValueError(f"pool limit {pool_limit} is below {MIN_POOL_LIMIT} bytes")
        self._limit = pool_limit
        self._bound_loans()
        self._shrink_to(pool_limit)

    def counters(self) -> Mapping[str, int]:
        """Return gauges, then counters that only grow. Names are the kernel's where it has one."""
        return {
            "pool_limit": self._limit,
            "pool_used": self._used,  # bytes that count against the limit
            "obj_count": len(self._objects),  # files with stored pages
            "eph_zpages": self._eph_zpages,  # pages that a get would find
            "eph_zbytes": self._eph_zbytes,  # bytes of all stored forms, on loan or not
            "eph_pagebytes": self._eph_pagebytes,  # bytes of the same pages, uncompressed
            "raw_pages": len(self._raw),
            "same_filled_pages": self._same_filled_pages,
            "zero_filled_pages": self._zero_filled_pages,
            "loaned_zpages": len(self._loans),
            **self._stats,
        }

    @property
    def _eph_zpages(self) -> int:
        return len(self._zpages) + len(self._raw)

    # -- accounting -----------------------------------------------------------------------------

    def _account(self, obj: _Object, zpage: Zpage, sign: int) -> None:
        """Account for a page that comes to be stored (+1) or ceases to be (-1), on loan or not."""
        self._used += sign * _cost(zpage)
        self._eph_pagebytes += sign * obj.pool.page_size
        if isinstance(zpage, int):
            self._same_filled_pages += sign
            self._zero_filled_pages += sign * (zpage == 0)
        else:
            self._eph_zbytes += sign * len(zpage)

    def _end_loan(self, obj: _Object, zid: int) -> Zpage | None:
        """End the loan of a page, if there is one, and return its stored form."""
        loan = self._loans.pop(zid, None)
        if loan is None:
            return None
        self._used -= obj.pool.page_size
        self._loan_bytes -= obj.pool.page_size
        return loan[0]

    def _bound_loans(self) -> None:
        while self._loan_bytes > self._limit * LOAN_SHARE:
            self._evict(next(iter(self._loans)))
        self._shrink_to(self._limit)

    def _shrink_to(self, limit: int) -> None:
        """Evict, raw pages first, then the oldest, then loans, until ``limit`` holds."""
        while self._used > limit:
            if self._raw:
                self._evict(next(iter(self._raw)))
                self._stats["evicted_raw_pages"] += 1
            elif self._zpages:
                self._evict(next(iter(self._zpages)))
                self._stats["evicted_eph_zpages"] += 1
            else:
                self._evict(next(iter(self._loans)))

    def _evict(self, zid: int) -> None:
        """Discard a page, and its object if it was the last one."""
        obj = self._objects[zid >> INDEX_BITS]
        self._drop(obj, zid)
        if not obj.ids:
            self._forget(obj)

    def _drop(self, obj: _Object, zid: int) -> None:
        """Discard a page, stored or on loan."""
        obj.ids.remove(zid)
        zpage = self._end_loan(obj, zid)
        if zpage is None:
            zpage = self._zpages.pop(zid, None)
        if zpage is None:
            zpage = self._raw.pop(zid)
        self._account(obj, zpage, -1)

    def _drop_object(self, obj: _Object) -> None:
        for zid in list(obj.ids):
            self._drop(obj, zid)
        self._forget(obj)

    def _remember(self, obj: _Object) -> None:
        """Enter an object that is about to get its first page."""
        obj.pool.objects[obj.key] = self._objects[obj.base >> INDEX_BITS] = obj
        self._used += OBJECT_BYTES

    def _forget(self, obj: _Object) -> None:
        """Remove an object that has lost its last page."""
        del obj.pool.objects[obj.key], self._objects[obj.base >> INDEX_BITS]
        self._used -= OBJECT_BYTES
