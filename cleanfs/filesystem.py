"""The FUSE handlers: thin, with the cleancache hooks in sight.

* read: ``FileHandle.read`` -> ``PageCache.read`` -> ``get_pages``, and ``put_pages`` at eviction
* write, truncate: ``PageCache.mutating`` -> ``flush_pages`` before and after
* last unlink, rename over: ``PageCache.forget`` -> ``flush_inode``
* open, getattr, lookup: ``CoherencyChecker`` -> ``flush_inode`` if the source changed

A handler holds what it uses across an await (``_using``), runs what may wait for the source in a
thread (``Backing.run``), and raises only FUSEError (``handler``).
"""

import contextlib
import errno
import functools
import logging
import os
import stat as stat_module
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from itertools import count
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

import pyfuse3
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

from cleanfs import namespace
from cleanfs.coherency import Fingerprint, fingerprint, own_fingerprint
from cleanfs.control import CONTROL_NAME, Control, Node
from cleanfs.handles import IO_FLAGS, Before, DirHandle, FileHandle, Handle, Services
from cleanfs.inodes import ROOT, Inode, InodeTable, StaleError, is_parked, open_parked
from cleanfs.namespace import Changed, NewAttributes, OpenedFile, Owner
from cleanfs.notify import attributes_changed
from cleanfs.ops import FileKey
from cleanfs.pagecache import CachedFile

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

MAX_DEPTH = 128
"""Parked inodes that are opened by their parents' places, at most, to get at one."""

FORGET_BATCH = 256
"""Names that the kernel is asked to forget in one go."""


def handler(call: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The boundary: an OSError becomes its errno, a bug is logged and becomes EIO."""

    @functools.wraps(call)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await call(*args, **kwargs)
        except FUSEError:
            raise
        except OSError as exc:
            raise FUSEError(exc.errno or errno.EIO) from exc
        except Exception as exc:
            log.exception("%s failed", call.__name__)
            raise FUSEError(errno.EIO) from exc

    return wrapped


class CleanFS(pyfuse3.Operations):
    """One mounted source."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = True

    def __init__(
        self,
        services: Services,
        inodes: InodeTable,
        control: Control,
        *,
        attr_timeout: float,
    ) -> None:
        """``attr_timeout`` in seconds, for attributes and names."""
        super().__init__()
        self._services = services
        self._run = services.backing.run
        self._near = services.run_near
        self._inodes = inodes
        self._control = control
        self._attr_timeout = attr_timeout
        self._handles: dict[int, Handle] = {}
        self._dirs: dict[int, DirHandle] = {}
        self._control_dirs: dict[int, Node] = {}
        self._fhs = count(1)

    @property
    def open_files(self) -> int:
        """Open files and directories of the source and of the control directory."""
        return len(self._handles) + len(self._dirs) + len(self._control_dirs)

    # -- inodes -----------------------------------------------------------------------------

    @handler
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """Find a name; the kernel gets a reference to what it finds."""
        if parent_inode == ROOT and name == CONTROL_NAME:
            return self._control_entry(self._control.root)
        if (directory := self._control.node(parent_inode)) is not None:
            return self._control_entry(self._control.lookup(directory, name))
        namespace.forbid_slash(name)
        async with self._using(parent_inode) as parent:
            return await self._look_up(parent, name)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """The kernel gave up references."""
        for node, nlookup in inode_list:
            self._inodes.forget(node, nlookup)

    @handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        """Attributes, and with them a look at whether the source changed."""
        if (node := self._control.node(inode)) is not None:
            return self._control_entry(node)
        async with self._using(inode) as held:
            return self._attributes(held, await self._stat(held))

    @handler
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """chmod, chown, truncate, utimes."""
        if (node := self._control.node(inode)) is not None:
            self._control.truncate_only(node, fields)
            return self._control_entry(node)
        new = NewAttributes(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        handle = self._handles.get(fh) if fh is not None else None
        io_fd = handle.fd if isinstance(handle, FileHandle) and handle.writable else -1
        async with self._using(inode) as held:
            return self._attributes(held, await self._set_attributes(held, io_fd, new))

    @handler
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        """Target of a symbolic link."""
        async with self._using(inode) as held:
            return FileNameT(await self._near(held, namespace.read_link, held.fd))

    # -- names ------------------------------------------------------------------------------

    @handler
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """A fifo, socket, device or plain file."""
        return await self._make(parent_inode, name, mode, rdev, b"", ctx)

    @handler
    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        """A directory."""
        return await self._make(parent_inode, name, stat_module.S_IFDIR | mode, 0, b"", ctx)

    @handler
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """A symbolic link."""
        mode = stat_module.S_IFLNK | 0o777
        return await self._make(parent_inode, name, mode, 0, target, ctx)

    @handler
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        """Remove a name; the last one takes the file's pages with it."""
        async with self._changing_names(parent_inode, name) as parent:
            self._name_changed(await self._run(namespace.unlink, parent.fd, name))

    @handler
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        """Remove a directory."""
        async with self._changing_names(parent_inode, name) as parent:
            await self._run(functools.partial(os.rmdir, name, dir_fd=parent.fd))

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
        """Rename, with RENAME_NOREPLACE and RENAME_EXCHANGE."""
        async with (
            self._changing_names(parent_inode_old, name_old) as old,
            self._changing_names(parent_inode_new, name_new) as new,
        ):
            done = await self._run(namespace.rename, old.fd, name_old, new.fd, name_new, flags)
            self._name_changed(done.moved)
            if (inode := self._inodes.find(done.moved.before)) is not None:
                self._inodes.moved(inode, new, name_new)
            if done.replaced is not None:
                self._name_changed(done.replaced)
                exchanged = self._inodes.find(done.replaced.before)
                if exchanged is not None and flags & pyfuse3.RENAME_EXCHANGE:
                    self._inodes.moved(exchanged, old, name_old)

    @handler
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """One more name for a file."""
        if self._control.node(inode) is not None:
            raise FUSEError(errno.EPERM)
        async with (
            self._using(inode) as held,
            self._changing_names(new_parent_inode, new_name) as parent,
        ):
            self._name_changed(await self._run(namespace.link, held.fd, parent.fd, new_name))
            return await self._look_up(parent, new_name)

    # -- files ------------------------------------------------------------------------------

    @handler
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        """Open a file; if the source changed, every cache of it is flushed, the kernel's too."""
        if (node := self._control.node(inode)) is not None:
            fh = self._add(self._control.open(node, flags))
            return FileInfo(fh=fh, direct_io=True, keep_cache=False)
        async with self._using(inode) as held:
            before = self._services.before()
            opened = await self._open(held, flags)
            info = await self._opened(held, opened, flags & ~os.O_TRUNC, before)
            if flags & os.O_TRUNC:
                await self._truncate_open(held, info.fh, opened.stat.st_mode, ctx)
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
        """Create and open a file, which becomes the caller's."""
        async with self._changing_names(parent_inode, name) as parent:
            io_flags = flags & (IO_FLAGS | os.O_EXCL | os.O_TRUNC)
            owner = Owner(ctx.uid, ctx.gid)
            opened = await self._retry_emfile(
                self._run, namespace.create_file, parent.fd, name, mode, io_flags, owner
            )
            try:
                entry = await self._look_up(parent, name)
            except BaseException:
                os.close(opened.fd)
                raise
            inode = self._inodes[entry.st_ino]
            if inode.id != (opened.stat.st_dev, opened.stat.st_ino):
                os.close(opened.fd)
                self._inodes.forget(inode.node, 1)
                raise StaleError  # replaced in the source since; the kernel tries again
            with self._inodes.using(inode):
                if not opened.created:  # and perhaps truncated
                    file = self._services.pagecache.file(opened.key)
                    self._services.coherency.distrust(file)
                before = self._services.before()
                return await self._opened(inode, opened, flags, before), entry

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """The hook of the fast path (see ``PageCache.read``)."""
        try:
            return await self._handles[fh].read(off, size)  # type: ignore[return-value]  # pyfuse3 takes any buffer
        except OSError as exc:
            raise FUSEError(exc.errno or errno.EIO) from exc
        except Exception as exc:
            log.exception("read failed")
            raise FUSEError(errno.EIO) from exc

    @handler
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        """Write through to the source."""
        return await self._handles[fh].write(off, buf)

    @handler
    async def flush(self, fh: FileHandleT) -> None:
        """A descriptor was closed: report what the source has to say."""
        await self._handles[fh].flush()

    @handler
    async def release(self, fh: FileHandleT) -> None:
        """The last descriptor of an open file was closed."""
        await self._release(fh)

    @handler
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        """Durable in the source when this returns."""
        await self._handles[fh].sync(datasync)

    # -- directories --------------------------------------------------------------------------

    @handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        """Open a directory."""
        fh = next(self._fhs)
        if (node := self._control.node(inode)) is not None:
            self._control_dirs[fh] = node
            return FileHandleT(fh)
        async with self._using(inode) as held:
            opened = await self._open(held, os.O_RDONLY | os.O_DIRECTORY)
            self._dirs[fh] = DirHandle(self._services, held, opened.fd)
            self._inodes.opened(held, opened.fd)
        return FileHandleT(fh)

    @handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        """List from a position on; every entry carries its attributes."""
        if (node := self._control_dirs.get(fh)) is not None:
            for position, (child_name, child) in enumerate(node.children[start_id:], start_id + 1):
                entry = self._control_entry(child)
                if not pyfuse3.readdir_reply(token, FileNameT(child_name), entry, position):
                    break
            return
        directory = self._dirs[fh]
        if start_id == 0:
            await directory.rewind()
        for position, name in ((0, b"."), (1, b"..")):
            if start_id <= position and not pyfuse3.readdir_reply(
                token, FileNameT(name), self._dot_entry(directory, name), position + 1
            ):
                return
        position = max(start_id, 2)
        while (found := await directory.entry(position - 2)) is not None:
            name, st = found
            position += 1
            if st is None or (directory.inode is self._inodes.root and name == CONTROL_NAME):
                continue
            if isinstance(st, OSError):
                if not pyfuse3.readdir_reply(token, FileNameT(name), self._unknown_entry(), position):
                    return
                continue
            inode = self._inodes.listed(st, directory.inode, name)
            self._observe(inode, st, directory.before)
            if not pyfuse3.readdir_reply(token, FileNameT(name), self._attributes(inode, st), position):
                self._inodes.unreferenced(inode)
                return
            self._inodes.referenced(inode, directory.inode, name)
        self._ask_to_forget()

    @handler
    async def releasedir(self, fh: FileHandleT) -> None:
        """Close a directory."""
        self._control_dirs.pop(fh, None)
        directory = self._dirs.pop(fh, None)
        if directory is not None:
            self._inodes.released(directory.inode, directory.fd)
            await directory.release()

    @handler
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Names are durable in the source when this returns."""
        directory = self._dirs.get(fh)
        if directory is not None:
            await directory.sync(datasync)

    # -- the rest -----------------------------------------------------------------------------

    @handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Free space: the source's."""
        st = await self._run(os.statvfs, self._inodes.root.path())
        data = StatvfsData()
        for name in (
            "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail",
        ):  # fmt: skip
            setattr(data, name, getattr(st, name))
        data.f_namemax = st.f_namemax
        return data

    @handler
    async def setxattr(
        self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext
    ) -> None:
        """Set an extended attribute (pyfuse3 sees to XATTR_CREATE and XATTR_REPLACE)."""
        await self._change_xattr(inode, name, value)

    @handler
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        """Value of an extended attribute, or ENODATA."""
        if self._control.node(inode) is not None:
            raise FUSEError(pyfuse3.ENOATTR)
        async with self._using(inode) as held:
            return await self._near(held, os.getxattr, held.path(), name)

    @handler
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        """Names of the extended attributes."""
        if self._control.node(inode) is not None:
            return []
        async with self._using(inode) as held:
            names = await self._near(held, namespace.list_xattrs, held.path())
            # The daemon may see more than the caller would on the source itself.
            return [XAttrNameT(n) for n in names if ctx.uid == 0 or not n.startswith(b"trusted.")]

    @handler
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        """Remove an extended attribute, or ENODATA."""
        await self._change_xattr(inode, name, None)

    @handler
    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        """Whether the caller may. With ``default_permissions`` the kernel answers this itself."""
        attr = await self.getattr(inode, ctx)
        if ctx.uid == 0:
            return not mode & os.X_OK or bool(attr.st_mode & 0o111)
        if ctx.uid == attr.st_uid:
            granted = attr.st_mode >> 6
        elif attr.st_gid == ctx.gid or attr.st_gid in pyfuse3.get_sup_groups(ctx.pid):
            granted = attr.st_mode >> 3
        else:
            granted = attr.st_mode
        return not mode & ~granted & 0o7

    # -- shared pieces ------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _using(self, node: int) -> AsyncIterator[Inode]:
        """An inode whose descriptor is there, and stays, for the length of the block."""
        inode = self._inodes[node]
        with self._inodes.using(inode):
            if inode.fd < 0:
                await self._unpark(inode)
            yield inode

    @contextlib.asynccontextmanager
    async def _changing_names(self, parent_node: int, name: bytes) -> AsyncIterator[Inode]:
        """A directory in which ``name`` is about to change."""
        if parent_node == ROOT and name == CONTROL_NAME:
            raise FUSEError(errno.EPERM)
        if self._control.node(parent_node) is not None:
            raise FUSEError(errno.EPERM)
        namespace.forbid_slash(name)
        async with self._using(parent_node) as parent:
            yield parent

    async def _unpark(self, inode: Inode, depth: int = 0) -> None:
        """Give a parked inode a descriptor again. Raises StaleError, OSError."""
        parent = inode.parent
        by_place = parent is not None and parent.nlookup > 0 and depth < MAX_DEPTH
        if by_place and parent is not None and parent.fd >= 0:
            with contextlib.suppress(FileNotFoundError):  # moved: the handle may still find it
                at_place = namespace.lookup_cached(parent.fd, inode.name)
                if at_place is not None and is_parked(inode, at_place.fd, at_place.stat):
                    self._inodes.unpark(inode, at_place.fd)
                    return
                if at_place is not None:
                    os.close(at_place.fd)
        try:
            mount_fd = self._inodes.mount_fd(inode.device)
            fd = await self._run(open_parked, inode, mount_fd, -1)
        except StaleError:
            if not by_place or parent is None:
                raise
            if parent.fd < 0:
                await self._unpark(parent, depth + 1)
            with self._inodes.using(parent):
                fd = await self._run(open_parked, inode, -1, parent.fd)
        self._inodes.unpark(inode, fd)

    async def _look_up(self, parent: Inode, name: bytes) -> EntryAttributes:
        before = self._services.before()
        opened = namespace.lookup_cached(parent.fd, name)
        if opened is None:
            opened = await self._retry_emfile(self._run, namespace.lookup, parent.fd, name)
        inode = self._inodes.looked_up(opened.fd, opened.stat, parent, name)
        self._observe(inode, opened.stat, before)
        self._ask_to_forget()
        return self._attributes(inode, opened.stat)

    async def _make(
        self,
        parent_node: int,
        name: bytes,
        mode: int,
        rdev: int,
        target: bytes,
        ctx: RequestContext,
    ) -> EntryAttributes:
        async with self._changing_names(parent_node, name) as parent:
            made = await self._retry_emfile(
                self._run,
                namespace.make_node,
                parent.fd,
                name,
                mode,
                rdev,
                target,
                Owner(ctx.uid, ctx.gid),
            )
            inode = self._inodes.looked_up(made.fd, made.stat, parent, name)
            return self._attributes(inode, made.stat)

    async def _stat(self, inode: Inode) -> os.stat_result:
        """Attributes now, held against what is known."""
        before = self._services.before()
        st = await self._near(inode, os.fstat, inode.fd)
        self._observe(inode, st, before)
        return st

    def _observe(self, inode: Inode, st: os.stat_result, before: Before) -> None:
        """A stat taken since ``before``: if the source changed, flush, and tell the kernel."""
        if inode.file_key is not None:
            file = self._services.pagecache.known(inode.file_key)
            if file is not None and self._services.coherency.on_refresh(
                file, self._fingerprint(st, before), before.clock
            ):
                self._services.notifier.inode(inode.node)

    def _fingerprint(self, st: os.stat_result, before: Before) -> Fingerprint:
        return fingerprint(st, self._services.types[st.st_dev], before.now_ns)

    async def _known_file(self, inode: Inode) -> CachedFile | None:
        """The record of a regular file, if pages of it may be cached."""
        if inode.kind != stat_module.S_IFREG:
            return None
        if inode.file_key is None:
            inode.file_key = await self._near(inode, _key_of, inode.fd)
        return self._services.pagecache.known(inode.file_key)

    async def _set_attributes(self, inode: Inode, io_fd: int, new: NewAttributes) -> os.stat_result:
        file = await self._known_file(inode)
        if file is None:
            _, after = await self._run(namespace.set_attributes, inode.fd, io_fd, new)
            return after
        pagecache = self._services.pagecache
        size = new.size
        async with pagecache.changing(file) if size is None else pagecache.mutating(file, size):
            return await self._bracketed(inode, file, namespace.set_attributes, inode.fd, io_fd, new)

    async def _change_xattr(self, node: int, name: bytes, value: bytes | None) -> None:
        if self._control.node(node) is not None:
            raise FUSEError(errno.EPERM)
        async with self._using(node) as inode:
            file = await self._known_file(inode)
            if file is None:
                await self._run(namespace.change_xattr, inode.fd, name, value)
                return
            async with self._services.pagecache.changing(file):
                await self._bracketed(inode, file, namespace.change_xattr, inode.fd, name, value)

    async def _bracketed(
        self,
        inode: Inode,
        file: CachedFile,
        change: Callable[[*Ts], tuple[os.stat_result, os.stat_result]],
        *args: *Ts,
    ) -> os.stat_result:
        """A change of ours that reports attributes before and after; under the file's lock."""
        coherency = self._services.coherency
        try:
            old, new = await self._run(change, *args)
        except BaseException:
            coherency.distrust(file)  # a part of it may have been done
            raise
        if coherency.after_own_change(file, own_fingerprint(old), own_fingerprint(new)):
            self._services.notifier.inode(inode.node)
        return new

    def _name_changed(self, changed: Changed) -> None:
        """A file lost or gained a name by our hand: its ctime moved; without a name it is gone."""
        file = self._services.pagecache.known(changed.key)
        if file is None:
            return
        if changed.gone:
            self._services.pagecache.forget(file)
        else:
            self._services.coherency.after_name_change(
                file, own_fingerprint(changed.before), own_fingerprint(changed.after)
            )

    async def _open(self, inode: Inode, flags: int) -> OpenedFile:
        near = functools.partial(self._near, inode)
        return await self._retry_emfile(near, namespace.open_file, inode.path(), flags & IO_FLAGS)

    async def _opened(self, inode: Inode, opened: OpenedFile, flags: int, before: Before) -> FileInfo:
        """Make a handle of an opened file, with what coherency has to say."""
        services = self._services
        inode.file_key = opened.key
        inode.handle = opened.key.generation
        file = services.pagecache.file(opened.key)
        handle = FileHandle(services, inode, file, opened.fd, flags)
        self._inodes.opened(inode, opened.fd)
        fh = self._add(handle)
        try:
            st = opened.stat
            changed = services.coherency.on_open(file, self._fingerprint(st, before), before.clock)
            if inode.sent != (st.st_size, st.st_mtime_ns, st.st_ctime_ns):
                # Within the attribute timeout the kernel would go by an old size.
                await attributes_changed(inode.node)
                inode.sent = None
        except BaseException:
            await self._release(fh)
            raise
        return FileInfo(fh=fh, keep_cache=not changed)

    async def _truncate_open(
        self, inode: Inode, fh: FileHandleT, mode: int, ctx: RequestContext
    ) -> None:
        """The O_TRUNC of an open, which also clears the set-id bits unless root asks for it."""
        handle = self._handles[fh]
        io_fd = handle.fd if isinstance(handle, FileHandle) and handle.writable else -1
        cleared = mode & ~stat_module.S_ISUID
        if mode & stat_module.S_IXGRP:
            cleared &= ~stat_module.S_ISGID
        keep = ctx.uid == 0 or cleared == mode
        try:
            new = NewAttributes(size=0, mode=None if keep else cleared)
            await self._set_attributes(inode, io_fd, new)
        except BaseException:
            await self._release(fh)
            raise

    def _add(self, handle: Handle) -> FileHandleT:
        fh = FileHandleT(next(self._fhs))
        self._handles[fh] = handle
        return fh

    async def _release(self, fh: FileHandleT) -> None:
        handle = self._handles.pop(fh)
        if isinstance(handle, FileHandle):
            self._inodes.released(handle.inode, handle.fd)
        await handle.release()

    async def _retry_emfile(
        self,
        run: Callable[[Callable[[*Ts], T], *Ts], Awaitable[T]],
        call: Callable[[*Ts], T],
        *args: *Ts,
    ) -> T:
        """Run a call that opens something; when descriptors run out, park inodes and try again."""
        try:
            return await run(call, *args)
        except OSError as exc:
            if exc.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        self._inodes.shrink(self._inodes.stats().held // 2)
        return await run(call, *args)

    def _ask_to_forget(self) -> None:
        if self._services.notifier.pending < FORGET_BATCH:
            for parent, name in self._inodes.forgettable(FORGET_BATCH):
                self._services.notifier.entry(parent, name)

    def _attributes(self, inode: Inode, st: os.stat_result) -> EntryAttributes:
        """What the kernel is told, and may believe for the attribute timeout."""
        entry = _entry(st)
        if inode is not self._inodes.root:  # the root's node id is FUSE's, its number its own
            entry.st_ino = InodeT(inode.node)
        entry.generation = inode.generation
        entry.attr_timeout = entry.entry_timeout = self._attr_timeout
        inode.sent = (st.st_size, st.st_mtime_ns, st.st_ctime_ns)
        return entry

    def _dot_entry(self, directory: DirHandle, name: bytes) -> EntryAttributes:
        """``.`` or ``..`` in a listing; the kernel takes no reference to them."""
        if directory.inode is self._inodes.root:
            return _entry(directory.dot(b"."))  # what is above is not ours to show
        entry = _entry(directory.dot(name))
        known = self._inodes.find(directory.dot(name))
        if known is not None and known is not self._inodes.root:
            entry.st_ino = InodeT(known.node)
        return entry

    def _unknown_entry(self) -> EntryAttributes:
        """A name whose stat failed: listed, and whoever looks at it gets the error.

        It is shown as a directory, as dead mount points are what fails in practice. Its node id is
        given out once, stands for nothing, and is outdated at once.
        """
        entry = EntryAttributes()
        entry.st_ino = InodeT(self._inodes.next_dynamic())
        entry.st_mode = ModeT(stat_module.S_IFDIR)
        entry.attr_timeout = entry.entry_timeout = 0
        return entry

    def _control_entry(self, node: Node) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = InodeT(node.number)
        entry.st_mode = ModeT(node.mode)
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._control.since_ns
        entry.attr_timeout = entry.entry_timeout = 0
        return entry


def _key_of(fd: int) -> FileKey:
    return namespace.file_key(fd, os.fstat(fd))


def _entry(st: os.stat_result) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = InodeT(st.st_ino)
    entry.st_mode = ModeT(st.st_mode)
    entry.st_nlink = st.st_nlink
    entry.st_uid = st.st_uid
    entry.st_gid = st.st_gid
    entry.st_rdev = st.st_rdev
    entry.st_size = st.st_size
    entry.st_blksize = st.st_blksize
    entry.st_blocks = st.st_blocks
    entry.st_atime_ns = st.st_atime_ns
    entry.st_mtime_ns = st.st_mtime_ns
    entry.st_ctime_ns = st.st_ctime_ns
    return entry
