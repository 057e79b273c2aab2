"""Open, list and close directories as twins: by the channel where it can, or by Python alone."""

import contextlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyfuse3
import pytest
from pyfuse3 import EntryAttributes, FileHandleT, InodeT, ReaddirToken

from cleanfs.source.inline_policy import InlinePolicy
from cleanfs.vfs.coherency import Coherency
from tests.fs.metadata_rig import (
    ATTR,
    ENTRY_OUT,
    THREAD,
    Entry,
    Reply,
    Side,
    Watch,
    context,
    entry_of,
    errors,
)
from tests.fs.twins import Twins
from tests.harness.kernel import handling

STATFS, OPENDIR, RELEASEDIR, READDIRPLUS = 17, 27, 29, 44

OPEN_IN = struct.Struct("=II")
OPEN_OUT = struct.Struct("=QII")
READ_IN = struct.Struct("=QQIIQII")
RELEASE_IN = struct.Struct("=QIIQ")
KSTATFS = struct.Struct("=QQQQQIIII24x")
DIRENT = struct.Struct("=QQII")


class Listed(NamedTuple):
    """Holds one entry of a listing."""

    name: bytes
    next: int
    ino: int
    kind: int
    entry: Entry


@dataclass
class Token:
    """Collects entries up to a size, as pyfuse3 does."""

    size: int
    entries: list[Listed] = field(default_factory=list)


def readdir_reply(token: Token, name: bytes, attr: EntryAttributes, next_id: int) -> bool:
    """Replace pyfuse3's function, which fills only replies of libfuse."""
    size = ENTRY_OUT.size + ATTR.size + DIRENT.size + len(name)
    padded = (size + 7) & ~7
    if padded > token.size:
        return False
    token.size -= padded
    kind = (attr.st_mode & 0o170000) >> 12
    token.entries.append(Listed(name, next_id, attr.st_ino, kind, entry_of(attr)))
    return True


def parse(reply: bytes) -> list[Listed]:
    """Parse the reply to a READDIRPLUS."""
    found = []
    at = 0
    while at < len(reply):
        node, generation, entry_s, attr_s, entry_ns, attr_ns = ENTRY_OUT.unpack_from(reply, at)
        attributes = ATTR.unpack_from(reply, at + ENTRY_OUT.size)
        at += ENTRY_OUT.size + ATTR.size
        ino, next_id, length, kind = DIRENT.unpack_from(reply, at)
        at += DIRENT.size
        name = reply[at : at + length]
        timeouts = entry_s + entry_ns / 1e9, attr_s + attr_ns / 1e9
        found.append(Listed(name, next_id, ino, kind, Entry(node, generation, *timeouts, attributes)))
        at = (at + length + 7) & ~7
    return found


@dataclass
class DirectorySide(Side):
    """Makes requests about directories, too."""

    directories: list[tuple[int, FileHandleT]] = field(default_factory=list)
    """The nodes and handles of open directories, in the order in which they were opened."""
    may_list: bool | None = True
    """Whether listings are to be made inline, however busy the machine is; None leaves that to them."""

    @property
    def listings(self) -> InlinePolicy:
        """Return the policy of listings."""
        return self.services.source_fs(self.table.root).listings

    async def opendir(self, node: int, uid: int = 0, flags: int = 0, thread: int = THREAD) -> int:
        if self.served(OPENDIR, node, OPEN_IN.pack(flags, 0), thread, uid):
            error, body = self._reply()
            assert not error
            fh, open_flags, _ = OPEN_OUT.unpack(body)
            assert not open_flags
        else:
            with errors() as error_of, handling(file_flags=flags):
                fh = await self.fs.opendir(InodeT(node), context(thread, uid))
            if error_of:
                return error_of[0]
        self.directories.append((node, FileHandleT(fh)))
        return 0

    async def readdir(self, nth: int, offset: int = 0, size: int = 32768) -> list[Listed] | int:
        node, fh = self.directories[nth]
        if self.may_list is not None:
            self.listings.inline = self.may_list
        self.listings.returned_at = math.inf
        if self.served(READDIRPLUS, node, READ_IN.pack(fh, offset, size, 0, 0, 0, 0)):
            error, body = self._reply()
            assert not error
            assert len(body) <= size
            return [entry._replace(entry=self._comparable(entry.entry)) for entry in parse(body)]
        token = Token(size)
        with errors() as error_of:
            await self.fs.readdir(fh, offset, cast(ReaddirToken, token))
        if error_of:
            return error_of[0]
        return [entry._replace(entry=self._comparable(entry.entry)) for entry in token.entries]

    async def lookup(self, parent: int, name: bytes, thread: int = THREAD) -> Reply:
        found = await super().lookup(parent, name, thread)
        return self._comparable(found) if isinstance(found, Entry) else found

    def _comparable(self, entry: Entry) -> Entry:
        """Drop what need not be the same.

        A generation may be only a number: Python also makes the inode that does not fit. The listing by
        the other side has moved the directory's atime.
        """
        attributes = list(entry.attributes)
        attributes[3] = attributes[6] = 0
        generation = entry.generation if self.exports else 0
        return entry._replace(generation=generation, attributes=tuple(attributes))

    async def releasedir(self, nth: int = 0) -> int:
        node, fh = self.directories.pop(nth)
        if self.served(RELEASEDIR, node, RELEASE_IN.pack(fh, 0, 0, 0)):
            error, body = self._reply()
            assert not body
            return error
        await self.fs.releasedir(fh)
        return 0

    async def statfs(self) -> tuple[int, ...]:
        """Return what does not change while other programs write."""
        if self.served(STATFS, 1, b""):
            error, body = self._reply()
            assert not error
            blocks, free, available, files, free_files, size, length, fragment, _ = KSTATFS.unpack(body)
        else:
            st = await self.fs.statfs(context(THREAD))
            blocks, free, available = st.f_blocks, st.f_bfree, st.f_bavail
            files, free_files = st.f_files, st.f_ffree
            size, length, fragment = st.f_bsize, st.f_namemax, st.f_frsize
        return blocks, free - available, files, free_files <= files, size, length, fragment

    def names(self, nth: int) -> list[bytes]:
        """Return the snapshot of an open directory."""
        directory = self.fs._handles.directory(self.directories[nth][1])  # noqa: SLF001
        names = cast(Any, directory).state.names
        return [names[i] for i in range(len(names))]

    def state(self) -> dict[str, object]:
        opens = {inode.node: (inode.opens, len(inode.open_fds)) for inode in self.table.all()}
        snapshots = [self.names(nth) for nth in range(len(self.directories))]
        crowded = self.fs._tree._crowded.is_set()  # noqa: SLF001
        return super().state() | {"opens": opens, "snapshots": snapshots, "crowded": crowded}

    async def close(self) -> None:
        while self.directories:
            await self.releasedir()
        await super().close()


class DirectoryTwins(Twins):
    """Makes each request about directories to both file systems, too."""

    side = DirectorySide

    def __init__(
        self, source: Path, mode: Coherency, watch: Watch | None = None, *, exports: bool = False
    ) -> None:
        super().__init__(source, mode, watch, exports=exports)
        self.directory_sides = cast(list[DirectorySide], self.sides)

    async def opened(self, node: int) -> None:
        """Open a directory, which must be possible."""
        assert await self.both("opendir", node) == 0

    async def listed(self, nth: int = 0, offset: int = 0, size: int = 32768) -> list[Listed]:
        """List an open directory, which must be possible."""
        found = await self.both("readdir", nth, offset, size)
        assert isinstance(found, list)
        return cast(list[Listed], found)


@contextlib.contextmanager
def pyfuse3_replies() -> Iterator[None]:
    """Have listings of pyfuse3 collected."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pyfuse3, "readdir_reply", readdir_reply)
        yield
