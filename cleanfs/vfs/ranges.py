"""Change ranges of open files other than by a write: fallocate, copies, and where holes are.

Each change invalidates here what it makes stale, before and after, as a write does. The kernel drops
its own pages of the range by itself, when it gets the reply (``fuse_file_fallocate``,
``__fuse_copy_file_range`` of Linux 6.18). If it refuses the reply, they are invalidated.
"""

import errno
import fcntl
import functools
import mmap
import os
from collections.abc import Callable
from typing import Final, TypeVarTuple

from cleanfs.cache.changes import Mutating
from cleanfs.cache.fingerprint import own_fingerprint
from cleanfs.linux.syscalls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
)
from cleanfs.source import ranges
from cleanfs.source.caller import Caller
from cleanfs.source.file import MAX_OFFSET, Written
from cleanfs.vfs.handles import FileHandle, Rollback
from cleanfs.vfs.invalidate import invalidate
from cleanfs.vfs.tree import Tree

Ts = TypeVarTuple("Ts")

COPY_BYTES: Final = 16 << 20
"""How much one call copies, so that a signal ends a copy soon, and other changes of the file get in."""

NOTHING_DONE: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV, errno.EPERM, errno.EBADF)
"""Errors that leave the file as it was."""

ZEROS: Final = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE
KNOWN: Final = FALLOC_FL_KEEP_SIZE | ZEROS
"""All modes that the kernel sends (``fuse_file_fallocate`` of Linux 6.18). It refuses others itself."""


class Ranges:
    """Changes ranges of the files of one mount."""

    def __init__(self, tree: Tree) -> None:
        """Make calls through ``tree``."""
        self._tree = tree
        self._services = tree.services

    # -- fallocate ----------------------------------------------------------------------------

    async def allocate(
        self, handle: FileHandle, mode: int, offset: int, length: int, caller: Caller
    ) -> Rollback:
        """Do an fallocate for a process. Returns what to do if the kernel refuses the reply."""
        if mode & ~KNOWN:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        keeps_size = bool(mode & FALLOC_FL_KEEP_SIZE)
        with handle.use:
            handle.opener_ran()
            told = handle.inode.kernel.told
            async with self._allocating(handle, mode, offset, length):
                done = await self._change(
                    handle, ranges.allocate, handle.fd, mode, offset, length, caller
                )
                size = done.before.st_size
                if not keeps_size:
                    size = max(size, offset + length)
                theirs = self._after_change(handle, done, size)
            if not keeps_size:
                handle.inode.kernel.written_to(offset + length)
            self._changed(handle, done, theirs)
            if mode & ZEROS:
                self._drop_pages(handle, offset, length)
            return functools.partial(invalidate, self._services.notifier, handle.inode, before=told)

    def _allocating(self, handle: FileHandle, mode: int, offset: int, length: int) -> Mutating:
        """Return the context of the change: it invalidates what the mode makes stale."""
        mutating = functools.partial(self._services.pagecache.mutating, handle.file)
        stop = offset + length if mode & FALLOC_FL_KEEP_SIZE else None
        if mode & ZEROS:
            return mutating(offset, stop)
        return mutating(MAX_OFFSET, MAX_OFFSET) if stop else mutating(MAX_OFFSET)  # the old end

    # -- copies -------------------------------------------------------------------------------

    async def copy(
        self,
        source: FileHandle,
        source_offset: int,
        target: FileHandle,
        offset: int,
        count: int,
        caller: Caller,
        *,
        ends: Callable[[], bool],
    ) -> tuple[int, Rollback]:
        """Copy between two files for a process; comes short once ``ends()`` says so.

        Returns the bytes copied, and what to do if the kernel refuses the reply. Raises OSError: EXDEV
        if the kernel should copy by reads and writes.

        The kernel drops the pages that a reply covers, also in part, and whatever a program has stored
        in them through a mapping meanwhile. So only whole pages are copied.
        """
        with source.use, target.use:
            count = await self._whole_pages(source, source_offset, target, offset, count)
            source.opener_ran()
            target.opener_ran()
            told = target.inode.kernel.told
            copied = 0
            while copied < count and not (copied and ends()):
                piece = min(count - copied, COPY_BYTES)
                where = source_offset + copied, offset + copied
                try:
                    done = await self._copy_piece(source, where[0], target, where[1], piece, caller)
                except OSError:
                    if copied:
                        break
                    raise
                copied += done
                if done < piece:
                    break
            undo = functools.partial(invalidate, self._services.notifier, target.inode, before=told)
            return copied, undo

    async def _whole_pages(
        self, source: FileHandle, source_offset: int, target: FileHandle, offset: int, count: int
    ) -> int:
        """Return how much of a copy fills pages of the target, of which the last may end the file."""
        stat = self._services.inline_if_local
        size = (await stat(target.inode, os.fstat, target.fd)).st_size
        left = (await stat(source.inode, os.fstat, source.fd)).st_size - source_offset
        count = max(min(count, left), 0)
        end = offset + count
        if end < size:
            end -= end % mmap.PAGESIZE
        if count and (offset % mmap.PAGESIZE or end <= offset):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return end - offset

    async def _copy_piece(
        self,
        source: FileHandle,
        source_offset: int,
        target: FileHandle,
        offset: int,
        count: int,
        caller: Caller,
    ) -> int:
        for write in [w for w in source.file.writes if w.overlaps(source_offset, count)]:
            await write.wait()
        async with self._services.pagecache.mutating(target.file, offset, offset + count):
            where = source.fd, source_offset, target.fd, offset
            done = await self._change(target, ranges.copy, *where, count, caller)
            size = max(done.before.st_size, offset + done.count) if done.count else None
            theirs = self._after_change(target, done, size)
        if done.count:
            target.inode.kernel.written_to(offset + done.count)
        self._changed(target, done, theirs)
        self._drop_pages(target, offset, done.count)
        return done.count

    # -- holes --------------------------------------------------------------------------------

    async def seek(self, handle: FileHandle, offset: int, whence: int) -> int:
        """Find data or a hole from an offset on (SEEK_DATA, SEEK_HOLE). Raises OSError: ENXIO.

        The kernel may have dirty pages where the source has a hole: of a mapping, or of writes that it
        keeps (``--writeback``). It does not send them first, so it is made to. For this request it
        holds no lock that the write-back needs.
        """
        with handle.use:
            if any(map(_is_for_writing, handle.inode.open_fds)):
                await self._services.notifier.pages_dropped(handle.inode.node)
            return await self._services.backing.in_thread(os.lseek, handle.fd, offset, whence)

    # -- shared pieces ------------------------------------------------------------------------

    async def _change(self, handle: FileHandle, call: Callable[[*Ts], Written], *args: *Ts) -> Written:
        """Change a file in a thread; distrust it if that fails and a part may have been done."""
        try:
            return await self._tree.in_thread_with_retry(call, *args)
        except BaseException as exc:
            if not (isinstance(exc, OSError) and exc.errno in NOTHING_DONE):
                self._services.coherency.distrust(handle.file)
                self._services.notifier.inode(handle.inode.node)
            raise

    def _after_change(self, handle: FileHandle, done: Written, size: int | None) -> bool:
        """Take the new fingerprint, under the file's lock. Return whether others changed it, too."""
        before, after = own_fingerprint(done.before), own_fingerprint(done.after)
        return self._services.coherency.after_own_change(handle.file, before, after, size=size)

    def _changed(self, handle: FileHandle, done: Written, theirs: bool) -> None:
        """Record a change that the kernel knows of, or have it refresh what it does not know."""
        inode = handle.inode
        if not theirs:
            inode.kernel.knows_change(done.before, done.after)
        if theirs or done.before.st_mode != done.after.st_mode:
            self._services.notifier.inode(inode.node)

    def _drop_pages(self, handle: FileHandle, offset: int, length: int) -> None:
        """Invalidate pages that the kernel itself drops upon the reply: it says not when.

        Until then it could evict them, and they would be put.
        """
        if self._services.pagecache.takes_evictions and length:
            self._services.notifier.pages(handle.inode.node, offset, length)


def _is_for_writing(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
