"""Handle requests without pyfuse3, of which each would cost a run of trio's scheduler (``eager``).

Each method takes a message apart, calls the handler that pyfuse3 would call, and packs the reply.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    InodeT,
    ModeT,
    RequestContext,
)

from cleanfs.fs.entries import entry_out, getattr_out, open_out
from cleanfs.fs.handler import handler
from cleanfs.fuse.channel import AsyncHandler
from cleanfs.fuse.protocol import (
    FATTR_ATIME,
    FATTR_ATIME_NOW,
    FATTR_FH,
    FATTR_GID,
    FATTR_MODE,
    FATTR_MTIME,
    FATTR_MTIME_NOW,
    FATTR_SIZE,
    FATTR_UID,
    FUSE_CREATE,
    FUSE_CREATE_IN,
    FUSE_LOOKUP,
    FUSE_OPEN,
    FUSE_OPEN_IN,
    FUSE_RELEASE,
    FUSE_RELEASE_IN,
    FUSE_SETATTR,
    FUSE_SETATTR_IN,
    FUSE_UNLINK,
)
from cleanfs.fuse.request import Request, context_of
from cleanfs.source.attributes import NewAttributes


class Operations(Protocol):
    """The handlers that are called."""

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """Handle LOOKUP."""

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        """Handle OPEN."""

    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Handle CREATE."""

    async def release(self, fh: FileHandleT) -> None:
        """Handle RELEASE."""

    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        """Handle UNLINK."""

    async def set_attributes(
        self, node: int, new: NewAttributes, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """Handle SETATTR."""


def handlers(fs: Operations, now_ns: Callable[[], int]) -> Mapping[int, AsyncHandler]:
    """Return the handlers of one mount, by opcode. ``now_ns`` is the time for SETATTR."""

    @handler
    async def lookup(request: Request, body: bytes) -> bytes:
        name = FileNameT(body[:-1])
        return entry_out(await fs.lookup(InodeT(request.nodeid), name, context_of(request)))

    @handler
    async def open_file(request: Request, body: bytes) -> bytes:
        flags, _ = FUSE_OPEN_IN.unpack_from(body)
        return open_out(await fs.open(InodeT(request.nodeid), flags, context_of(request)))

    @handler
    async def create(request: Request, body: bytes) -> bytes:
        flags, mode, umask, _ = FUSE_CREATE_IN.unpack_from(body)
        name = FileNameT(_string(body, FUSE_CREATE_IN.size))
        ctx = context_of(request, umask)
        info, entry = await fs.create(InodeT(request.nodeid), name, mode, flags, ctx)
        return entry_out(entry) + open_out(info)

    @handler
    async def release(request: Request, body: bytes) -> bytes:
        [fh, *_] = FUSE_RELEASE_IN.unpack_from(body)
        await fs.release(FileHandleT(fh))
        return b""

    @handler
    async def unlink(request: Request, body: bytes) -> bytes:
        name = FileNameT(_string(body))
        await fs.unlink(InodeT(request.nodeid), name, context_of(request))
        return b""

    @handler
    async def set_attributes(request: Request, body: bytes) -> bytes:
        new, fh = new_attributes(body, now_ns())
        ctx = context_of(request)
        return getattr_out(await fs.set_attributes(request.nodeid, new, fh, ctx))

    return {
        FUSE_LOOKUP: lookup,
        FUSE_OPEN: open_file,
        FUSE_CREATE: create,
        FUSE_RELEASE: release,
        FUSE_UNLINK: unlink,
        FUSE_SETATTR: set_attributes,
    }


def new_attributes(body: bytes, now_ns: int) -> tuple[NewAttributes, int | None]:
    """Unpack struct fuse_setattr_in: what to set, and the fh of the requester's open file, if any."""
    valid, _, fh, size, _, *times, mode, _, uid, gid, _ = FUSE_SETATTR_IN.unpack_from(body)
    atime, mtime, _, atime_ns, mtime_ns, _ = times

    def time_of(seconds: int, ns: int, *, now: int) -> int:
        return now_ns if valid & now else seconds * 1_000_000_000 + ns

    new = NewAttributes(
        mode=mode if valid & FATTR_MODE else None,
        uid=uid if valid & FATTR_UID else None,
        gid=gid if valid & FATTR_GID else None,
        size=size if valid & FATTR_SIZE else None,
        atime_ns=time_of(atime, atime_ns, now=FATTR_ATIME_NOW) if valid & FATTR_ATIME else None,
        mtime_ns=time_of(mtime, mtime_ns, now=FATTR_MTIME_NOW) if valid & FATTR_MTIME else None,
    )
    return new, fh if valid & FATTR_FH else None


def _string(body: bytes, start: int = 0) -> bytes:
    """Return the string that begins at ``start``. The channel has checked that it ends."""
    return body[start : body.index(0, start)]
