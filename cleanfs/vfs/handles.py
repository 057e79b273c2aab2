"""What a FUSE file handle stands for: an open file or directory of the source."""

import errno
import functools
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Protocol, TypeVar, TypeVarTuple

import trio

from cleanfs.cache.files import CachedFile
from cleanfs.cache.fingerprint import own_fingerprint
from cleanfs.cache.in_flight import Buffer
from cleanfs.cache.pagecache import PageCache
from cleanfs.cache.pending_writes import PendingWrite
from cleanfs.cache.read_ranges import RangeSet
from cleanfs.fuse.notify import Notifier
from cleanfs.latency import Latencies
from cleanfs.linux.mounts import LOCAL_FILE_SYSTEMS, FileSystemTypes
from cleanfs.source import listing, namespace
from cleanfs.source.file import SourceFile, Written
from cleanfs.source.io import Backing, SourceFs
from cleanfs.source.listing import EntryStat
from cleanfs.source.space_retry import SpaceRetry
from cleanfs.vfs.coherency import Coherency, CoherencyChecker
from cleanfs.vfs.inodes import Inode, Told, stamps_of
from cleanfs.vfs.invalidate import tell

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

IO_FLAGS = ~(os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_NOFOLLOW | os.O_DIRECT | os.O_TRUNC)
"""What of a program's open flags reaches the source. O_DIRECT asks to bypass the kernel's page cache
of the mount, which the kernel does; on the source it would demand alignment of our buffers. O_TRUNC
is a change, made apart. O_APPEND would move what the kernel writes back from a mapping to the end, so
appending is said write by write."""


Rollback = Callable[[], None]


class Handle(Protocol):
    """What the read and write handlers need of a handle."""

    async def read(self, offset: int, size: int) -> Buffer:
        """Up to ``size`` bytes, short only at the end. Raises OSError."""

    async def write(self, offset: int, data: bytes) -> tuple[int, Rollback | None]:
        """Write all of ``data``. Raises OSError.

        Returns the bytes written, and what to do if the kernel refuses the reply.
        """

    async def flush(self) -> None:
        """A descriptor of the handle was closed."""

    async def release(self) -> None:
        """The last one was."""

    async def sync(self, data_only: bool) -> None:
        """Make what was written durable."""


@dataclass(frozen=True, slots=True)
class Before:
    """A moment before a stat, to judge its result by."""

    clock: int
    """The page cache's: what changed since has a later version."""
    now_ns: int


@dataclass(frozen=True, slots=True)
class Services:
    """What the handlers of one mount share."""

    backing: Backing
    pagecache: PageCache
    coherency: CoherencyChecker
    types: FileSystemTypes
    notifier: Notifier
    latencies: Latencies
    flushless: bool = False
    """The kernel does not tell us of closed descriptors: closing reports nothing on the source."""

    writeback: bool = False
    """The kernel keeps what programs write, and writes it later."""

    @property
    def space_retry(self) -> SpaceRetry:
        """What was removed, and takes space."""
        return self.backing.space_retry

    def before(self) -> Before:
        """This moment."""
        return Before(self.pagecache.clock, time.time_ns())

    def is_local(self, inode: Inode) -> bool:
        """Whether the inode, once held, is in this machine's memory."""
        return self.types[inode.device] in LOCAL_FILE_SYSTEMS

    async def inline_if_local(self, inode: Inode, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a call that only touches an inode that we hold: at once where that is in memory.

        So it is on a local file system for fstat, open, close and readlink. A thread costs ten
        times what they do. On a server's file system any of them may wait.
        """
        if self.is_local(inode):
            return call(*args)
        return await self.backing.in_thread(call, *args)

    def source_fs(self, inode: Inode) -> SourceFs:
        """The file system that the inode is on."""
        return self.backing.file_system(inode.device, self.is_local(inode))


class Use:
    """Calls under way on a descriptor, which must not be closed before they return.

    The kernel closes no file that somebody waits for. But we let go of programs that are killed while
    they wait; then the file is closed, and the call goes on.
    """

    __slots__ = ("_idle", "_users")

    def __init__(self) -> None:
        """None."""
        self._users = 0
        self._idle: trio.Event | None = None

    def __bool__(self) -> bool:
        """Whether there is one."""
        return self._users > 0

    def __enter__(self) -> None:
        """A call begins."""
        self._users += 1

    def __exit__(self, *_: object) -> None:
        """It has returned."""
        self._users -= 1
        if self._idle is not None and not self._users:
            self._idle.set()

    async def ended(self) -> None:
        """Return when there is none; no request will begin another one."""
        while self._users:  # who is let go between two calls begins the second one all the same
            self._idle = trio.Event()
            await self._idle.wait()


class FileHandle:
    """An open regular file."""

    def __init__(self, services: Services, inode: Inode, file: CachedFile, fd: int, flags: int) -> None:
        """Takes over ``fd``, opened with ``flags``."""
        self._services = services
        self._pagecache = services.pagecache
        self._latencies = services.latencies
        self.inode = inode
        self.file = file
        self.fd = fd
        durable = bool(flags & (os.O_SYNC | os.O_DSYNC))
        self._source = SourceFile(fd, services.source_fs(inode), services.backing, durable=durable)
        self.use = Use()
        self._appends = bool(flags & os.O_APPEND) and services.coherency.mode is not Coherency.NONE
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        self._drop_due = self._writes = False
        file.pins += 1
        file.handles += 1

    def may_write(self) -> None:
        """The open is about to be answered. From now on a write by this handle may be being filled."""
        services, file = self._services, self.file
        if not self.writable or services.writeback:  # then the kernel drops nothing unwritten
            return
        notifier = services.notifier
        if file.read_ranges is None:
            file.read_ranges = RangeSet(dropped=not notifier.explicit)
            notifier.in_writing(self.inode.node, file.read_ranges)
        if file.drops_due > self._drop_due or notifier.drops_pages(self.inode.node):
            file.read_ranges.dropped = True
        file.read_ranges.writers += 1
        self._writes = True

    def drops_pages(self) -> None:
        """The kernel drops the file's pages when it gets the answer to the open of this handle.

        Who writes by this handle has not begun to. By another one a write may be being filled.
        """
        if not self._drop_due:
            self._drop_due = True
            self.file.drops_due += 1
        read_ranges = self.file.read_ranges
        if read_ranges is not None and read_ranges.writers > self._writes:
            read_ranges.dropped = True

    async def read(self, offset: int, size: int) -> Buffer:
        """The hook: page cache, then cleancache, then the source."""
        with self.use:
            began = perf_counter_ns()
            if self._drop_due:
                self._opener_ran()
            pagecache = self._pagecache
            if self.file.writes:
                for write in [write for write in self.file.writes if write.overlaps(offset, size)]:
                    await write.wait()
            read_ranges = self.file.read_ranges
            if read_ranges is None:
                data, found_in = await pagecache.read(self.file, self._source, offset, size)
            else:  # with O_DIRECT as well: a mapping has pages all the same
                read_ranges.begin(offset, offset + size)
                try:
                    data, found_in = await pagecache.read(self.file, self._source, offset, size)
                finally:
                    read_ranges.end(offset, offset + size)
            self._latencies.read(found_in, perf_counter_ns() - began, len(data))
            return data

    async def write(self, offset: int, data: bytes) -> tuple[int, Rollback]:
        """Write through, with what is cached of the range discarded before and after.

        On a handle that was opened with O_APPEND the kernel sends what a program appends, at the end
        of the file that it knows; what it writes back from a mapping, before that end; and what a
        program writes elsewhere after it has taken O_APPEND away (F_SETFL), of which we are not told.
        The first must not overwrite what others appended in the source. Where there are no others
        the kernel knows the end, and each write goes where it says.
        """
        with self.use:
            if self._drop_due:
                self._opener_ran()
            return await self._write_in_order(offset, data)

    async def _write_in_order(self, offset: int, data: bytes) -> tuple[int, Rollback]:
        """Write while reads of the range wait, and then drop pages that were read before."""
        began = perf_counter_ns()
        file = self.file
        end = offset + len(data)
        append = self._appends and self.inode.appends(offset, end)
        stop = None if append else end
        pending = PendingWrite(min(offset, file.size) if append else offset, stop)
        file.writes.append(pending)
        try:
            written, told = await self._apply_write(offset, data, append, stop)
        finally:
            file.writes.remove(pending)
            pending.end()
        read_ranges = file.read_ranges
        if read_ranges is not None and read_ranges.written(offset, end, mmap.PAGESIZE):
            read = functools.partial(read_ranges.being_read, offset, end)
            await self._services.notifier.written(self.inode.node, offset, end, read)
        self._latencies.write(perf_counter_ns() - began, written.count)
        rollback = functools.partial(tell, self._services.notifier, self.inode, before=told)
        return written.count, rollback

    async def _apply_write(
        self, offset: int, data: bytes, append: bool, stop: int | None
    ) -> tuple[Written, Told]:
        """Write to the source, with the range invalidated before and after; take the new fingerprint.

        Returns what was written, and what the kernel had been told before.
        """
        services, file, inode = self._services, self.file, self.inode
        writer, inode.asked_for = inode.asked_for, None
        async with services.pagecache.mutating(file, offset, stop):
            try:
                written = await self._source.write_all(offset, data, append=append, writer=writer)
                if services.flushless and not services.is_local(inode):
                    # Mounted below the source after us; nobody will ask what its close has to say.
                    await services.backing.in_thread(namespace.flush, self.fd)
            except BaseException:
                services.coherency.distrust(file)  # a part may have been written
                services.notifier.inode(inode.node)
                raise
            before, after = own_fingerprint(written.before), own_fingerprint(written.after)
            size = before.size + written.count if append else max(before.size, offset + len(data))
            theirs = services.coherency.after_own_change(file, before, after, size=size)
        told = inode.told
        inode.wrote_to(offset + written.count)
        elsewhere = append and after.size != offset + written.count
        if inode.sent == stamps_of(written.before) and not (theirs or elsewhere):
            inode.sent = stamps_of(written.after)
        if theirs or elsewhere or written.before.st_mode != written.after.st_mode:
            services.notifier.inode(inode.node)
        return written, told

    async def flush(self) -> None:
        """Report what close would; nothing is buffered here.

        A program that was killed in a call which hangs closes its files: it is not to hang there.
        """
        self._opener_ran()
        if not self.writable:
            return
        if self.use and self._services.backing.orphans:
            raise OSError(errno.EINTR, os.strerror(errno.EINTR))
        with self.use:
            await self._services.inline_if_local(self.inode, namespace.flush, self.fd)

    async def release(self) -> None:
        """Close. The last close of a file without a name discards its pages."""
        services, file = self._services, self.file
        self._opener_ran()
        await self.use.ended()
        file.pins -= 1
        file.handles -= 1
        if self._writes and file.read_ranges is not None:
            file.read_ranges.writers -= 1
            if not file.read_ranges.writers:
                services.notifier.not_in_writing(self.inode.node, file.read_ranges)
                file.read_ranges = None
        await self._source.drop_rest()
        st = await services.inline_if_local(self.inode, fstat_and_close, self.fd)
        if st.st_nlink == 0:
            services.pagecache.forget(file)

    async def sync(self, data_only: bool) -> None:
        """``fsync`` the source."""
        with self.use:
            await self._services.backing.in_thread(namespace.sync, self.fd, data_only)

    def _opener_ran(self) -> None:
        """So the kernel has dropped what the answer to the open told it to drop."""
        if self._drop_due:
            self._drop_due = False
            self.file.drops_due -= 1
        if self.inode.dropped_for is self:
            self.inode.dropped_for, self.inode.pages_dropped_by = None, 0.0


class DirHandle:
    """An open directory: a snapshot of its names, taken anew at each rewind.

    The position after the nth name is n, so entries that come and go shift nothing, and ``seekdir``
    works. Attributes are read in batches, one thread call each, and only for the request at hand:
    the kernel believes what a listing says of a file, and takes an old answer for a new one.
    """

    def __init__(self, services: Services, inode: Inode, fd: int, *, handles: bool = False) -> None:
        """Takes over ``fd``; ``handles`` says whether entries are listed with their file handles."""
        self._services = services
        self.inode = inode
        self.fd = fd
        self._handles = handles
        self.use = Use()
        self._names = listing.Names()
        self._entries: dict[int, tuple[bytes, EntryStat]] = {}
        self._entries_before = Before(0, 0)
        self._dots: dict[bytes, os.stat_result] = {}
        self.before = Before(0, 0)
        """When the attributes of the last entry, or of those of a listing's beginning, had not yet been
        read. Two may list at a time: one who is gone, and who shares the descriptor."""
        self.batch = 1
        """Names per thread call: as many as a reply is likely to take. Some 20 in the kernel's
        smallest, 4 KiB; 186 for a program that lists with 32 KiB, as glibc does."""

    async def rewind(self) -> None:
        """Take the snapshot. Raises OSError."""
        before = self._services.before()
        run = self._services.backing.in_thread
        listed = await run(listing.list_directory, self.fd, self.batch, self._handles)
        self._names = listed.names
        self._keep(0, listed.names.some(0, len(listed.stats)), listed.stats, before)
        self._dots = {b".": listed.dot, b"..": listed.dot_dot}

    def _keep(self, start: int, names: list[bytes], stats: list[EntryStat], before: Before) -> None:
        self._entries = dict(enumerate(zip(names, stats, strict=True), start))
        self._entries_before = before

    def forget_stats(self) -> None:
        """A new request begins."""
        self._entries.clear()

    def dot(self, name: bytes) -> os.stat_result:
        """Attributes of ``.`` or ``..``."""
        return self._dots[name]

    async def entry(self, position: int) -> tuple[bytes, EntryStat] | None:
        """The name at a position and what its stat gave; None at the end. Raises OSError."""
        if position >= len(self._names):
            return None
        if position not in self._entries:
            before = self._services.before()
            names = self._names.some(position, self.batch)
            run = self._services.backing.in_thread
            stats = await run(listing.stat_names, self.fd, names, self._handles)
            self._keep(position, names, stats, before)
        self.before = self._entries_before
        return self._entries[position]

    async def release(self) -> None:
        """Close."""
        await self.use.ended()
        await self._services.inline_if_local(self.inode, os.close, self.fd)

    async def sync(self, data_only: bool) -> None:
        """``fsync`` the directory."""
        with self.use:
            await self._services.backing.in_thread(namespace.sync, self.fd, data_only)


def fstat_and_close(fd: int) -> os.stat_result:
    """Attributes at the last moment. Raises OSError."""
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)
