"""Open files: compare the source with what is known, and decide whether the kernel keeps its pages."""

import functools
import os
from typing import Final

import trio
from pyfuse3 import FileHandleT, FileInfo, RequestContext

from cleanfs.backends.ops import FileKey
from cleanfs.cache.files import CachedFile
from cleanfs.fs.handle_table import HandleTable
from cleanfs.fs.permissions import Permissions
from cleanfs.fuse.request import current
from cleanfs.source import namespace
from cleanfs.source.attributes import NewAttributes, without_set_id
from cleanfs.source.caller import Caller
from cleanfs.source.namespace import OpenedFile
from cleanfs.vfs.coherency import Coherency
from cleanfs.vfs.handles import Before, DirHandle, FileHandle, Services, begin_writing
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.kernel_view import stamps_of
from cleanfs.vfs.open_files import OpenFiles
from cleanfs.vfs.tree import Tree

DROP_SECONDS: Final = 0.5
"""How many seconds the kernel has to drop a file's pages after an OPEN reply says so. Until then, or
until the opened file is closed, every OPEN reply says so; after that the kernel is notified."""

FLAGS_FOR_AN_IOCTL: Final = os.O_RDONLY
"""The flags with which the kernel opens an open file once more, for each call of FS_IOC_GETFLAGS and
the like (``fuse_priv_ioctl_prepare``): these alone, without O_LARGEFILE. It drops no pages then,
whatever it is told (Linux 6.18). A 32-bit program may open a file with the same flags."""


class Opener:
    """Opens files and directories, and makes handles of them."""

    def __init__(
        self,
        services: Services,
        inodes: InodeTable,
        tree: Tree,
        permissions: Permissions,
        handles: HandleTable,
        open_files: OpenFiles,
    ) -> None:
        """Add handles to ``handles``, and their inodes to ``open_files``."""
        self._services = services
        self._inodes = inodes
        self._tree = tree
        self._permissions = permissions
        self._handles = handles
        self._open_files = open_files

    async def open(
        self, inode: Inode, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, os.stat_result]:
        """Open a file, without truncating it. Return its attributes, too. Raises OSError."""
        before, truncates = self._services.before(), flags & os.O_TRUNC
        opened = await self._tree.open(inode, flags)
        fd, st = opened.fd, opened.stat
        await self._permissions.check_opened(inode, fd, st, ctx, truncates=truncates)
        return await self.make_handle(inode, opened, flags & ~os.O_TRUNC, before), st

    async def open_directory(self, inode: Inode, ctx: RequestContext) -> FileHandleT:
        """Open a directory. Raises OSError."""
        request = current()  # pyfuse3's handler gets no flags
        flags = 0 if request is None else request.file_flags & os.O_NOATIME
        fd = await self._tree.open_directory(inode, flags)
        try:
            st = await self._services.inline_if_local(inode, os.fstat, fd)
        except BaseException:
            await self._tree.close(inode, fd)
            raise
        await self._permissions.check_opened(inode, fd, st, ctx)
        directory = DirHandle(self._services, inode, fd, handles=self._inodes.exports)
        return self._handles.add_directory(directory)

    def created(self, parent_node: int, name: bytes, fd: int, path_fd: int, writable: bool) -> int:
        """Record a file that the channel created and opened (``fuse.calls``)."""
        services, inodes = self._services, self._inodes
        parent, before = inodes[parent_node], services.before()
        st = os.fstat(path_fd)
        inodes.name_gone(parent.device, parent, name)
        inode = inodes.looked_up(path_fd, st, parent, name)
        assert inode.nlookup == 1, "the file is new, and so is its number"
        inode.local = True
        file = self._record_of(inode, namespace.file_key(fd, st))
        services.coherency.on_open(file, self._tree.fingerprint(st, before), before.clock)
        if services.coherency.mode is not Coherency.NONE:
            self._open_files.opened(inode)
        if writable:
            begin_writing(services, inode, file)
        return inode.node

    def _record_of(self, inode: Inode, key: FileKey) -> CachedFile:
        """Return the record of an inode that was opened, which has that key."""
        if inode.dentry is None:
            inode.handle = key.generation
        file = self._services.pagecache.file(key, inode.dentry)
        inode.set_file(key, file)
        return file

    async def make_handle(
        self, inode: Inode, opened: OpenedFile, flags: int, before: Before, *, new: bool = False
    ) -> FileInfo:
        """Make a handle of a file that was opened after ``before``; takes over its descriptor.

        ``new`` says that it was created by this request.
        """
        services = self._services
        file = self._record_of(inode, opened.key)
        new = new and inode.nlookup == 1 and not file.handles
        handle = FileHandle(services, inode, file, opened.fd, flags)
        self._inodes.opened(inode, opened.fd)
        fh = self._handles.add(handle)
        try:
            drops = await self._compare(handle, opened.stat, flags, before, new=new)
        except BaseException:
            if inode.kernel.dropped_for == handle.state.serial:
                services.notifier.inode(inode.node)
            await self._handles.release(fh)
            raise
        drops = self._must_drop_pages(handle, drops)
        if drops:
            handle.drops_pages()
        handle.may_write()
        if opened.direct:
            handle.bypasses_cache()
        return FileInfo(fh=fh, direct_io=opened.direct, keep_cache=not drops)

    async def _compare(
        self, handle: FileHandle, st: os.stat_result, flags: int, before: Before, *, new: bool
    ) -> bool:
        """Compare the source with what is known. Return whether this open drops the kernel's pages.

        It has none of a ``new`` file, of which no reply has told it.
        """
        services, inode = self._services, handle.inode
        now = self._tree.fingerprint(st, before)
        stale = services.coherency.on_open(handle.file, now, before.clock) and not new
        drops = stale and flags != FLAGS_FOR_AN_IOCTL
        if stale and not drops:
            services.notifier.inode(inode.node)
        if drops:
            handle.drops_pages()
            inode.kernel.drops_pages_for(
                handle.state.serial
            )  # until this reply, any other open's drops them, too
        if inode.kernel.changed(st) and stale and services.notifier.explicit:
            services.notifier.inode(inode.node)  # before a reply tells another size
        if services.coherency.mode is not Coherency.NONE:  # otherwise the kernel knows all changes
            self._open_files.opened(inode)
            await self._settle_doubts(inode, stale)
        return drops

    async def _settle_doubts(self, inode: Inode, stale: bool) -> None:
        """Make the kernel refresh the attributes, above all the size, if it may have old ones.

        It requests them before the reply to the open. If that were left to the program's first read, a
        notification or a write could overtake the GETATTR reply. Then the kernel would discard the
        reply, and use the old size.

        ``stale`` says that the kernel's pages are stale: they are dropped before it learns the size.
        """
        notifier = self._services.notifier
        pages = stale and notifier.explicit
        await inode.kernel.settle(
            functools.partial(
                notifier.refreshed, inode.node, inode.generation, inode.mount_path(), pages=pages
            )
        )

    def _must_drop_pages(self, handle: FileHandle, drops: bool) -> bool:
        """Decide, right before the reply, whether it tells the kernel to drop its pages."""
        notifier, inode, moment = self._services.notifier, handle.inode, trio.current_time()
        kernel = inode.kernel
        if kernel.dropped_for == handle.state.serial:
            kernel.drops_pages_for(handle.state.serial, by=moment + DROP_SECONDS)
        drops = drops or moment < kernel.pages_dropped_by
        if kernel.dropped_for and not drops:
            notifier.inode(inode.node)  # the earlier opener may still not have run
            kernel.dropped_for = 0
        return drops or notifier.is_pending(inode.node)

    async def truncate(
        self, inode: Inode, fh: FileHandleT, st: os.stat_result, ctx: RequestContext
    ) -> None:
        """Do the O_TRUNC of an open, which may also clear set-id bits."""
        handle = self._handles[fh]
        assert isinstance(handle, FileHandle)
        handle.drops_pages()
        io_fd = handle.fd if handle.writable else -1
        caller = Caller.of(ctx)
        clears = self._permissions.truncation_clears_set_id(caller)
        cleared = without_set_id(st, caller) if clears else None
        try:
            new = NewAttributes(size=0, mode=cleared)
            inode.kernel.sent = stamps_of(await self._tree.set_attributes(inode, io_fd, new))
            inode.kernel.size = 0  # upon this reply
        except BaseException:
            await self._handles.release(fh)
            raise
