"""Records of the files with cached pages: they outlive inodes, and their number is bounded.

The kernel forgets inodes; the pages that cleanfs keeps stay, and with them a record: the file's
version, the fingerprint under which its pages were read, and what is under way. A record in use is
pinned. Of the others the longest unused is forgotten first, and its pages are flushed with it. Main
thread only; nothing here awaits.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import count, islice

import trio

from cleanfs.backends.ops import FileKey
from cleanfs.cache.fingerprint import Fingerprint
from cleanfs.cache.in_flight import InFlightRead
from cleanfs.cache.pending_writes import PendingWrite
from cleanfs.cache.read_ranges import RangeSet
from cleanfs.cache.state import FileState
from cleanfs.source.identity import Dentry

MIN_FILES = 1 << 14
POOL_BYTES_PER_FILE = 4096
"""File records kept, 0.7 KiB each: one for so many bytes that cleancache may use, at least MIN_FILES.
Beyond that, the longest unused files are flushed and forgotten: a program that cycles through more
files never hits."""

FORGET_BATCH = 64
"""File records examined when one must go."""


def max_files(pool_limit: int) -> int:
    """Return how many file records go with a pool of that limit."""
    return max(MIN_FILES, pool_limit // POOL_BYTES_PER_FILE)


class CachedFile(FileState):
    """The record of one file, kept for as long as pages of it may be cached anywhere."""

    __slots__ = (
        "dentry",
        "in_flight",
        "key",
        "lock",
        "read_ranges",
        "writes",
    )  # fmt: skip

    def __init__(self, key: FileKey, serial: int) -> None:
        """Make the record of a file of which nothing is cached yet."""
        super().__init__(serial, key)
        self.key = key
        self.dentry: Dentry | None = None
        """Identifies the file where its inode number does not last; kept as long as the record is."""
        self.in_flight: list[InFlightRead] = []
        self.lock: trio.Semaphore | None = None
        """Held by the change that is under way (``changes``); made for the first one."""
        self.writes: list[PendingWrite] = []
        """Writes that the source does not have yet, in the order of their requests."""
        self.read_ranges: RangeSet | None = None
        """Kept while the file is open for writing."""

    @property
    def fingerprint(self) -> Fingerprint | None:
        """What its cached pages were read under; None if they are not known to be good."""
        return None if self.stamps is None else Fingerprint(*self.stamps, self.racy)

    @fingerprint.setter
    def fingerprint(self, now: Fingerprint | None) -> None:
        if now is None:
            self.stamps = None
        else:
            self.stamps, self.racy = (now.size, now.mtime_ns, now.ctime_ns), now.racy


class FileRecords:
    """The records by key and by serial, the longest unused first (see the module)."""

    def __init__(self, max_files: int, invalidate: Callable[[CachedFile], None]) -> None:
        """Start with none. ``invalidate`` flushes all pages of a file."""
        self.max_files = max_files
        """Records kept, except those in use."""
        self._invalidate = invalidate
        self._by_key: OrderedDict[FileKey, CachedFile] = OrderedDict()
        self._by_serial: dict[int, CachedFile] = {}
        self._serials = count(1)

    def __len__(self) -> int:
        """Return how many records there are."""
        return len(self._by_key)

    def use(self, key: FileKey, dentry: Dentry | None) -> CachedFile:
        """Return, or make, the record of a file, which is now the last to be forgotten."""
        file = self._by_key.get(key)
        if file is not None:
            file.used = False
            self._by_key.move_to_end(key)
            return file
        serial = next(self._serials)
        file = CachedFile(key, serial)
        file.dentry = dentry
        self._by_key[key] = self._by_serial[serial] = file
        if len(self._by_key) > self.max_files:
            self._forget_oldest()
        return file

    def get(self, key: FileKey) -> CachedFile | None:
        """Return the record of a file, if there is one."""
        return self._by_key.get(key)

    def of_serial(self, serial: int) -> CachedFile:
        """Return the record of a file with resident pages."""
        return self._by_serial[serial]

    def all(self) -> list[CachedFile]:
        """Return all records, the longest unused first."""
        return list(self._by_key.values())

    def forget(self, file: CachedFile) -> None:
        """Flush a file, and drop its record unless it is in use."""
        self._invalidate(file)
        if self._by_key.get(file.key) is file and not file.pins:
            del self._by_key[file.key]
            del self._by_serial[file.serial]
            file.forgotten = True

    def _forget_oldest(self) -> None:
        # All but the newest, which is being made; some at a time, as many may be pinned.
        oldest = islice(self._by_key.values(), min(len(self._by_key) - 1, FORGET_BATCH))
        for file in list(oldest):
            if len(self._by_key) <= self.max_files:
                return
            used, file.used = file.used, False
            if file.pins or used:
                self._by_key.move_to_end(file.key)
            else:
                self.forget(file)
