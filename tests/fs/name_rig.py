"""Make changes by two file systems over equal sources: one that the channel serves, and Python's."""

import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from pyfuse3 import FileHandleT, FileNameT, FlagT, InodeT, ModeT

from cleanfs.fs.direct import new_attributes
from cleanfs.fuse.protocol import FOPEN_KEEP_CACHE
from cleanfs.fuse.protocol import FUSE_CREATE_IN as CREATE_IN
from cleanfs.fuse.protocol import FUSE_OPEN_OUT as OPEN_OUT
from cleanfs.fuse.protocol import FUSE_SETATTR_IN as SETATTR_IN
from cleanfs.vfs import handles
from cleanfs.vfs.coherency import Coherency
from cleanfs.vfs.node_ids import ROOT
from tests.fs.metadata_rig import (
    ATTR,
    ATTR_OUT,
    ENTRY_OUT,
    O_LARGEFILE,
    THREAD,
    Side,
    context,
    errors,
    record_state,
)
from tests.harness.kernel import Device

SETATTR, UNLINK, CREATE = 4, 10, 35

CLOCK_REALTIME_COARSE = 5
"""Of <linux/time.h>: a file system takes timestamps from it."""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="the tests' kernel sends root's requests")


class Created(NamedTuple):
    """Holds what a CREATE reply says, without numbers and times."""

    entry_timeout: float
    mode: int
    owners: tuple[int, int]
    size: int
    keeps_pages: bool


class Attributes(NamedTuple):
    """Holds what a SETATTR reply says, without numbers and ctime."""

    timeout: float
    mode: int
    owners: tuple[int, int]
    size: int
    times: tuple[int, int]
    """atime and mtime in ns; 0 for the present."""


class NameTwins:
    """Makes each request to two file systems over equal sources, and compares what they do."""

    def __init__(self, path: Path, mode: Coherency) -> None:
        self.device = Device()
        self._numbers = contextlib.ExitStack()
        self.sides: list[Side] = []
        for name, device in (("natively", self.device), ("by python", None)):
            source = path / name
            (source / "dir").mkdir(parents=True)
            for file in ("a", "b", "dir/x"):
                (source / file).write_text(file)
            self.sides.append(Side(source, mode, device))

    @property
    def natively(self) -> int:
        """Count the requests that the channel served."""
        return self.sides[0].natively

    def trust(self) -> None:
        """Have calls on names made inline, as after some fast ones."""
        for side in self.sides:
            fs = side.services.source_fs(side.table.root)
            for policy in (fs.lookups, fs.names):
                policy.inline = True
                policy.returned()

    def keep_numbers(self) -> None:
        """Keep the inode numbers of the present files: another file may get them, on one side only."""
        for side in self.sides:
            for file in side.source.iterdir():
                self._numbers.callback(os.close, os.open(file, os.O_PATH | os.O_NOFOLLOW))

    def pass_tick(self) -> None:
        """Have the next changes get other timestamps than those before, on both sides."""
        time.sleep(1.2 * time.clock_getres(CLOCK_REALTIME_COARSE))

    async def found(self, name: bytes, parent: bytes = b"") -> None:
        for side in self.sides:
            await side.fs.lookup(InodeT(node_of(side, parent)), FileNameT(name), context(THREAD))

    async def opened(self, name: bytes, flags: int = os.O_RDONLY) -> None:
        for side in self.sides:
            await side.open(node_of(side, name), flags)

    async def released(self) -> None:
        for side in self.sides:
            await side.release()

    async def unlink(self, name: bytes, parent: bytes = b"", uid: int = 0) -> int:
        """Remove a name. Return 0 or the negative errno, which both must have."""
        self.trust()
        first, second = [await unlink(side, node_of(side, parent), name, uid) for side in self.sides]
        assert first == second
        self.compare()
        return first

    async def create(self, name: bytes, parent: bytes = b"", **arguments: int) -> Created | int:
        """Create a file. Return what the reply says, which must be the same for both."""
        self.trust()
        first, second = [
            await create(side, node_of(side, parent), name, **arguments) for side in self.sides
        ]
        assert first == second
        self.compare()
        return first

    async def is_created(self, name: bytes, parent: bytes = b"", **arguments: int) -> bool:
        """Create a file. Return whether the channel did it."""
        before = self.natively
        assert isinstance(await self.create(name, parent, **arguments), Created)
        return self.natively > before

    async def set(self, name: bytes, **arguments: int) -> Attributes | int:
        """Set attributes. Return what the reply says, which must be the same for both."""
        self.trust()
        first, second = [
            await set_attributes(side, node_of(side, name), **arguments) for side in self.sides
        ]
        assert first == second
        self.compare()
        return first

    async def is_set(self, name: bytes, **arguments: int) -> bool:
        """Set attributes. Return whether the channel did it."""
        before = self.natively
        assert isinstance(await self.set(name, **arguments), Attributes)
        return self.natively > before

    async def is_unlinked(self, name: bytes, parent: bytes = b"", uid: int = 0) -> bool:
        """Remove a name. Return whether the channel did it."""
        before = self.natively
        assert await self.unlink(name, parent, uid) == 0
        return self.natively > before

    def compare(self) -> None:
        first, second = map(state_of, self.sides)
        assert first == second

    async def close(self) -> None:
        for side in self.sides:
            await side.close()
        self.device.close()
        self._numbers.close()


def node_of(side: Side, name: bytes) -> int:
    """Return the node of a file by its name in the source's root, which is that of b""; 0 for none."""
    if not name:
        return ROOT
    inode = side.table.find(os.lstat(name, dir_fd=side.table.root.fd))
    return 0 if inode is None else inode.node


async def unlink(side: Side, parent: int, name: bytes, uid: int) -> int:
    if side.served(UNLINK, parent, name + b"\0", THREAD, uid):
        assert side.device is not None
        [(_, error, _)] = side.device.replies()
        return error
    with errors() as error_of:
        requester = context(THREAD, uid)
        requester.gid = os.getegid()  # type: ignore[misc]  # it is no pyfuse3's
        await side.fs.unlink(InodeT(parent), FileNameT(name), requester)
        return 0
    return error_of[0]


async def create(
    side: Side,
    parent: int,
    name: bytes,
    *,
    flags: int = os.O_WRONLY,
    mode: int = 0o100644,
    umask: int = 0,
    uid: int = 0,
) -> Created | int:
    flags |= O_LARGEFILE | os.O_CREAT
    if side.served(CREATE, parent, CREATE_IN.pack(flags, mode, umask, 0) + name + b"\0", THREAD, uid):
        assert side.device is not None
        [(_, error, body)] = side.device.replies()
        if error:
            return error
        node, _, seconds, _, ns, _ = ENTRY_OUT.unpack_from(body)
        attributes = ATTR.unpack_from(body, ENTRY_OUT.size)
        fh, open_flags, _ = OPEN_OUT.unpack_from(body, ENTRY_OUT.size + ATTR.size)
        side.fhs.append((node, FileHandleT(fh)))
        keeps = bool(open_flags & FOPEN_KEEP_CACHE)
        return Created(seconds + ns / 1e9, attributes[9], attributes[11:13], attributes[1], keeps)
    with errors() as error_of:
        requester = context(THREAD, uid)
        requester.umask = umask  # type: ignore[misc]  # it is no pyfuse3's
        requester.gid = os.getegid() if uid == 0 else uid  # type: ignore[misc]  # the same
        info, entry = await side.fs.create(
            InodeT(parent), FileNameT(name), ModeT(mode), FlagT(flags), requester
        )
        side.fhs.append((entry.st_ino, info.fh))
        owners = entry.st_uid, entry.st_gid
        return Created(entry.entry_timeout, entry.st_mode, owners, entry.st_size, bool(info.keep_cache))
    return error_of[0]


def state_of(side: Side) -> object:
    """Return what is known of all files, without their numbers."""
    inodes = []
    for inode in side.table.all():
        record, file_key = inode.record, inode.file_key
        now = os.fstat(inode.fd) if inode.fd >= 0 else None
        stamps = None if now is None else (now.st_size, now.st_mtime_ns, now.st_ctime_ns)
        known = None if file_key is None else side.services.pagecache.known(file_key)
        inodes.append(
            (
                *(inode.nlookup, inode.name, inode.parent is None, inode.opens, inode.kernel.doubts),
                *(inode.kernel.sent == stamps, inode.kernel.size),
                *(side.services.space_retry.is_removed(inode.node), known is None),
                record is None or (record.forgotten, record.stamps == stamps, record_state(record)),
                (inode.kernel.dropped_for != 0, inode.opens > 0 and inode.polled),
            )
        )
    coherency = side.services.coherency
    queued = side.notifier._queued  # noqa: SLF001  # no public access
    return (
        sorted(map(repr, inodes)),
        len(queued),
        sorted(item[1] for item in queued if isinstance(item, tuple)),
        (coherency.changes_found, coherency.doubtful_flushes),
        sorted(os.listdir(side.source)),
        len(side.services.pagecache.files()),
        side.table.states.open_fds,
    )


@contextlib.asynccontextmanager
async def twins_in(path: Path, mode: Coherency) -> AsyncIterator[NameTwins]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(handles, "time", SimpleNamespace(time_ns=lambda: 10**20))  # nothing is racy
        twins = NameTwins(path, mode)
        try:
            yield twins
        finally:
            await twins.close()


VALID = {"mode": 1, "owner": 2, "group": 4, "size": 8, "atime": 16, "mtime": 32}


async def set_attributes(
    side: Side, node: int, *, valid: int = 0, uid: int = 0, **new: int
) -> Attributes | int:
    """Set ``mode``, ``owner``, ``group``, ``size``, ``atime`` or ``mtime``; times in ns."""
    for name in new:
        valid |= VALID[name]
    atime, mtime = (divmod(new.get(name, 0), 10**9) for name in ("atime", "mtime"))
    body = SETATTR_IN.pack(
        *(valid, 0, 0, new.get("size", 0), 0, atime[0], mtime[0], 0, atime[1], mtime[1], 0),
        *(new.get("mode", 0), 0, new.get("owner", 0), new.get("group", 0), 0),
    )
    long_ago = 2 * 10**17  # in ns; what is later is the present
    if side.served(SETATTR, node, body, THREAD, uid):
        assert side.device is not None
        [(_, error, reply)] = side.device.replies()
        if error:
            return error
        seconds, ns, _ = ATTR_OUT.unpack_from(reply)
        found = ATTR.unpack_from(reply, ATTR_OUT.size)
        times = found[3] * 10**9 + found[6], found[4] * 10**9 + found[7]
        attributes = seconds + ns / 1e9, found[9], found[11:13], found[1]
    else:
        with errors() as error_of:
            wanted, fh = new_attributes(body, time.time_ns())
            entry = await side.fs.set_attributes(node, wanted, fh, context(THREAD, uid))
            times = entry.st_atime_ns, entry.st_mtime_ns
            owners = entry.st_uid, entry.st_gid
            attributes = entry.attr_timeout, entry.st_mode, owners, entry.st_size
        if error_of:
            return error_of[0]
    atime_ns, mtime_ns = (at if at < long_ago else 0 for at in times)
    return Attributes(*attributes, (atime_ns, mtime_ns))
