"""Number the open file handles of a mount; the kernel refers to them by these numbers."""

import contextlib
import logging
import os
from itertools import count

import trio
from pyfuse3 import FileHandleT

from cleanfs.fs.control import Node
from cleanfs.fuse.channel import Channel
from cleanfs.vfs.handles import DirHandle, FileHandle, Handle, Services
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.open_files import OpenFiles

log = logging.getLogger(__name__)


class HandleTable:
    """Holds the open files, directories and control directories."""

    def __init__(
        self, services: Services, inodes: InodeTable, open_files: OpenFiles, channel: Channel
    ) -> None:
        """Start with nothing open. The ``channel`` may open files itself, and serve reads of all."""
        self._services = services
        self._channel = channel
        self._inodes = inodes
        self._open_files = open_files
        self._files: dict[int, Handle] = {}
        self._directories: dict[int, DirHandle | Node] = {}
        self._numbers = count(1)
        self._abandoned: list[FileHandleT] = []
        self._some_abandoned = trio.Event()

    def __getitem__(self, fh: int) -> Handle:
        """Return the open file of a number."""
        handle = self.get(fh)
        if handle is None:
            raise KeyError(fh)
        return handle

    def get(self, fh: int) -> Handle | None:
        """Return the open file of a number; None if there is none."""
        handle = self._files.get(fh)
        return self._adopt(fh) if handle is None else handle

    def _adopt(self, fh: int) -> FileHandle | None:
        """Make the handle of a file that the channel opened."""
        adopted = self._channel.adopt_handle(fh)
        if adopted is None:
            return None
        inode, file, fd, flags, stream, writes, nowait_tried_at = adopted
        handle = FileHandle(self._services, inode, file, fd, flags, stream, writes=writes)
        handle.state.nowait_tried_at = nowait_tried_at
        self._files[fh] = handle
        self._channel.add_handle(fh, handle.state)
        return handle

    def directory(self, fh: int) -> DirHandle | Node:
        """Return the open directory of a number, or the control directory that it stands for."""
        return self._directories[fh]

    @property
    def count(self) -> int:
        """Count the open files and directories, control files included."""
        directories = [found for found in self._directories.values() if isinstance(found, DirHandle)]
        return len(self._files) + self._channel.own_handles + len(directories)

    def open_for_writing(self) -> set[int]:
        """Return the nodes of the files that are open for writing."""
        handles = [handle for handle in self._files.values() if isinstance(handle, FileHandle)]
        nodes = {handle.inode.node for handle in handles if handle.writable}
        return nodes.union(self._channel.own_writers)

    def add(self, handle: Handle) -> FileHandleT:
        """Give an open file a number."""
        fh = FileHandleT(next(self._numbers))
        self._files[fh] = handle
        if isinstance(handle, FileHandle):
            self._channel.add_handle(fh, handle.state)
        return fh

    def add_directory(self, directory: DirHandle | Node) -> FileHandleT:
        """Give an open directory a number. The fd of a ``DirHandle`` counts from now on."""
        fh = FileHandleT(next(self._numbers))
        self._directories[fh] = directory
        if isinstance(directory, DirHandle):
            self._inodes.opened(directory.inode, directory.fd)
            self._channel.add_directory(fh, directory.state)
        return fh

    async def release(self, fh: FileHandleT) -> None:
        """Close a file."""
        handle = self[fh]
        del self._files[fh]
        self._channel.remove_handle(fh)
        if isinstance(handle, FileHandle):
            with self._inodes.closing(handle.inode, handle.fd):
                self._open_files.closed(handle.inode)
                await handle.release()
        else:
            await handle.release()

    async def release_directory(self, fh: FileHandleT) -> None:
        """Close a directory."""
        directory = self._directories.pop(fh)
        if isinstance(directory, DirHandle):
            self._channel.remove_directory(fh)
            with self._inodes.closing(directory.inode, directory.fd):
                await directory.release()

    def close_directory(self, fh: int) -> bool:
        """Close a directory of a local source, unless a request uses it. Return whether it did."""
        directory = self._directories[fh]
        if not isinstance(directory, DirHandle) or directory.use:
            return False
        del self._directories[fh]
        self._channel.remove_directory(fh)
        with self._inodes.closing(directory.inode, directory.fd), contextlib.suppress(OSError):
            os.close(directory.fd)
        return True

    def abandon(self, fh: FileHandleT) -> None:
        """Have ``release_abandoned`` close what the kernel does not know to be open."""
        self._abandoned.append(fh)
        self._some_abandoned.set()

    async def release_abandoned(self) -> None:
        """Close abandoned files and directories, each in a task of its own; never ends."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._some_abandoned.wait()
                self._some_abandoned = trio.Event()
                while self._abandoned:
                    nursery.start_soon(self._release_quietly, self._abandoned.pop())

    async def _release_quietly(self, fh: FileHandleT) -> None:
        release = self.release if fh in self._files else self.release_directory
        try:
            with contextlib.suppress(OSError):  # no requester is left to get the error
                await release(fh)
        except Exception:
            log.exception("the release of an abandoned file failed")
