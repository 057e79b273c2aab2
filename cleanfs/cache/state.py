"""The state of files and caches that the FUSE channel reads, to serve hits without Python.

The classes here are for the Python engine. The native ones that replace them (``native/state.hpp``)
have the same fields, and the channel's C++ code reads these. All are written on the main thread.
"""

import math
from itertools import count
from types import ModuleType
from typing import TYPE_CHECKING

from cleanfs.backends.engines import native_module
from cleanfs.backends.ops import FileKey

Stamps = tuple[int, int, int]
"""Size, mtime_ns and ctime_ns: one of them moves when the content of a file does."""


class FileState:
    """The state of one file: the base of its record."""

    __slots__ = (
        "drops_due", "evictions_after", "forgotten", "handles", "mutations",
        "pending_writes", "pins", "racy", "reads_in_flight", "remembers_reads", "serial", "size",
        "stamps", "used", "version",
    )  # fmt: skip

    def __init__(self, serial: int, key: FileKey) -> None:
        """Name the file: ``serial`` among the resident pages, ``key`` in cleancache."""
        self.serial = serial
        self.size = 0
        """Bytes, as of the fingerprint; 0 if there is none. Caches serve only these bytes."""
        self.stamps: Stamps | None = None
        """The fingerprint; None if there is none."""
        self.racy = True
        """Whether the fingerprint is racy."""
        self.version = 0
        """Stamp of the last invalidation, from the clock of the caches."""
        self.mutations = 0
        """1 while a change is under way."""
        self.pending_writes = 0
        """How many writes the source does not have yet: reads of their ranges wait."""
        self.reads_in_flight = 0
        """How many reads of the source have not ended, for other reads to join."""
        self.remembers_reads = False
        """Whether each read must be remembered (``read_ranges``)."""
        self.forgotten = False
        """Whether the record is no record any more: the file may have a new one."""
        self.pins = 0
        """Users (open handles, reads under way): the record stays while there is one."""
        self.handles = 0
        """Open handles."""
        self.drops_due = 0
        """Of these, those whose OPEN reply had the kernel drop the file's pages, perhaps not yet."""
        self.used = False
        """Whether the channel opened the file since the record was last made the youngest."""
        self.evictions_after = 0
        """A page that the kernel evicted before this position is stale."""


class KernelState:
    """The state of one inode as the kernel may see it."""

    __slots__ = ("dropped_for", "pages_dropped_by", "sent", "size")

    def __init__(self) -> None:
        """Start with a kernel that was told nothing."""
        self.sent: Stamps | None = None
        """What the kernel was last told, or has known since by a write of its own."""
        self.size = -1
        """The size that it was last told, or has made the file by a write of its own; -1 for none."""
        self.dropped_for = 0
        """The serial of the handle whose OPEN reply told the kernel to drop the pages. It does so when
        the opener gets to run, and other processes may run before. 0 once it has done so for sure."""
        self.pages_dropped_by = 0.0
        """The time (``trio.current_time``) by which it should have, or will be notified."""


class InlineState:
    """Whether calls of one kind to one file system are made inline."""

    __slots__ = ("inline", "returned_at", "waited_seconds")

    def __init__(self) -> None:
        """Begin in threads."""
        self.inline = False
        """Whether the main thread makes calls that follow each other."""
        self.returned_at = -math.inf
        """When a call returned last, by the monotonic clock, in seconds."""
        self.waited_seconds = 0.0
        """How long an inline call of the channel waited, which the policy has not heard of yet."""


class NowaitState:
    """What reads of one file system of the source can do."""

    __slots__ = ("dontcache", "nowait", "refused")

    def __init__(self) -> None:
        """Assume that it can do everything; each ability is tried until it is refused."""
        self.nowait = True
        """RWF_NOWAIT works."""
        self.dontcache = True
        """RWF_DONTCACHE works."""
        self.refused = 0
        """Tries of RWF_NOWAIT that would have had to wait, in a row (``inline_policy.NowaitProbe``)."""


_serials = count(1)


class HandleState:
    """The state of one open file."""

    __slots__ = ("_file", "_kernel", "drop_due", "nowait_tried_at", "serial")

    def __init__(self, file: FileState, kernel: KernelState, fd: int) -> None:
        """Read and write a file by ``fd``."""
        self._file, self._kernel = file, kernel
        self.serial = next(_serials)
        """Tells it apart from all other handles; never 0."""
        self.drop_due = False
        """Whether the OPEN reply had the kernel drop the file's pages, and it may not have done so."""
        self.nowait_tried_at = -1
        """The offset at which the channel has just tried RWF_NOWAIT in vain; -1 for none."""

    def opener_ran(self) -> None:
        """Note that the opener has run: the kernel has applied the invalidation of the OPEN reply."""
        if self.drop_due:
            self.drop_due = False
            self._file.drops_due -= 1
        if self._kernel.dropped_for == self.serial:
            self._kernel.dropped_for, self._kernel.pages_dropped_by = 0, 0.0

    def write_inline(self, writes: InlineState) -> None:
        """Let the channel write where ``writes`` says that it does not wait."""

    def read_inline(self, reads: InlineState, nowait: NowaitState, stream: object) -> None:
        """Let the channel read the source where ``reads`` or ``nowait`` say that it does not wait."""


class CacheState:
    """The state of one mount's caches. The counters are of requests that the channel served."""

    __slots__ = (
        "clock", "drop_behind", "failed_gets", "flushes", "hits", "limit_pages", "misses", "page_size",
        "pool_id", "puts", "shared", "succ_gets",
    )  # fmt: skip

    native = False
    """Whether the channel can read it."""
    takes_evictions = False
    """Whether what the kernel evicts fills the pool. Then reads make no pages resident."""

    def __init__(self, page_size: int) -> None:
        """Start without a pool."""
        self.page_size = page_size
        self.shared = True
        """Whether others may change the source, and so where a file ends."""
        self.drop_behind = True
        """Whether what reads leave in the source's page cache is to go."""
        self.clock = 0
        """Counts versions: a file whose version is later than a remembered clock changed since."""
        self.limit_pages = 0
        """Pages that may be resident."""
        self.pool_id = -1
        self.hits = self.misses = 0
        """Pages that were, or were not, in the page cache."""
        self.succ_gets = self.failed_gets = self.puts = 0
        """Pages that cleancache gave, did not have, and kept."""
        self.flushes = 0
        """Flush hooks called."""

    def use_resident(self, pages: object, reclaim: object) -> None:
        """Read resident pages here (None: they are Python's); call ``reclaim`` if they are too many."""

    def use_backend(self, fast_ops: object) -> None:
        """Read compressed pages by this capsule (``ops.FastOps``), as long as there is a pool."""

    def use_evictions(self, evictions: object) -> None:
        """Take what the kernel evicts from this capsule (``vfs.evictions``); None for no more."""

    def drain_evictions(self) -> int:
        """Put what the kernel has evicted by now, or much of it. Returns the position that ends it."""
        return 0

    def opener_ran(self, handle: HandleState) -> None:
        """Note that the opener of a file has run, so the kernel has applied the reply to its OPEN."""
        handle.opener_ran()

    def new_version(self, file: FileState) -> None:
        """Make reads that began before now stale, and what the kernel has evicted."""
        self.clock += 1
        file.version = self.clock


def _load() -> ModuleType | None:
    try:
        return native_module("cleanfs.cache._pagecache")
    except ValueError:  # ``resident.make_resident`` reports it
        return None


native = _load()
"""The native classes; None for the Python engine."""

if native is not None and not TYPE_CHECKING:
    FileState, KernelState, HandleState = native.FileState, native.KernelState, native.HandleState
    InlineState, NowaitState, CacheState = native.InlineState, native.NowaitState, native.CacheState
