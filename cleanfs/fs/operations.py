"""The FUSE handlers: thin, with the cleancache hooks in sight.

* read: ``FileHandle.read`` -> ``PageCache.read`` -> ``get_pages``, and ``put_pages`` at eviction
* write, truncate: ``PageCache.mutating`` -> ``flush_pages`` before and after
* last unlink, rename over: ``PageCache.forget`` -> ``flush_inode``
* open, getattr, lookup: ``CoherencyChecker`` -> ``flush_inode`` if the source changed

A handler works on inodes that are held (``Tree.using``) and raises only FUSEError (``handler``). Right
before it returns it says what its reply gives (``ReplyRollback``).
"""

import errno
import functools
import logging
import os
import stat as stat_module
import time
from collections.abc import Sequence

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
    XAttrNameT,
)

from cleanfs.cache.files import CachedFile
from cleanfs.cache.state import FileState
from cleanfs.fs import direct
from cleanfs.fs.control import CONTROL_NAME, Control
from cleanfs.fs.entries import Entries, control_entry, new_attributes, statvfs_data
from cleanfs.fs.forget import add_handlers
from cleanfs.fs.handle_table import HandleTable
from cleanfs.fs.handler import handler
from cleanfs.fs.inode_operations import InodeOperations
from cleanfs.fs.listing import Lister, list_control
from cleanfs.fs.lock_operations import LockOperations
from cleanfs.fs.name_changes import NameChanges
from cleanfs.fs.open_directories import OpenDirectories
from cleanfs.fs.opening import Opener
from cleanfs.fs.permissions import Permissions, is_granted
from cleanfs.fs.range_operations import RangeOperations
from cleanfs.fs.rollback import ReplyRollback
from cleanfs.fs.tmpfile import Tmpfile
from cleanfs.fs.xattrs import CAPABILITY, Xattrs
from cleanfs.fuse.calls import Calls
from cleanfs.fuse.channel import Channel
from cleanfs.fuse.request import on_refusal
from cleanfs.linux import credentials
from cleanfs.source import attributes, namespace
from cleanfs.source.attributes import NewAttributes
from cleanfs.source.errors import StaleError
from cleanfs.source.io import SourceFs
from cleanfs.vfs.coherency import Coherency
from cleanfs.vfs.export import Export
from cleanfs.vfs.handles import (
    IO_FLAGS,
    DirHandle,
    FileHandle,
    Services,
    begin_writing,
    end_writing,
)
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inode_state import InodeStates
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.kernel_view import NOTHING, Told
from cleanfs.vfs.node_ids import ROOT
from cleanfs.vfs.open_files import LOOK_SECONDS, OpenFiles
from cleanfs.vfs.root import ACL_NAMES, Root
from cleanfs.vfs.source_locks import Locks
from cleanfs.vfs.source_watch import SourceWatch
from cleanfs.vfs.stale_names import StaleNames
from cleanfs.vfs.tree import Tree

log = logging.getLogger(__name__)


class CleanFS(pyfuse3.Operations):
    """Implements the FUSE operations of one mount (see the module)."""

    enable_acl = True

    def __init__(
        self,
        services: Services,
        inodes: InodeTable,
        control: Control,
        channel: Channel,
        *,
        attr_timeout: float,
        watch: SourceWatch | None = None,
        locks: Locks = Locks.LOCAL,
    ) -> None:
        """Use ``attr_timeout``, in seconds, for attributes and names."""
        super().__init__()
        mode = services.coherency.mode
        self._services = services
        self._inodes = inodes
        self._control = control
        self._caches_absence = mode is Coherency.NONE
        self._tree = tree = Tree(services, inodes)
        self._stale_names = StaleNames(tree)
        self._export = Export(services, inodes, tree) if inodes.exports else None
        self._root = None if services.is_local(inodes.root) else Root(inodes.root)
        look_seconds = LOOK_SECONDS if mode is Coherency.WATCH else attr_timeout
        self._open_files = OpenFiles(services, look_seconds)
        self._handles = HandleTable(services, inodes, self._open_files, channel)
        self._rollback = ReplyRollback(services.notifier, inodes, self._handles)
        self._entries = Entries(inodes, attr_timeout, watch, services.is_local)
        self._permissions = Permissions(services, tree, self._stale_names, channel)
        self._opener = Opener(
            services, inodes, tree, self._permissions, self._handles, self._open_files
        )
        self._lister = Lister(inodes, tree, self._entries, self._rollback)
        self._names = NameChanges(services, inodes, tree, self._stale_names, control)
        self._xattrs = Xattrs(services, inodes, tree, self._permissions, self._rollback)
        self._channel = channel
        ranges = RangeOperations(tree, self._handles)
        inode_operations = InodeOperations(
            tree,
            control,
            self._handles,
            self._permissions,
            self._rollback,
            self._xattrs,
            channel,
            self.getattr,
        )
        self._locks = (
            LockOperations(services, self._handles, self.flush) if locks is Locks.SOURCE else None
        )
        tmpfile = Tmpfile(tree, control, self._entries, self._opener, self._rollback)
        for more in (ranges, inode_operations, tmpfile, self._locks):
            if more is None:
                continue
            channel.async_handlers.update(more.handlers())
        channel.async_handlers.update(direct.handlers(self, time.time_ns))
        self._serve_metadata()
        self._writes_begun = self._writes_ended = 0
        self.supports_dot_lookup = inodes.exports
        self.enable_writeback_cache = services.writeback

    def _serve_metadata(self) -> None:
        """Let the channel forget inodes, and reply with names and attributes that it knows."""
        states = self._inodes.states
        self._inodes.root.local = self._root is None
        states.caches_absence = self._caches_absence
        states.control_name = CONTROL_NAME
        states.writeback = self._services.writeback
        states.can_act = credentials.can_act()
        self._services.notifier.note_pending_in(states)
        self._services.backing.on_file_system(functools.partial(_share_file_system, states))
        calls = Calls(
            drop_unused=self._inodes.drop_unused,
            hold_parked=self._inodes.hold_parked,
            enter_opened=self._inodes.enter_opened,
            enter_listed=self._inodes.enter_listed,
            ask_to_forget=self._tree.ask_to_forget,
            poll_open=self._poll,
            open_directory=OpenDirectories(self._services, self._inodes, self._handles).open,
            close_directory=self._handles.close_directory,
            begin_writing=self._begin_writing,
            end_writing=self._end_writing,
            change_refused=self._change_refused,
            created=self._opener.created,
            create_refused=self._create_refused,
            unlinked=self._names.unlinked,
            unlink_refused=self._unlink_refused,
        )
        self._channel.serve_metadata(states, calls)
        add_handlers(self._channel, self._inodes)

    def _poll(self, node: int) -> None:
        self._open_files.opened(self._inodes[node])

    def _begin_writing(self, node: int, file: FileState) -> None:
        assert isinstance(file, CachedFile)
        begin_writing(self._services, self._inodes[node], file)

    def _end_writing(self, node: int, file: FileState) -> None:
        assert isinstance(file, CachedFile)
        end_writing(self._services, self._inodes[node], file)

    def _change_refused(self, node: int, size: int, access: int, access_ctime: int) -> None:
        self._rollback.undo_change(self._inodes[node], Told(size, access, access_ctime))

    def _create_refused(self, node: int) -> None:
        self._rollback.undo_made(self._inodes[node], NOTHING)

    def _unlink_refused(self, parent: int, name: bytes, node: int) -> None:
        self._rollback.undo_names(self._names.unlink_of(parent, name, node))

    @property
    def open_files(self) -> int:
        """Count the open files and directories of the source."""
        return self._handles.count - self._control.open_files

    def open_for_writing(self) -> set[int]:
        """Return the nodes of the files that are open for writing."""
        return self._handles.open_for_writing()

    async def run_background_tasks(self) -> None:
        """Run the background tasks of the inode table, of open files and of the root; never ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._open_files.run)
            nursery.start_soon(self._tree.keep_bounded)
            nursery.start_soon(self._handles.release_abandoned)
            if self._locks is not None:
                nursery.start_soon(self._locks.run)
            if self._root is not None:
                nursery.start_soon(self._root.run)

    # -- inodes -----------------------------------------------------------------------------

    @handler
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """Find a name; the kernel gets a reference to what it finds."""
        self._stale_names.looking_up(ctx)
        if name in (b".", b".."):
            return await self._decode(parent_inode, is_parent=name == b"..")
        if parent_inode == ROOT and name == CONTROL_NAME:
            return control_entry(self._control.root)
        if (directory := self._control.node(parent_inode)) is not None:
            return control_entry(self._control.lookup(directory, name, ctx.pid))
        namespace.forbid_slash(name)
        async with self._tree.using(parent_inode) as parent:
            try:
                found = await self._tree.look_up(parent, name)
            except FileNotFoundError:
                if not self._caches_absence:
                    raise
                return self._entries.absent()
            self._stale_names.found(found[0], ctx)
            return self._found(*found)

    async def _decode(self, node: InodeT, *, is_parent: bool) -> EntryAttributes:
        """Find an inode that the kernel has forgotten, for a file handle; or a directory's parent."""
        if (control := self._control.node(node)) is not None and not is_parent:
            return control_entry(control)
        if self._export is None or control is not None:
            raise StaleError
        before = self._services.before()
        inode, st = await (self._export.find_parent if is_parent else self._export.find)(node)
        self._tree.observe(inode, st, before)
        self._tree.ask_to_forget()
        entry = self._found(inode, st)
        if inode is self._inodes.root:
            # Here the inode number would have to be the node id, so the kernel must request it again.
            entry.st_ino, entry.generation, entry.attr_timeout = InodeT(ROOT), 0, 0
        return entry

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Take back references that the kernel gave up."""
        for node, nlookup in inode_list:
            self._inodes.forget(node, nlookup)

    @handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        """Read attributes, and check by them whether the source changed."""
        if (node := self._control.node(inode)) is not None:
            self._control.refresh(node)
            return control_entry(node)
        if inode == ROOT and self._root is not None:
            st, fresh = await self._root.stat(self._tree.in_thread_with_retry)
            self._rollback.attributes(self._inodes.root)
            entry = self._entries.attributes(self._inodes.root, st)
            if not fresh:
                entry.attr_timeout = 0
            return entry
        async with self._tree.using(inode) as held:
            is_ours = self._services.notifier.is_refresher(ctx.pid)
            st = await self._tree.stat(held, settles_size=not is_ours)
            if not st.st_nlink:
                await self._permissions.check_removed(held, ctx)
            self._rollback.attributes(held)
            return self._entries.attributes(held, st)

    @handler
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Do chmod, chown, truncate, utimes."""
        return await self.set_attributes(inode, new_attributes(attr, fields), fh, ctx)

    async def set_attributes(
        self, node: int, new: NewAttributes, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """Set attributes. ``fh`` is that of the requester's open file, if it has one."""
        if (control := self._control.node(node)) is not None:
            self._control.truncate_only(control, new)
            return control_entry(control)
        handle = self._handles.get(fh) if fh is not None else None
        if isinstance(handle, FileHandle) and handle.writable:
            with handle.use:
                return await self._set_attributes(node, handle.fd, new, ctx)
        return await self._set_attributes(node, -1, new, ctx)

    async def _set_attributes(
        self, node: int, io_fd: int, wanted: NewAttributes, ctx: RequestContext
    ) -> EntryAttributes:
        """Set attributes. ``io_fd`` is the fd of the requester's file open for writing, or -1."""
        async with self._tree.using(node) as inode:
            new, unchanged = await self._permissions.check_setattr(inode, io_fd, wanted, ctx)
            if unchanged is not None:
                self._rollback.attributes(inode)
                return self._entries.attributes(inode, unchanged)
            st = await self._tree.set_attributes(inode, io_fd, new)
            self._rollback.change(inode, before=inode.kernel.told)
            return self._entries.attributes(inode, st)

    @handler
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        """Read the target of a symbolic link."""
        async with self._tree.using(inode) as held:
            return FileNameT(await self._tree.inline_if_local(held, namespace.read_link, held.fd))

    # -- names ------------------------------------------------------------------------------

    @handler
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a fifo, socket, device or plain file."""
        return self._made(*await self._names.make(parent_inode, name, mode, ctx, rdev=rdev))

    @handler
    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a directory."""
        mode = ModeT(stat_module.S_IFDIR | mode)
        return self._made(*await self._names.make(parent_inode, name, mode, ctx))

    @handler
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a symbolic link."""
        mode = stat_module.S_IFLNK | 0o777
        return self._made(*await self._names.make(parent_inode, name, mode, ctx, target=target))

    @handler
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        """Remove a name; the last one takes the file's pages with it."""
        self._rollback.names(await self._names.unlink(parent_inode, name, ctx))

    @handler
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        """Remove a directory."""
        self._rollback.names(await self._names.rmdir(parent_inode, name, ctx))

    @handler
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        """Rename, with RENAME_NOREPLACE, RENAME_EXCHANGE and RENAME_WHITEOUT."""
        old, new = (parent_inode_old, name_old), (parent_inode_new, name_new)
        self._rollback.names(await self._names.rename(old, new, flags, ctx))

    @handler
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """Give a file one more name."""
        return self._made(*await self._names.link(inode, new_parent_inode, new_name, ctx))

    # -- files ------------------------------------------------------------------------------

    @handler
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        """Open a file; if the source changed, every cache of it is flushed, the kernel's too."""
        if (node := self._control.node(inode)) is not None:
            fh = self._handles.add(self._control.open(node, flags))
            self._rollback.opened(fh)
            return FileInfo(fh=fh, direct_io=True, keep_cache=False)
        self._inodes.check_may_open()
        truncates = flags & os.O_TRUNC
        async with self._tree.using(inode) as held:
            info, st = await self._opener.open(held, flags, ctx)
            told = held.kernel.told
            if truncates:
                await self._opener.truncate(held, info.fh, st, ctx)
            changed = held if truncates or not info.keep_cache else None
            self._rollback.opened(info.fh, changed, told)
            return info

    @handler
    async def create(
        self,
        parent_inode: InodeT,
        name: FileNameT,
        mode: ModeT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> tuple[FileInfo, EntryAttributes]:
        """Create and open a file, which becomes the requester's."""
        self._inodes.check_may_open()
        async with self._names.changing(parent_inode, name) as parent:
            before = self._services.before()
            io_flags = flags & (IO_FLAGS | os.O_EXCL | os.O_TRUNC)
            actor = self._tree.actor(parent, ctx)
            opened, inode, st = await self._tree.create(parent, name, mode, io_flags, actor)
            with self._inodes.using(inode):
                told = inode.kernel.told
                entry = self._entries.attributes(inode, st)
                info = await self._opener.make_handle(inode, opened, flags, before, new=True)
                self._rollback.created(info.fh, inode, told)
                return info, entry

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """Read: the hook of the fast path (see ``PageCache.read``)."""
        try:
            return await self._handles[fh].read(off, size)  # type: ignore[return-value]  # pyfuse3 takes any buffer
        except OSError as exc:
            raise FUSEError(exc.errno or errno.EIO) from exc
        except Exception as exc:
            log.exception("read failed")
            raise FUSEError(errno.EIO) from exc

    @property
    def writes_begun(self) -> int:
        """Return how many WRITEs have come."""
        return self._writes_begun + self._channel.writes_served

    @property
    def writes_ended(self) -> int:
        """Return how many of them have had their reply."""
        return self._writes_ended + self._channel.writes_served

    @handler
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        """Write through to the source."""
        self._writes_begun += 1
        try:
            written, rollback = await self._handles[fh].write(off, buf)
            on_refusal(rollback)
            return written
        finally:
            self._writes_ended += 1

    @handler
    async def flush(self, fh: FileHandleT) -> None:
        """Report the source's error when an fd is closed.

        Where the source never reports any, ENOSYS makes the kernel send no more FLUSH. It takes that
        reply for success.
        """
        if self._services.flushless:
            raise FUSEError(errno.ENOSYS)
        await self._handles[fh].flush()

    @handler
    async def release(self, fh: FileHandleT) -> None:
        """Close a file whose last descriptor was closed."""
        if self._locks is not None:
            self._locks.released(fh)
        await self._handles.release(fh)

    @handler
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        """Make what was written durable in the source."""
        await self._handles[fh].sync(datasync)

    # -- directories --------------------------------------------------------------------------

    @handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        """Open a directory."""
        if (node := self._control.node(inode)) is not None:
            return self._handles.add_directory(node)
        self._inodes.check_may_open()
        async with self._tree.using(inode) as held:
            fh = await self._opener.open_directory(held, ctx)
            self._rollback.opened(fh)
            return fh

    @handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        """List from a position on; every entry carries its attributes."""
        directory = self._handles.directory(fh)
        if isinstance(directory, DirHandle):
            with directory.use:
                await self._lister.fill(directory, start_id, token)
        else:
            list_control(self._control, directory, start_id, token)

    @handler
    async def releasedir(self, fh: FileHandleT) -> None:
        """Close a directory."""
        await self._handles.release_directory(fh)

    @handler
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Make changes of names durable in the source."""
        directory = self._handles.directory(fh)
        if isinstance(directory, DirHandle):
            await directory.sync(datasync)

    # -- file system and extended attributes --------------------------------------------------

    @handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Report the free space of the source."""
        if self._root is not None:
            st = await self._root.statfs(self._tree.in_thread_with_retry)
        else:
            st = await self._tree.in_thread_with_retry(os.statvfs, self._inodes.root.path())
        return statvfs_data(st)

    @handler
    async def setxattr(
        self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext
    ) -> None:
        """Set an extended attribute, without the channel. pyfuse3 sees to the flags."""
        if self._control.node(inode) is not None:
            raise FUSEError(errno.EPERM)
        async with self._tree.using(inode) as held:
            await self._xattrs.set(held, name, value, ctx)

    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        """Read an extended attribute, or reply ENODATA."""
        if name == CAPABILITY and (value := self._xattrs.capability(inode, ctx)) is not None:
            return value
        return await self._getxattr(inode, name)

    @handler
    async def _getxattr(self, inode: InodeT, name: XAttrNameT) -> bytes:
        if self._control.node(inode) is not None:
            raise FUSEError(pyfuse3.ENOATTR)
        if inode == ROOT and self._root is not None and name in ACL_NAMES:
            return await self._root.acl(self._tree.in_thread_with_retry, name)
        async with self._tree.using(inode) as held:
            return await self._xattrs.get(held, name)

    @handler
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        """List the names of extended attributes."""
        if self._control.node(inode) is not None:
            return []
        async with self._tree.using(inode) as held:
            names = await self._tree.inline_if_local(held, attributes.list_xattrs, held.path())
            # The daemon may see more than the requester would on the source itself.
            return [XAttrNameT(n) for n in names if ctx.uid == 0 or not n.startswith(b"trusted.")]

    @handler
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        """Remove an extended attribute, or reply ENODATA."""
        if self._control.node(inode) is not None:
            raise FUSEError(errno.EPERM)
        async with self._tree.using(inode) as held:
            await self._xattrs.remove(held, name, ctx)

    @handler
    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        """Check access. With ``default_permissions`` the kernel decides this itself."""
        return is_granted(await self.getattr(inode, ctx), mode, ctx)

    # -- shared pieces ------------------------------------------------------------------------

    def _found(self, inode: Inode, st: os.stat_result) -> EntryAttributes:
        """Make an entry with which the kernel gets a reference to what was found."""
        self._rollback.found(inode)
        return self._entries.attributes(inode, st)

    def _made(self, inode: Inode, st: os.stat_result) -> EntryAttributes:
        """Make an entry with which the kernel gets a reference to what was made."""
        self._rollback.made(inode)
        return self._entries.attributes(inode, st)


def _share_file_system(states: InodeStates, device: int, fs: SourceFs) -> None:
    """Let the channel know what is known of a file system of the source, if it is local."""
    if fs.local:
        policies = fs.reads, fs.writes, fs.lookups, fs.names, fs.listings
        states.use_file_system(device, fs, *policies)
