"""The state of files and caches that the FUSE channel reads, to serve hits without Python.

The classes here are for the Python engine. The native ones that replace them (``native/state.hpp``)
have the same fields, and the channel's C++ code reads these. All are written on the main thread.
"""

from typing import TYPE_CHECKING

from cleanfs.backends.engines import native_module
from cleanfs.backends.ops import FileKey


class FileState:
    """The state of one file: the base of its record."""

    __slots__ = ("pending_writes", "remembers_reads", "serial", "size")

    def __init__(self, serial: int, key: FileKey) -> None:
        """Name the file: ``serial`` among the resident pages, ``key`` in cleancache."""
        self.serial = serial
        self.size = 0
        """Bytes, as of the fingerprint; 0 if there is none. Caches serve only these bytes."""
        self.pending_writes = 0
        """How many writes the source does not have yet: reads of their ranges wait."""
        self.remembers_reads = False
        """Whether each read must be remembered (``read_ranges``)."""


class HandleState:
    """The state of one open file."""

    __slots__ = ("drop_due",)

    def __init__(self, file: FileState) -> None:
        """Belong to a file."""
        self.drop_due = False
        """Whether the OPEN reply had the kernel drop the file's pages, and it may not have done so."""


class CacheState:
    """The state of one mount's caches. The counters are of requests that the channel served."""

    __slots__ = ("hits", "misses", "page_size", "pool_id", "puts", "succ_gets")

    native = False
    """Whether the channel can read it."""

    def __init__(self, page_size: int) -> None:
        """Start without a pool."""
        self.page_size = page_size
        self.pool_id = -1
        self.hits = self.misses = 0
        """Pages that were, or were not, in the page cache."""
        self.succ_gets = self.puts = 0
        """Pages that cleancache gave and kept."""

    def use_resident(self, pages: object) -> None:
        """Read resident pages here; None for no more."""

    def use_backend(self, fast_ops: object) -> None:
        """Read compressed pages by this capsule (``ops.FastOps``); None for no more."""


if not TYPE_CHECKING:
    try:
        _native = native_module("cleanfs.cache._pagecache")
    except ValueError:  # ``resident.make_resident`` reports it
        _native = None
    if _native is not None:
        FileState, HandleState, CacheState = _native.FileState, _native.HandleState, _native.CacheState
