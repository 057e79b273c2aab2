"""Handles: the open files and directories of the source that FUSE file handles refer to."""

import errno
import functools
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Final, Protocol, TypeVar, TypeVarTuple

import trio

from cleanfs.cache.files import CachedFile
from cleanfs.cache.fingerprint import own_fingerprint
from cleanfs.cache.in_flight import Buffer
from cleanfs.cache.pagecache import PageCache
from cleanfs.cache.pending_writes import PendingWrite
from cleanfs.cache.read_ranges import RangeSet
from cleanfs.cache.state import HandleState
from cleanfs.eager import before_wait
from cleanfs.fuse.notify import Notifier
from cleanfs.latency import Latencies
from cleanfs.linux.mounts import LOCAL_FILE_SYSTEMS, FileSystemTypes
from cleanfs.source import listing, namespace
from cleanfs.source.drop_behind import Stream
from cleanfs.source.file import SourceFile, Written
from cleanfs.source.io import Backing, SourceFs
from cleanfs.source.listing import EntryStat
from cleanfs.source.space_retry import SpaceRetry
from cleanfs.vfs.coherency import Coherency, CoherencyChecker
from cleanfs.vfs.directory_state import DirectoryState
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.invalidate import invalidate
from cleanfs.vfs.kernel_view import Told
from cleanfs.vfs.write_request import appends, bypasses_cache, unprivileged_writer, writes_back

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

IO_FLAGS = ~(os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_NOFOLLOW | os.O_DIRECT | os.O_TRUNC)
"""The open flags of a program that reach the source. With O_DIRECT the kernel bypasses its page cache
of the mount; on the source it would demand aligned buffers. O_TRUNC is a change, which is made apart.
``namespace`` drops O_APPEND, which would move the write-back of a mapping to the end of the file: each
write says whether it appends."""


Rollback = Callable[[], None]


class Handle(Protocol):
    """The part of a handle that the FUSE handlers use."""

    async def read(self, offset: int, size: int) -> Buffer:
        """Read up to ``size`` bytes, short only at the end. Raises OSError."""

    async def write(self, offset: int, data: bytes) -> tuple[int, Rollback | None]:
        """Write all of ``data``. Raises OSError.

        Returns the bytes written, and what to do if the kernel refuses the reply.
        """

    async def flush(self) -> None:
        """Report what a close would: a descriptor of the handle was closed."""

    async def release(self) -> None:
        """Close: the last descriptor of the handle was closed."""

    async def sync(self, data_only: bool) -> None:
        """Make what was written durable."""


@dataclass(frozen=True, slots=True)
class Before:
    """Marks a moment before a stat, to tell which changes its result may miss."""

    clock: int
    """The page cache's clock: a file that has changed since has a later version."""
    now_ns: int


@dataclass(frozen=True, slots=True)
class Services:
    """The objects that the handlers of one mount share."""

    backing: Backing
    pagecache: PageCache
    coherency: CoherencyChecker
    types: FileSystemTypes
    notifier: Notifier
    latencies: Latencies
    flushless: bool = False
    """The kernel sends no FLUSH: closing reports nothing on the source."""

    writeback: bool = False
    """Write-back: the kernel keeps what programs write, and writes it later."""

    @property
    def space_retry(self) -> SpaceRetry:
        """Return the removed inodes that still take space."""
        return self.backing.space_retry

    def before(self) -> Before:
        """Return this moment."""
        return Before(self.pagecache.clock, time.time_ns())

    def is_local(self, inode: Inode) -> bool:
        """Tell whether the inode, once held, is in this machine's memory."""
        return self.types[inode.device] in LOCAL_FILE_SYSTEMS

    async def inline_if_local(self, inode: Inode, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a call that touches only a held inode: inline where the inode is in memory.

        On a local file system that is so for fstat, open, close and readlink. A thread costs ten
        times what they do. On a server's file system any of them may wait.
        """
        if self.is_local(inode):
            return call(*args)
        return await self.backing.in_thread(call, *args)

    def source_fs(self, inode: Inode) -> SourceFs:
        """Return the file system that the inode is on."""
        return self.backing.file_system(inode.device, self.is_local(inode))


class Use:
    """Counts the calls under way on a descriptor, which must not be closed before they return.

    The kernel closes no file while a program waits for a call on it. But a killed program is released
    from its wait (``interrupts``): the kernel closes the file, and the call goes on.
    """

    __slots__ = ("_idle", "_users")

    def __init__(self) -> None:
        """Start with none."""
        self._users = 0
        self._idle: trio.Event | None = None

    def __bool__(self) -> bool:
        """Tell whether there is one."""
        return self._users > 0

    def __enter__(self) -> None:
        """Begin a call."""
        self._users += 1

    def __exit__(self, *_: object) -> None:
        """End a call."""
        self._users -= 1
        if self._idle is not None and not self._users:
            self._idle.set()

    async def ended(self) -> None:
        """Wait until there is none; no new request will begin another one."""
        while self._users:  # a request whose requester is gone may still begin a second call
            self._idle = trio.Event()
            await before_wait()
            await self._idle.wait()


class FileHandle:
    """An open regular file."""

    def __init__(
        self,
        services: Services,
        inode: Inode,
        file: CachedFile,
        fd: int,
        flags: int,
        stream: Stream | None = None,
        *,
        writes: bool = False,
    ) -> None:
        """Take over ``fd``, which was opened with ``flags``, and by which ``stream`` was read.

        ``writes`` says that ``begin_writing`` was called for it.
        """
        self._services = services
        self._pagecache = services.pagecache
        self._latencies = services.latencies
        self.inode = inode
        self.file = file
        self.fd = fd
        durable = bool(flags & (os.O_SYNC | os.O_DSYNC))
        fs, backing = services.source_fs(inode), services.backing
        self._source = SourceFile(fd, fs, backing, stream, durable=durable)
        self.use = Use()
        self._may_append = services.coherency.mode is not Coherency.NONE
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        self.state = HandleState(file, inode.kernel, fd)
        self._source.serve(self.state, writable=self.writable)
        self._writes = writes
        self._bypasses = False
        file.pins += 1
        file.handles += 1

    def may_write(self) -> None:
        """Note that the OPEN reply is about to be sent: a program may then fill pages to write."""
        services = self._services
        if not self.writable or services.writeback:  # then the kernel drops no unwritten page
            return
        begin_writing(services, self.inode, self.file, own_drop_due=self.state.drop_due)
        self._writes = True

    def drops_pages(self) -> None:
        """Note that the kernel drops the file's pages when it gets the reply to this handle's OPEN.

        No program has begun to write by this handle. By another one, it may be filling pages right now.
        """
        if not self.state.drop_due:
            self.state.drop_due = True
            self.file.drops_due += 1
        read_ranges = self.file.read_ranges
        if read_ranges is not None and read_ranges.writers > self._writes:
            read_ranges.dropped = True

    def bypasses_cache(self) -> None:
        """Note that programs write past the kernel's pages, which it drops only after our reply.

        It says not when. The close of the handle shows that it has dropped them all.
        """
        if not self._bypasses:
            self._bypasses = True
            self._services.notifier.hold_evictions(self.inode.node)

    async def read(self, offset: int, size: int) -> Buffer:
        """Read from the page cache, cleancache or the source, after earlier writes of the range."""
        with self.use:
            began = perf_counter_ns()
            if self.state.drop_due:
                self.opener_ran()
            pagecache = self._pagecache
            if self.file.writes:
                for write in [write for write in self.file.writes if write.overlaps(offset, size)]:
                    await write.wait()
            read = functools.partial(pagecache.read, direct=bypasses_cache())
            read_ranges = self.file.read_ranges
            if read_ranges is None:
                data, found_in = await read(self.file, self._source, offset, size)
            else:  # also with O_DIRECT: the file may be mapped as well
                read_ranges.begin(offset, offset + size)
                try:
                    data, found_in = await read(self.file, self._source, offset, size)
                finally:
                    read_ranges.end(offset, offset + size)
            if len(data) < size:
                self.inode.kernel.read_ended(offset + len(data))
            self._latencies.read(found_in, perf_counter_ns() - began, len(data))
            return data

    async def write(self, offset: int, data: bytes) -> tuple[int, Rollback]:
        """Write through to the source, with the cached range invalidated before and after.

        The kernel sends what a program appends with the offset at which it sees the end of the file. It
        must not overwrite what others have appended in the source, so it goes to the end there. With no
        others (``--coherency none``) the kernel knows the end, and each write goes to its offset.
        """
        with self.use:
            if self.state.drop_due:
                self.opener_ran()
            if bypasses_cache():
                self.bypasses_cache()
            return await self._write_in_order(offset, data)

    async def _write_in_order(self, offset: int, data: bytes) -> tuple[int, Rollback]:
        """Write while reads of the range wait, and then drop pages that were read before.

        What the kernel writes back it takes from these pages: they cannot be older, and to drop them
        would wait for this reply.
        """
        began = perf_counter_ns()
        file = self.file
        end = offset + len(data)
        append = self._may_append and appends()
        stop = None if append else end
        pending = PendingWrite(min(offset, file.size) if append else offset, stop)
        file.writes.append(pending)
        file.pending_writes += 1
        try:
            written, told = await self._apply_write(offset, data, append, stop)
        finally:
            file.writes.remove(pending)
            file.pending_writes -= 1
            pending.end()
        read_ranges = None if writes_back() else file.read_ranges
        if read_ranges is not None and read_ranges.written(offset, end, mmap.PAGESIZE):
            read = functools.partial(read_ranges.being_read, offset, end)
            await self._services.notifier.written(self.inode.node, offset, end, read)
        self._latencies.write(perf_counter_ns() - began, written.count)
        rollback = functools.partial(invalidate, self._services.notifier, self.inode, before=told)
        return written.count, rollback

    async def _apply_write(
        self, offset: int, data: bytes, append: bool, stop: int | None
    ) -> tuple[Written, Told]:
        """Write to the source, with the range invalidated before and after; take the new fingerprint.

        Returns what was written, and what the kernel had been told before.
        """
        services, file, inode = self._services, self.file, self.inode
        async with services.pagecache.mutating(file, offset, stop):
            written = await self._write_source(offset, data, append)
            before, after = own_fingerprint(written.before), own_fingerprint(written.after)
            size = before.size + written.count if append else max(before.size, offset + len(data))
            theirs = services.coherency.after_own_change(file, before, after, size=size)
        told = inode.kernel.told
        inode.kernel.written_to(offset + written.count)
        elsewhere = append and after.size != offset + written.count
        if not (theirs or elsewhere):
            inode.kernel.knows_change(written.before, written.after)
        if theirs or elsewhere or written.before.st_mode != written.after.st_mode:
            services.notifier.inode(inode.node)
        return written, told

    async def _write_source(self, offset: int, data: bytes, append: bool) -> Written:
        """Write to the source; distrust the file if that fails, because a part may be written."""
        services = self._services
        try:
            written = await self._source.write_all(
                offset, data, append=append, writer=unprivileged_writer()
            )
            if services.flushless and not services.is_local(self.inode):
                # Mounted below the source after the mount: no FLUSH will report what a close does.
                await services.backing.in_thread(namespace.flush, self.fd)
        except BaseException:
            services.coherency.distrust(self.file)
            services.notifier.inode(self.inode.node)
            raise
        return written

    async def flush(self) -> None:
        """Report what close would; nothing is buffered here.

        A program that was killed in a hung call closes its files, and must not hang again.
        """
        self.opener_ran()
        if not self.writable:
            return
        if self.use and self._services.backing.abandoned_calls:
            raise OSError(errno.EINTR, os.strerror(errno.EINTR))
        with self.use:
            await self._services.inline_if_local(self.inode, namespace.flush, self.fd)

    async def release(self) -> None:
        """Close the file. The last close of a file without a name discards its pages."""
        services, file = self._services, self.file
        self.opener_ran()
        await self.use.ended()
        if self._bypasses:
            services.notifier.release_evictions(self.inode.node)
        file.pins -= 1
        file.handles -= 1
        if self._writes:
            end_writing(services, self.inode, file)
        await self._source.drop_rest()
        st = await services.inline_if_local(self.inode, fstat_and_close, self.fd)
        if st.st_nlink == 0:
            services.pagecache.forget(file)

    async def sync(self, data_only: bool) -> None:
        """Make what was written durable in the source (``fsync``)."""
        with self.use:
            await self._services.backing.in_thread(namespace.sync, self.fd, data_only)

    def opener_ran(self) -> None:
        """Note that the opener has run: the kernel has applied the invalidation of the OPEN reply."""
        self._pagecache.opener_ran(self.state)


NAME_SIZE: Final = 2 << 10
"""How many bytes a name in a directory counts for (``InlinePolicy.took``): 1 us."""


def begin_writing(
    services: Services, inode: Inode, file: CachedFile, *, own_drop_due: bool = False
) -> None:
    """Note that a program may fill pages to write, by a handle that it is about to get.

    ``own_drop_due`` says that the reply which gives it has the kernel drop the file's pages.
    """
    notifier = services.notifier
    if file.read_ranges is None:
        file.read_ranges = RangeSet(file, dropped=not notifier.explicit)
        notifier.in_writing(inode.node, file.read_ranges)
    if file.drops_due > own_drop_due or notifier.drops_pages(inode.node):
        file.read_ranges.dropped = True
    file.read_ranges.writers += 1


def end_writing(services: Services, inode: Inode, file: CachedFile) -> None:
    """Note that a handle for which ``begin_writing`` was called is closed."""
    if file.read_ranges is None:
        return
    file.read_ranges.writers -= 1
    if not file.read_ranges.writers:
        services.notifier.not_in_writing(inode.node, file.read_ranges)
        file.read_ranges, file.remembers_reads = None, False


class DirHandle:
    """An open directory: a snapshot of its names, taken anew at each rewind.

    The position after the nth name is n, so entries that come and go shift nothing, and ``seekdir``
    works. Attributes are read in batches, one thread call each, and only for the request at hand:
    the kernel takes the attributes in a listing for current ones.
    """

    def __init__(self, services: Services, inode: Inode, fd: int, *, handles: bool = False) -> None:
        """Take over ``fd``. ``handles`` says whether entries are listed with their file handles."""
        self._services = services
        self.inode = inode
        self.fd = fd
        self._handles = handles
        self.use = Use()
        self.state = DirectoryState(fd)
        self._listings = services.source_fs(inode).listings
        self._entries: dict[int, tuple[bytes, EntryStat]] = {}
        self._entries_before = Before(0, 0)
        self._dots: dict[bytes, os.stat_result] = {}
        self.before = Before(0, 0)
        """A moment before the attributes of the last entry, or of those at a listing's beginning, were
        read. Two requests may list at a time: one whose requester is gone, and one by another process
        that shares the fd."""
        self.batch = 1
        """How many names one thread call reads: as many as a reply is likely to take. That is some 20
        in the kernel's smallest reply, 4 KiB, and 186 in the 32 KiB that glibc requests."""

    async def rewind(self) -> None:
        """Take the snapshot. Raises OSError."""
        before = self._services.before()
        run = self._services.backing.in_thread
        self.state.rewinding += 1
        try:
            listed = await run(listing.list_directory, self.fd, self.batch, self._handles)
        finally:
            self.state.rewinding -= 1
        self._listings.took(listed.seconds, len(listed.names) * NAME_SIZE)
        self.state.names = listed.names
        self._keep(0, listed.names.some(0, len(listed.stats)), listed.stats, before)
        self._dots = {b".": listed.dot, b"..": listed.dot_dot}

    def _keep(self, start: int, names: list[bytes], stats: list[EntryStat], before: Before) -> None:
        self._entries = dict(enumerate(zip(names, stats, strict=True), start))
        self._entries_before = before

    def forget_stats(self) -> None:
        """Forget the attributes that were read for the last request."""
        self._entries.clear()

    def dot(self, name: bytes) -> os.stat_result:
        """Return the attributes of ``.`` or ``..``."""
        return self._dots[name]

    async def entry(self, position: int) -> tuple[bytes, EntryStat] | None:
        """Return the name at a position and its stat's outcome; None at the end. Raises OSError."""
        names = self.state.names
        if position >= len(names):
            return None
        if position not in self._entries:
            before = self._services.before()
            some = names.some(position, self.batch)
            run = self._services.backing.in_thread
            stats = await run(listing.stat_names, self.fd, some, self._handles)
            self._keep(position, some, stats, before)
        self.before = self._entries_before
        return self._entries[position]

    async def release(self) -> None:
        """Close the directory."""
        await self.use.ended()
        await self._services.inline_if_local(self.inode, os.close, self.fd)

    async def sync(self, data_only: bool) -> None:
        """Make the directory durable in the source (``fsync``)."""
        with self.use:
            await self._services.backing.in_thread(namespace.sync, self.fd, data_only)


def fstat_and_close(fd: int) -> os.stat_result:
    """Close an fd. Returns the attributes from right before. Raises OSError."""
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)
