"""Handle the requests for locks (``--locks source``), for which pyfuse3 has no handlers.

They are GETLK, SETLK, SETLKW, and FLUSH, which says whose locks go when an fd is closed.
"""

import errno
import fcntl
import functools
from collections.abc import Awaitable, Callable, Mapping

import trio
from pyfuse3 import FileHandleT, FUSEError

from cleanfs.eager import before_wait
from cleanfs.fs.handle_table import HandleTable
from cleanfs.fs.handler import handler
from cleanfs.fuse.channel import AsyncHandler
from cleanfs.fuse.protocol import (
    FUSE_FLUSH,
    FUSE_FLUSH_IN,
    FUSE_GETLK,
    FUSE_LK_FLOCK,
    FUSE_LK_IN,
    FUSE_LK_OUT,
    FUSE_SETLK,
    FUSE_SETLKW,
)
from cleanfs.fuse.request import Request, on_refusal
from cleanfs.vfs.handles import FileHandle, Services
from cleanfs.vfs.source_locks import Lock, SourceLocks

Flush = Callable[[FileHandleT], Awaitable[None]]


class LockOperations:
    """Handles the requests of one mount."""

    def __init__(self, services: Services, handles: HandleTable, flush_handler: Flush) -> None:
        """Lock the open files in ``handles``. ``flush_handler`` is the handler of FLUSH."""
        self._handles = handles
        self._flushless = services.flushless
        self._flush = flush_handler
        self._locks = SourceLocks(services)
        self.run = self._locks.run

    def handlers(self) -> Mapping[int, AsyncHandler]:
        """Return the handlers, by opcode."""
        return {
            FUSE_GETLK: self.getlk,
            FUSE_SETLK: functools.partial(self.setlk, waits=False),
            FUSE_SETLKW: functools.partial(self.setlk, waits=True),
            FUSE_FLUSH: self.flush,
        }

    @handler
    async def getlk(self, _: Request, body: bytes) -> bytes:
        """Find a lock that is in the way."""
        fh, owner, start, end, kind, _, _, _ = FUSE_LK_IN.unpack_from(body)
        found = await self._locks.find_conflict(self._file(fh), owner, Lock(kind, start, end))
        return FUSE_LK_OUT.pack(found.start, found.end, found.kind, found.pid)

    @handler
    async def setlk(self, request: Request, body: bytes, *, waits: bool) -> bytes:
        """Take or give up a lock. A signal ends a wait."""
        fh, owner, start, end, kind, pid, flags, _ = FUSE_LK_IN.unpack_from(body)
        handle, lock, flock = self._file(fh), Lock(kind, start, end, pid), bool(flags & FUSE_LK_FLOCK)
        await before_wait()  # a cancel scope belongs to a task
        with trio.CancelScope() as wait:
            request.on_interrupt = wait.cancel
            if request.interrupted:
                wait.cancel()
            await self._locks.set(handle, fh, owner, lock, flock=flock, waits=waits)
        request.on_interrupt = None
        if wait.cancelled_caught:
            raise FUSEError(errno.EINTR)
        if kind != fcntl.F_UNLCK:
            # The owner was killed while it waited, and its FLUSH may have come before the lock.
            on_refusal(functools.partial(self._locks.drop, handle.inode, owner, flock=flock))
        return b""

    @handler
    async def flush(self, _: Request, body: bytes) -> bytes:
        """Give up a process's locks, and report what a close would."""
        fh, _, _, owner = FUSE_FLUSH_IN.unpack_from(body)
        handle = self._handles[fh]
        if isinstance(handle, FileHandle):
            self._locks.drop(handle.inode, owner)
        if not self._flushless:
            await self._flush(FileHandleT(fh))
        return b""

    def released(self, fh: int) -> None:
        """Give up the locks of an open file that is about to be closed."""
        handle = self._handles.get(fh)
        if isinstance(handle, FileHandle):
            self._locks.drop_file(handle.inode, fh)

    def _file(self, fh: int) -> FileHandle:
        handle = self._handles[fh]
        if not isinstance(handle, FileHandle):
            raise FUSEError(errno.ENOLCK)
        return handle
