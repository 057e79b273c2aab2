"""Reading and writing the source's files.

A read first asks inline, without waiting, for what the source's page cache has (RWF_NOWAIT). The
rest is read in a worker thread, and does not stay in the source's page cache: one copy of a page is
enough (RWF_DONTCACHE, on older kernels POSIX_FADV_DONTNEED). Where nothing here keeps pages, it stays.
"""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

import trio

from cleanfs.syscalls import RWF_DONTCACHE

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

MAX_THREADS = 64
"""Calls that may wait for the source at one time."""

UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class BackingStats:
    """A snapshot of the traffic with the source."""

    source_reads: int
    source_read_bytes: int
    source_reads_inline: int
    """Reads that the source's page cache could serve whole, without a thread."""
    source_writes: int
    source_write_bytes: int
    source_errors: int


@dataclass(frozen=True, slots=True)
class Written:
    """What a write did: bytes written, and the file's attributes right before and right after."""

    count: int
    before: os.stat_result
    after: os.stat_result


class Backing:
    """The source, as seen by the file handlers. Counts its traffic."""

    def __init__(self) -> None:
        """Nothing is known of the source's abilities yet; each is tried until it is refused."""
        self.drop_behind = True
        """Whether what was read is to leave the source's page cache."""
        self._limiter = trio.CapacityLimiter(MAX_THREADS)
        self._nowait = True
        self._dontcache = True
        self._reads = self._read_bytes = self._reads_inline = 0
        self._writes = self._write_bytes = self._errors = 0

    async def run(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a call that may wait for the source in a worker thread."""
        return await trio.to_thread.run_sync(call, *args, abandon_on_cancel=True, limiter=self._limiter)

    async def read(self, fd: int, offset: int, size: int) -> memoryview | bytearray:
        """``size`` bytes from ``offset`` on; short only at the end of the file. Raises OSError."""
        buffer = bytearray(size)
        got = self._read_nowait(fd, buffer, offset) if self._nowait else 0
        try:
            if got < size:
                got, self._dontcache = await self.run(
                    _read_waiting, fd, buffer, offset, got, self._dontcache, self.drop_behind
                )
            else:
                self._reads_inline += 1
        except OSError:
            self._errors += 1
            raise
        self._reads += 1
        self._read_bytes += got
        return buffer if got == size else memoryview(buffer)[:got]

    async def write(self, fd: int, offset: int, data: bytes, append: bool = False) -> Written:
        """Write all of ``data`` at ``offset``, or at the end of the file wherever that is.

        Raises OSError, possibly after a part of it was written.
        """
        self._writes += 1
        try:
            written = await self.run(_write, fd, offset, data, append)
        except OSError:
            self._errors += 1
            raise
        self._write_bytes += written.count
        return written

    def stats(self) -> BackingStats:
        """A snapshot."""
        return BackingStats(
            self._reads,
            self._read_bytes,
            self._reads_inline,
            self._writes,
            self._write_bytes,
            self._errors,
        )

    def _read_nowait(self, fd: int, buffer: bytearray, offset: int) -> int:
        """How many bytes the source's page cache had. 0 if it would have to wait."""
        dontcache = self._dontcache and self.drop_behind
        flags = os.RWF_NOWAIT | (RWF_DONTCACHE if dontcache else 0)
        try:
            return os.preadv(fd, [buffer], offset, flags)
        except BlockingIOError:
            return 0
        except OSError as exc:
            if exc.errno not in UNSUPPORTED:
                return 0  # the waiting read meets it again, and reports it
            if dontcache:
                self._dontcache = False
            else:
                self._nowait = False
            return 0


def _read_waiting(
    fd: int, buffer: bytearray, offset: int, got: int, dontcache: bool, drop_behind: bool
) -> tuple[int, bool]:
    """In a thread: fill ``buffer`` from ``got`` on.

    The new count, short at the end of the file, and whether RWF_DONTCACHE works here.
    """
    view = memoryview(buffer)
    while got < len(buffer):
        flags = RWF_DONTCACHE if dontcache and drop_behind else 0
        try:
            count = os.preadv(fd, [view[got:]], offset + got, flags)
        except OSError as exc:
            if flags and exc.errno in UNSUPPORTED:
                dontcache = False
                continue
            raise
        if count == 0:
            break
        got += count
    if drop_behind and not dontcache:
        os.posix_fadvise(fd, offset, len(buffer), os.POSIX_FADV_DONTNEED)
    return got, dontcache


def _write(fd: int, offset: int, data: bytes, append: bool) -> Written:
    """In a thread."""
    before = os.fstat(fd)
    view = memoryview(data)
    flags = os.RWF_APPEND if append else 0
    count = 0
    while count < len(data):
        count += os.pwritev(fd, [view[count:]], offset + count, flags)
    return Written(count, before, os.fstat(fd))
