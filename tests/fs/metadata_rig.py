"""Hold a file system over a source, whose requests the channel serves where it can, or Python all."""

import contextlib
import errno
import os
import stat as stat_module
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pyfuse3
from pyfuse3 import EntryAttributes, FileHandleT, FlagT, FUSEError, InodeT, RequestContext, XAttrNameT

from cleanfs.cache.cleancache import Cleancache
from cleanfs.cache.files import CachedFile
from cleanfs.cache.pagecache import PageCache
from cleanfs.cache.resident import make_resident
from cleanfs.fs.control import Control, Operator
from cleanfs.fs.operations import CleanFS
from cleanfs.fuse.channel import Channel
from cleanfs.fuse.notify import Notifier
from cleanfs.fuse.protocol import (
    FOPEN_KEEP_CACHE,
    FUSE_BATCH_FORGET,
    FUSE_FORGET,
    FUSE_FORGET_ONE,
    FUSE_OPEN_OUT,
    FUSE_RELEASE_IN,
)
from cleanfs.latency import Latencies
from cleanfs.linux.mounts import FileSystemTypes
from cleanfs.source.identity import Rules
from cleanfs.source.io import Backing
from cleanfs.source.namespace import PATH_FLAGS
from cleanfs.vfs.coherency import Coherency, CoherencyChecker
from cleanfs.vfs.handles import Services
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.source_watch import SourceWatch
from tests.harness.kernel import Device, message

LOOKUP, GETATTR, READLINK, OPEN, RELEASE, GETXATTR = 1, 3, 5, 14, 18, 22

O_LARGEFILE = 0o100000
"""What the kernel adds to the flags of a 64-bit program; Python's own is 0."""

THREAD = 77
TIMEOUT = 1.5

GETATTR_IN = struct.pack("=IIQ", 0, 0, 0)
ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
ENTRY_OUT = struct.Struct("=QQQQII")
ATTR_OUT = struct.Struct("=QII")


class Entry(NamedTuple):
    """Holds what a LOOKUP or GETATTR reply says; a GETATTR's has no generation."""

    node: int
    generation: int
    entry_timeout: float
    attr_timeout: float
    attributes: tuple[int, ...]


class Opened(NamedTuple):
    """Holds what an OPEN reply says, without the number."""

    keeps_pages: bool


Reply = Entry | Opened | bytes | int
"""An entry, an open file, the data, or a negative errno."""


class QuietNotifier(Notifier):
    """Queues notifications, and counts the refreshes of sizes, which end at once."""

    def __init__(self) -> None:
        super().__init__()
        self.refreshes = 0
        self.explicit = True

    @property
    def can_refresh_sizes(self) -> bool:
        return True

    async def refreshed(self, node: int, generation: int, path: bytes, *, pages: bool = False) -> None:
        self.refreshes += 1

    async def pages_dropped(self, node: int) -> None:
        self._queued.discard(node)
        self._note_pending(node)

    async def attributes_changed(self, node: int) -> None:
        pass

    def deliver(self) -> None:
        """Have all that is queued sent."""
        sent = list(self._queued)
        self._queued.clear()
        self._note_pending(*sent)


class Watch:
    """Satisfies ``CleanFS`` with a watch of the source that announces all changes, or not all."""

    def __init__(self, announces_all: bool) -> None:
        self.announces_all = announces_all

    def announces(self, inode: Inode) -> bool:
        return self.announces_all


class NoOperator:
    """Satisfies a control directory that the test does not use."""

    stats = set_backend = set_log_level = options = drop = None


@dataclass
class Side:
    """One of the file systems. ``device`` is None for the one whose requests Python handles."""

    source: Path
    mode: Coherency
    device: Device | None
    watch: Watch | None = None
    exports: bool = False
    natively: int = 0
    """Requests that the channel served."""
    fhs: list[tuple[int, FileHandleT]] = field(default_factory=list)

    def __post_init__(self) -> None:
        cleancache = Cleancache().init_fs(4096)
        cleancache.state.shared = self.mode is not Coherency.NONE
        pagecache = PageCache(1 << 20, cleancache, make_resident(4096))
        checker = CoherencyChecker(pagecache, self.mode)
        self.notifier = QuietNotifier()
        self.services = Services(
            Backing(), pagecache, checker, FileSystemTypes(), self.notifier, Latencies()
        )
        root_fd = os.open(self.source, PATH_FLAGS)
        space_retry = self.services.space_retry
        rules = Rules(self.services.types)
        self.table = InodeTable(root_fd, 100, 1000, space_retry, rules, exports=self.exports)
        os.close(root_fd)
        self.channel = Channel(0)
        control = Control(cast(Operator, NoOperator()))
        self.fs = CleanFS(
            self.services,
            self.table,
            control,
            self.channel,
            attr_timeout=TIMEOUT,
            watch=cast(SourceWatch | None, self.watch),
        )
        if self.watch is not None and self.watch.announces_all:
            self.table.states.watch(self.table.root.device)
        self.native: Any = None
        if self.device is not None:
            self.channel.receive_from(self.device.fd)
            self.channel.serve_from(cleancache.state)
            self.native = self.channel._native  # noqa: SLF001  # as in wait_readable

    # -- requests ---------------------------------------------------------------------------------

    def served(self, opcode: int, node: int, body: bytes, thread: int = THREAD, uid: int = 0) -> bool:
        """Send a request to the channel. Return whether that served it."""
        if self.device is None:
            return False
        self.device.kernel.send(message(opcode, 2, body, pid=thread, node=node, uid=uid, gid=uid))
        if self.native.receive_now() is not None:
            return False
        self.natively += 1
        return True

    def _reply(self) -> tuple[int, bytes]:
        assert self.device is not None
        [(_, error, body)] = self.device.replies()
        return error, body

    async def lookup(self, parent: int, name: bytes, thread: int = THREAD) -> Reply:
        if self.served(LOOKUP, parent, name + b"\0", thread):
            error, body = self._reply()
            if error:
                return error
            node, generation, entry_s, attr_s, entry_ns, attr_ns = ENTRY_OUT.unpack_from(body)
            attributes = ATTR.unpack_from(body, ENTRY_OUT.size)
            return Entry(node, generation, entry_s + entry_ns / 1e9, attr_s + attr_ns / 1e9, attributes)
        with errors() as error_of:
            entry = await self.fs.lookup(InodeT(parent), pyfuse3.FileNameT(name), context(thread))
            return entry_of(entry)
        return error_of[0]

    async def getattr(self, node: int, thread: int = THREAD) -> Reply:
        if self.served(GETATTR, node, GETATTR_IN, thread):
            error, body = self._reply()
            assert not error
            attr_s, attr_ns, _ = ATTR_OUT.unpack_from(body)
            attributes = ATTR.unpack_from(body, ATTR_OUT.size)
            return Entry(node, 0, 0, attr_s + attr_ns / 1e9, attributes)
        with errors() as error_of:
            entry = await self.fs.getattr(InodeT(node), context(thread))
            return entry_of(entry)._replace(node=node, generation=0, entry_timeout=0)
        return error_of[0]

    async def readlink(self, node: int) -> Reply:
        if self.served(READLINK, node, b"", THREAD):
            error, body = self._reply()
            return error or body
        with errors() as error_of:
            return bytes(await self.fs.readlink(InodeT(node), context(THREAD)))
        return error_of[0]

    async def getxattr(self, node: int, name: bytes) -> Reply:
        if self.served(GETXATTR, node, struct.pack("=II", 100, 0) + name + b"\0", THREAD):
            error, body = self._reply()
            return error or body
        with errors() as error_of:
            return await self.fs.getxattr(InodeT(node), XAttrNameT(name), context(THREAD))
        return error_of[0]

    async def forget(self, *counts: tuple[int, int]) -> None:
        body = struct.pack("=II", len(counts), 0) + b"".join(
            FUSE_FORGET_ONE.pack(*one) for one in counts
        )
        if self.served(FUSE_BATCH_FORGET, 0, body, 0):
            return
        await self.fs.forget([(InodeT(node), count) for node, count in counts])

    async def forget_one(self, node: int, count: int) -> None:
        if not self.served(FUSE_FORGET, node, struct.pack("=Q", count), 0):
            await self.fs.forget([(InodeT(node), count)])

    async def open(
        self, node: int, flags: int = os.O_RDONLY, *, uid: int = 0, thread: int = THREAD
    ) -> Opened | int:
        flags |= O_LARGEFILE
        if self.served(OPEN, node, struct.pack("=II", flags, 0), thread, uid):
            error, body = self._reply()
            assert not error
            fh, open_flags, _ = FUSE_OPEN_OUT.unpack(body)
            self.fhs.append((node, FileHandleT(fh)))
            return Opened(bool(open_flags & FOPEN_KEEP_CACHE))
        with errors() as error_of:
            info = await self.fs.open(InodeT(node), FlagT(flags), context(thread, uid))
            self.fhs.append((node, FileHandleT(info.fh)))
            return Opened(bool(info.keep_cache))
        return error_of[0]

    async def read(self, offset: int = 0, size: int = 100) -> bytes:
        """Read from the file that was opened first, by Python."""
        return bytes(await self.fs.read(self.fhs[0][1], offset, size))

    async def release(self) -> None:
        """Close the file that was opened first, if one is open."""
        if not self.fhs:
            return
        node, fh = self.fhs.pop(0)
        if self.served(RELEASE, node, FUSE_RELEASE_IN.pack(fh, 0, 0, 0), 0):
            assert self._reply() == (0, b"")
        else:
            await self.fs.release(fh)

    # -- state ------------------------------------------------------------------------------------

    def park(self) -> None:
        """Park every inode that can be parked."""
        budget, self.table.fd_budget = self.table.fd_budget, 0
        for inode in self.table.all():
            inode.used = False
        self.table.shrink()
        self.table.fd_budget = budget

    def invalidate(self, node: int) -> None:
        """Have the kernel invalidate an inode."""
        self.notifier.inode(node)

    def expire(self, name: bytes) -> None:
        """Have the kernel look up a name of the root again."""
        self.notifier.expire(self.table.root.node, name)

    def list(self, name: bytes) -> None:
        """List a name of the root, as READDIRPLUS does."""
        with contextlib.suppress(FileNotFoundError):
            st = os.lstat(name, dir_fd=self.table.root.fd)
            inode = self.table.listed(st, self.table.root, name)
            self.table.referenced(inode, st, self.table.root, name)
            self.fs._entries.attributes(inode, st)  # noqa: SLF001  # as the lister does

    def state(self) -> dict[str, object]:
        """Return all that replies may have changed."""
        for inode in self.table.all():
            self._check_record(inode)
        coherency = self.services.coherency
        return {
            "inodes": {
                inode.node: inode_state(inode, exports=self.exports) for inode in self.table.all()
            },
            "open": (self.table.states.open_fds, self.fs.open_files),
            "found": (coherency.changes_found, coherency.doubtful_flushes),
            "refreshes": self.notifier.refreshes,
            "queued": set(self.notifier._queued),  # noqa: SLF001  # no public access
        }

    def _check_record(self, inode: Inode) -> None:
        """Check that the channel knows the record that Python would find."""
        known = None if inode.file_key is None else self.services.pagecache.known(inode.file_key)
        record = inode.record if inode.record is None or not inode.record.forgotten else None
        assert record is known

    async def close(self) -> None:
        while self.fhs:
            await self.release()
        self.table.close()
        if self.native is not None:
            self.native.close()
            self.native = None
            self.channel._scheduler.close()  # noqa: SLF001  # as in Channel.close


def inode_state(inode: Inode, *, exports: bool) -> tuple[object, ...]:
    kernel = inode.kernel
    return (
        *(inode.nlookup, inode.fd >= 0, inode.name, inode.parent and inode.parent.node, inode.suspect),
        *(exports and inode.generation, inode.handle, inode.local),
        *(kernel.sent, kernel.size, kernel.access, kernel.access_ctime, kernel.acl),
        *(kernel.doubts, kernel.size_doubt, kernel.doubts_settled, kernel.dropped_for != 0),
        *(inode.opens, inode.opens > 0 and inode.polled, record_state(inode.record)),
    )


def record_state(record: CachedFile | None) -> object:
    if record is None:
        return None
    writers = record.read_ranges.writers if record.read_ranges is not None else 0
    return record.handles, record.pins, writers, record.drops_due, record.racy, record.forgotten


def context(thread: int, uid: int = 0) -> RequestContext:
    return cast(RequestContext, SimpleNamespace(uid=uid, gid=0, pid=thread, umask=0o22))


@contextlib.contextmanager
def errors() -> Iterator[list[int]]:
    found: list[int] = []
    try:
        yield found
    except FUSEError as exc:
        found.append(-exc.errno)


def entry_of(entry: EntryAttributes) -> Entry:
    """Return an entry as libfuse would send it."""
    times = (entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns)
    if not entry.st_ino:
        return Entry(0, 0, entry.entry_timeout, 0, (0,) * 16)
    attributes = (
        *(entry.st_ino, entry.st_size, entry.st_blocks),
        *(time // 10**9 for time in times),
        *(time % 10**9 for time in times),
        *(entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_gid),
        *(entry.st_rdev & 0xFFFFFFFF, entry.st_blksize, 0),
    )
    return Entry(entry.st_ino, entry.generation, entry.entry_timeout, entry.attr_timeout, attributes)


def is_dir(path: Path) -> bool:
    return stat_module.S_ISDIR(path.lstat().st_mode)


NO_ATTRIBUTE = -errno.ENODATA
