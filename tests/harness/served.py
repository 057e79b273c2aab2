"""A file system without a mount: raw READs and WRITEs on a pair of sockets in place of the device."""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyfuse3
from pyfuse3 import FileHandleT, FUSEError, RequestContext

from cleanfs.backends import load
from cleanfs.backends.options import BackendOptions
from cleanfs.cache.cleancache import Cleancache
from cleanfs.cache.pagecache import PageCache
from cleanfs.cache.resident import make_resident
from cleanfs.fs.control import Control, Operator
from cleanfs.fs.operations import CleanFS
from cleanfs.fuse.channel import Channel
from cleanfs.fuse.notify import Notifier
from cleanfs.fuse.request import set_current
from cleanfs.latency import Latencies
from cleanfs.linux.mounts import FileSystemTypes
from cleanfs.source.identity import Rules
from cleanfs.source.io import Backing
from cleanfs.source.space_retry import SpaceRetry
from cleanfs.vfs.coherency import Coherency, CoherencyChecker
from cleanfs.vfs.handles import FileHandle, Services
from cleanfs.vfs.inodes import InodeTable
from tests.harness.kernel import Device

READ, WRITE = 15, 16
READ_IN = WRITE_IN = struct.Struct("=QQIIQII")
WRITE_OUT = struct.Struct("=II")
PAGE = 4096
POOL = 16 << 20
CTX = cast(RequestContext, SimpleNamespace(uid=0, gid=0, pid=1, umask=0))


@dataclass(frozen=True, slots=True)
class Reply:
    """Holds a reply: an errno or 0, and the body."""

    errno: int
    body: bytes


class NoOperator:
    """Satisfies a control directory that nobody uses."""

    stats = set_backend = set_log_level = options = drop = None


class RecordingNotifier(Notifier):
    """Records what the kernel would be told."""

    def __init__(self) -> None:
        """Record from now on."""
        super().__init__()
        self.told: list[tuple[str, int]] = []

    def inode(self, node: int) -> None:
        """Record that a node's pages are to be dropped."""
        self.told.append(("inode", node))

    async def written(self, node: int, start: int, stop: int, read: object) -> None:
        """Record that pages are to be dropped after a write."""
        self.told.append((f"written {start} to {stop}", node))

    async def refreshed(self, node: int, generation: int, path: bytes, *, pages: bool = False) -> None:
        """Record that attributes are to be requested."""
        self.told.append(("refreshed", node))


class Served:
    """Serves one directory. Make it in a trio task."""

    def __init__(
        self,
        source: Path,
        *,
        fast: bool = True,
        coherency: Coherency = Coherency.OPEN,
        page_cache: int = 1 << 20,
        backend: str | None = "zcache",
        writeback: bool = False,
        explicit: bool = True,
        **options: Any,  # noqa: ANN401  # of BackendOptions
    ) -> None:
        """Serve ``source``; ``fast`` lets the channel serve by itself.

        ``explicit``: the kernel drops pages only when told to.
        """
        self.source = source
        self.options = BackendOptions(POOL, **options)
        self.cleancache = Cleancache()
        if backend is not None:
            self.cleancache.register(load(backend)(self.options))
        self.fs_caches = self.cleancache.init_fs(PAGE)
        self.fs_caches.state.shared = coherency is not Coherency.NONE
        self.pagecache = PageCache(page_cache, self.fs_caches, make_resident(PAGE))
        self.notifier = RecordingNotifier()
        self.notifier.explicit = explicit
        self.latencies = Latencies()
        self.backing = Backing()
        self.coherency = CoherencyChecker(self.pagecache, coherency)
        services = Services(
            self.backing,
            self.pagecache,
            self.coherency,
            FileSystemTypes(),
            self.notifier,
            self.latencies,
            writeback=writeback,
        )
        fd = os.open(source, os.O_PATH)
        self.inodes = InodeTable(fd, 64, 64, SpaceRetry(), Rules(FileSystemTypes()))
        os.close(fd)
        self.device = Device()
        self.channel = Channel(0)
        self.channel.receive_from(self.device.fd)
        if fast:
            self.channel.serve_from(self.fs_caches.state)
        control = Control(cast(Operator, NoOperator()))
        self.fs = CleanFS(services, self.inodes, control, self.channel, attr_timeout=1)
        self.names: dict[int, str] = {}
        """The names of nodes that were opened."""
        self._unique = 0

    def close(self) -> None:
        """Close all that is open."""
        self.fs_caches.flush_fs()
        self.channel.close()
        self.device.close()
        self.inodes.close()

    # -- requests -----------------------------------------------------------------------------

    async def open(self, name: str, flags: int = os.O_RDWR) -> int:
        """Open a file by name. Returns its handle's number."""
        entry = await self.fs.lookup(self.inodes.root.node, pyfuse3.FileNameT(name.encode()), CTX)
        self.names[entry.st_ino] = name
        info = await self.fs.open(entry.st_ino, pyfuse3.FlagT(flags), CTX)
        handle = self.handle(info.fh)
        if handle.inode.kernel.dropped_for == handle.state.serial:  # the opener runs on at once
            handle.inode.kernel.dropped_for, handle.inode.kernel.pages_dropped_by = 0, 0.0
        return int(info.fh)

    async def release(self, fh: int) -> None:
        """Close a handle."""
        await self.fs.release(FileHandleT(fh))

    async def read(self, fh: int, offset: int, size: int) -> Reply:
        """Have a READ served."""
        return await self.request(READ, READ_IN.pack(fh, offset, size, 0, 0, 0, 0))

    async def write(
        self, fh: int, offset: int, data: bytes, *, flags: int = 0, file_flags: int = os.O_RDWR
    ) -> Reply:
        """Have a WRITE served; ``flags`` are its own, ``file_flags`` those of the open file."""
        fields = WRITE_IN.pack(fh, offset, len(data), flags, 0, file_flags, 0)
        return await self.request(WRITE, fields + data)

    async def request(self, opcode: int, body: bytes) -> Reply:
        """Have a request served: by the channel if it does, else by the handlers."""
        reply = self.request_natively(opcode, body)
        if reply is not None:
            return reply
        fh, offset, size = struct.unpack_from("=QQI", body)
        try:
            if opcode == READ:
                found = bytes(await self.fs.read(FileHandleT(fh), offset, size))
            else:
                data = body[WRITE_IN.size :]
                found = WRITE_OUT.pack(await self.fs.write(FileHandleT(fh), offset, data), 0)
        except FUSEError as exc:
            return Reply(exc.errno, b"")
        finally:
            set_current(None)
        return Reply(0, found)

    def request_natively(self, opcode: int, body: bytes) -> Reply | None:
        """Send a request to the channel. Returns None, with it as the current one, if handlers must."""
        self._unique += 2
        self.device.send(opcode, self._unique, body)
        native = self.channel._native  # noqa: SLF001  # what ``wait_readable`` does, without its wait
        request = native.receive_now()
        if request is not None:
            native.ended(request.unique)
            assert not self.device.replies()
            set_current(request)
            return None
        [(unique, error, found)] = self.device.replies()
        assert unique == self._unique
        return Reply(-error, found)

    # -- state --------------------------------------------------------------------------------

    def handle(self, fh: int) -> FileHandle:
        """Return an open file."""
        handle = self.fs._handles[fh]  # noqa: SLF001  # no public access
        assert isinstance(handle, FileHandle)
        return handle

    def trust(self, fh: int) -> None:
        """Have calls by a handle made inline, as after some fast ones."""
        fs = self.handle(fh)._source._fs  # noqa: SLF001  # no public access
        for policy in fs.reads, fs.writes:
            policy.inline = True
            policy.returned()

    async def fs_cleared(self) -> None:
        """Drop all pages that are kept."""
        self.pagecache.drop()
        self.fs_caches.drop_pool()

    @property
    def served(self) -> int:
        """Return how many requests the channel served."""
        return self.channel.stats().served_natively
