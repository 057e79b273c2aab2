"""The FUSE handlers: thin, with the cleancache hooks in sight.

* read: ``FileHandle.read`` -> ``PageCache.read`` -> ``get_pages``, and ``put_pages`` at eviction
* write, truncate: ``PageCache.mutating`` -> ``flush_pages`` before and after
* last unlink, rename over: ``PageCache.forget`` -> ``flush_inode``
* open, getattr, lookup: ``CoherencyChecker`` -> ``flush_inode`` if the source changed

A handler works on inodes that are held (``Tree.using``) and raises only FUSEError (``handler``).
"""

import contextlib
import errno
import functools
import logging
import math
import os
import stat as stat_module
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

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

from cleanfs.fs.control import CONTROL_NAME, Control, Node
from cleanfs.fuse.refused_replies import RefusedReplies
from cleanfs.linux import syscalls
from cleanfs.source import namespace
from cleanfs.source.caller import Caller
from cleanfs.source.errors import HalfDoneError, StaleError
from cleanfs.source.io import without_set_id
from cleanfs.source.namespace import ACCESS_ACL, Actor, NewAttributes, OpenedFile
from cleanfs.source.self_copy import forbid_self_copy, open_to_read
from cleanfs.vfs.coherency import ATTR_TIMEOUTS, Coherency
from cleanfs.vfs.export import Export
from cleanfs.vfs.handles import IO_FLAGS, Before, DirHandle, FileHandle, Handle, Services
from cleanfs.vfs.inodes import NOT_TOLD, ROOT, UNKNOWN, Inode, InodeTable, Told, access_of, stamps_of
from cleanfs.vfs.invalidate import tell
from cleanfs.vfs.open_files import LOOK_SECONDS, OpenFiles
from cleanfs.vfs.root import ACL_NAMES, Root
from cleanfs.vfs.source_watch import SourceWatch
from cleanfs.vfs.stale_names import StaleNames
from cleanfs.vfs.tree import Tree, Using

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


CAPABILITY = b"security.capability"

NOBODY_ELSE = -1
"""As an owner, for chown: no other than now. That moves ctime, and takes set-id bits away."""

DEFINITE = frozenset(
    {
        *(errno.EPERM, errno.ENOENT, errno.EACCES, errno.EEXIST, errno.EXDEV, errno.ENOTDIR),
        *(errno.EISDIR, errno.EINVAL, errno.ENOSPC, errno.EROFS, errno.EMLINK, errno.ENAMETOOLONG),
        *(errno.ENOTEMPTY, errno.EDQUOT, errno.EBUSY, errno.EOPNOTSUPP, errno.EMFILE, errno.ENFILE),
    }
)
"""Errors that say why a name was not changed. Any other leaves it open whether it was."""

DROP_SECONDS = 0.5
"""What the kernel gets to drop a file's pages after an open is answered that may not keep them. Until
then, or until what was opened is closed, no other open may; after that the kernel is told again."""

FLAGS_FOR_AN_IOCTL = os.O_RDONLY
"""With these alone, and no O_LARGEFILE, the kernel opens what is open for FS_IOC_GETFLAGS and its like
(``fuse_priv_ioctl_prepare``), once more for each call. It drops no pages then, whatever it is told
(Linux 6.18). A 32-bit program may open a file so, too."""

UNANNOUNCED_SECONDS = ATTR_TIMEOUTS[Coherency.WATCH]
"""With ``--coherency watch``, what the kernel may believe of what has no watch, at most."""


def handler(call: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The boundary: an OSError becomes its errno, a bug is logged and becomes EIO."""

    @functools.wraps(call)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await call(*args, **kwargs)
        except FUSEError:
            _gives_nothing(args[0])
            raise
        except OSError as exc:
            _gives_nothing(args[0])
            raise FUSEError(exc.errno or errno.EIO) from exc
        except Exception as exc:
            _gives_nothing(args[0])
            log.exception("%s failed", call.__name__)
            raise FUSEError(errno.EIO) from exc

    return wrapped


def _gives_nothing(filesystem: object) -> None:
    assert isinstance(filesystem, CleanFS)
    filesystem.given.hold(None)


class CleanFS(pyfuse3.Operations):
    """One mounted source."""

    enable_acl = True

    def __init__(
        self,
        services: Services,
        inodes: InodeTable,
        control: Control,
        given: RefusedReplies,
        *,
        attr_timeout: float,
        watch: SourceWatch | None = None,
    ) -> None:
        """``attr_timeout`` in seconds, for attributes and names."""
        super().__init__()
        self._services = services
        self._inodes = inodes
        self._tree = Tree(services, inodes)
        self._stale_names = StaleNames(self._tree)
        self._export = Export(services, inodes, self._tree) if inodes.exports else None
        self.supports_dot_lookup = inodes.exports
        self._root = None if services.is_local(inodes.root) else Root(inodes.root)
        self._control = control
        self.given = given
        self._tell = functools.partial(tell, services.notifier)
        self._attr_timeout = attr_timeout
        # Who asked for more than this, with changes announced, gets it where they are.
        self._patient = watch if attr_timeout > UNANNOUNCED_SECONDS else None
        self.enable_writeback_cache = services.writeback
        changes_are_told = services.coherency.mode is Coherency.WATCH
        self._open_files = OpenFiles(services, LOOK_SECONDS if changes_are_told else attr_timeout)
        self._caches_absence = services.coherency.mode is Coherency.NONE
        self._handles: dict[int, Handle] = {}
        self.writes_begun = self.writes_ended = 0
        self._dirs: dict[int, DirHandle] = {}
        self._control_dirs: dict[int, Node] = {}
        self._fhs = count(1)
        self._abandoned: list[Callable[[], Awaitable[None]]] = []
        self._news = trio.Event()
        self._entries_per_reply = 64
        """What the last full reply to a readdir took, and the one that did not fit any more."""

    @property
    def open_files(self) -> int:
        """Open files and directories of the source."""
        return len(self._handles) - self._control.open_files + len(self._dirs)

    def open_for_writing(self) -> set[int]:
        """Nodes of the files that are open for writing."""
        handles = [handle for handle in self._handles.values() if isinstance(handle, FileHandle)]
        return {handle.inode.node for handle in handles if handle.writable}

    async def keep_bounded(self) -> None:
        """The background tasks of the inode table, of open files and of the root."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._open_files.run)
            nursery.start_soon(self._tree.keep_bounded)
            nursery.start_soon(self._release_abandoned)
            if self._root is not None:
                nursery.start_soon(self._root.run)

    # -- inodes -----------------------------------------------------------------------------

    @handler
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """Find a name; the kernel gets a reference to what it finds."""
        self.given.hold(None)
        refused = self._stale_names.looking_up(ctx)
        if name in (b".", b".."):
            return await self._decode(parent_inode, is_parent=name == b"..")
        if parent_inode == ROOT and name == CONTROL_NAME:
            return self._control_entry(self._control.root)
        if (directory := self._control.node(parent_inode)) is not None:
            return self._control_entry(self._control.lookup(directory, name, ctx.pid))
        namespace.forbid_slash(name)
        async with self._tree.using(parent_inode) as parent:
            try:
                found = await self._tree.look_up(parent, name)
            except FileNotFoundError:
                if self._caches_absence:
                    self.given.hold(None)
                    return self._absent_entry()
                raise
            self._stale_names.found(found[0], ctx, refused)
            return self._new_entry(*found)

    async def _decode(self, node: InodeT, *, is_parent: bool) -> EntryAttributes:
        """An inode that the kernel has forgotten, for a file handle; or the parent of a directory."""
        if (control := self._control.node(node)) is not None and not is_parent:
            return self._control_entry(control)
        if self._export is None or control is not None:
            raise StaleError
        before = self._services.before()
        inode, st = await (self._export.find_parent if is_parent else self._export.find)(node)
        self._tree.observe(inode, st, before)
        self._tree.ask_to_forget()
        entry = self._new_entry(inode, st)
        if inode is self._inodes.root:
            # Here its number would have to be its node id: the kernel is to ask for it again.
            entry.st_ino, entry.generation, entry.attr_timeout = InodeT(ROOT), 0, 0
        return entry

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """The kernel gave up references."""
        for node, nlookup in inode_list:
            self._inodes.forget(node, nlookup)

    @handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        """Attributes, and with them a look at whether the source changed."""
        if (node := self._control.node(inode)) is not None:
            self.given.hold(None)
            self._control.refresh(node)
            return self._control_entry(node)
        if inode == ROOT and self._root is not None:
            st, fresh = await self._root.stat(self._tree.in_thread_with_retry)
            self.given.hold(functools.partial(self._inodes.root.untold, self._inodes.root.told))
            entry = self._attributes(self._inodes.root, st)
            if not fresh:
                entry.attr_timeout = 0
            return entry
        async with self._tree.using(inode) as held:
            st = await self._tree.stat(held)
            if not st.st_nlink:
                await self._recheck_removed(held, ctx)
            self.given.hold(functools.partial(held.untold, held.told))
            return self._attributes(held, st)

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
            self.given.hold(None)
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
        if isinstance(handle, FileHandle) and handle.writable:
            with handle.use:
                return await self._set_attributes(inode, handle.fd, new, ctx)
        return await self._set_attributes(inode, -1, new, ctx)

    async def _set_attributes(
        self, node: int, io_fd: int, new: NewAttributes, ctx: RequestContext
    ) -> EntryAttributes:
        """``io_fd`` is the descriptor that the caller has the file open for writing with, or -1."""
        async with self._tree.using(node) as inode:
            if io_fd < 0 and _may_be_by_name(inode, new):
                await self._stale_names.check(inode, ctx)
            if new == NewAttributes():
                st = await self._recheck_owner(inode, ctx)
                lost_capability, inode.lost_capability = inode.lost_capability, False
                if _is_before_a_write(st, Caller.of(ctx), lost_capability):
                    self.given.hold(functools.partial(inode.untold, inode.told))
                    return self._attributes(inode, st)
                new = NewAttributes(uid=NOBODY_ELSE)
            elif ctx.uid != 0:
                # Who has it open for writing may go on whatever became of the permissions.
                st = await (
                    self._recheck_owner(inode, ctx)
                    if io_fd < 0
                    else self._tree.inline_if_local(inode, os.fstat, inode.fd)
                )
                if new.size is not None and new.mode is None:
                    new = replace(new, mode=without_set_id(st, Caller.of(ctx)))
            st = await self._tree.set_attributes(inode, io_fd, new)
            self.given.hold(functools.partial(self._tell, inode, before=inode.told))
            if new.size is not None:
                inode.set_size(st.st_size)
            return self._attributes(inode, st)

    @handler
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        """Target of a symbolic link."""
        async with self._tree.using(inode) as held:
            return FileNameT(await self._tree.inline_if_local(held, namespace.read_link, held.fd))

    # -- names ------------------------------------------------------------------------------

    @handler
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """A fifo, socket, device or plain file."""
        async with self._changing_names(parent_inode, name) as parent:
            actor = self._actor(parent, ctx)
            made = await self._tree.make(parent, name, mode, rdev, b"", actor)
            return self._new_entry(*made, made=True)

    @handler
    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        """A directory."""
        async with self._changing_names(parent_inode, name) as parent:
            mode = ModeT(stat_module.S_IFDIR | mode)
            actor = self._actor(parent, ctx)
            made = await self._tree.make(parent, name, mode, 0, b"", actor)
            return self._new_entry(*made, made=True)

    @handler
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """A symbolic link."""
        async with self._changing_names(parent_inode, name) as parent:
            mode = stat_module.S_IFLNK | 0o777
            actor = self._actor(parent, ctx)
            made = await self._tree.make(parent, name, mode, 0, target, actor)
            return self._new_entry(*made, made=True)

    @handler
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        """Remove a name; the last one takes the file's pages with it."""
        async with self._changing_names(parent_inode, name) as parent:
            actor = self._actor(parent, ctx)
            changed = await self._tree.change_names(parent, actor, namespace.unlink, parent.fd, name)
            inode = self._tree.name_changed(changed, parent, name)
            self._inodes.name_gone(changed.key.device, parent, name)
            if inode is not None:
                self._inodes.lost_name(inode, parent, name)
            self.given.hold(functools.partial(self._tell, inode, gone=[(parent, name)]))

    @handler
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        """Remove a directory."""
        async with self._changing_names(parent_inode, name) as parent:
            actor = self._actor(parent, ctx)
            changed = await self._tree.change_names(parent, actor, namespace.rmdir, parent.fd, name)
            self._tree.name_changed(changed, parent, name)
            self._inodes.name_gone(changed.key.device, parent, name)
            self.given.hold(functools.partial(self._tell, gone=[(parent, name)]))

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
        # Both before the first wait, in which the kernel may forget one whose program is gone.
        using_old = self._changing_names(parent_inode_old, name_old)
        using_new = self._changing_names(parent_inode_new, name_new)
        async with using_old as old, using_new as new:
            actor = self._actor(old, ctx)
            where = new if self._services.is_local(old) else old
            done = await self._tree.change_names(
                where, actor, namespace.rename, old.fd, name_old, new.fd, name_new, flags
            )
            inode = self._tree.name_changed(done.moved, old, name_old)
            there, gone, replaced = [(new, name_new)], [(old, name_old)], None
            moved_directory = stat_module.S_ISDIR(done.moved.before.st_mode)
            if moved_directory or flags & (pyfuse3.RENAME_EXCHANGE | syscalls.RENAME_WHITEOUT):
                there, gone = there + gone, []  # for the kernel a directory is still there, in use
            if done.replaced is not None:
                replaced = self._tree.name_changed(done.replaced, new, name_new)
            self._inodes.name_gone(done.moved.key.device, old, name_old)
            self._inodes.name_gone(done.moved.key.device, new, name_new)
            if inode is not None:
                self._inodes.moved(inode, new, name_new)
            if replaced is not None:
                if flags & pyfuse3.RENAME_EXCHANGE:
                    self._inodes.moved(replaced, old, name_old)
                else:
                    self._inodes.lost_name(replaced, new, name_new)
            self.given.hold(functools.partial(self._tell, inode, replaced, there=there, gone=gone))

    @handler
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """One more name for a file."""
        if self._control.node(inode) is not None:
            raise FUSEError(errno.EPERM)
        using, using_parent = (
            self._tree.using(inode),
            self._changing_names(new_parent_inode, new_name),
        )
        async with using as held, using_parent as parent:
            await self._stale_names.check(held, ctx)
            where = parent if self._services.is_local(held) else held
            linked = self._tree.run_on_names(where, namespace.link, held.fd, parent.fd, new_name)
            self._tree.name_changed(await linked, parent, new_name)
            self._inodes.name_gone(parent.device, parent, new_name)
            return self._new_entry(*await self._tree.look_up(parent, new_name), made=True)

    # -- files ------------------------------------------------------------------------------

    @handler
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        """Open a file; if the source changed, every cache of it is flushed, the kernel's too."""
        self.given.hold(None)
        if (node := self._control.node(inode)) is not None:
            fh = self._add(self._control.open(node, flags))
            self.given.hold(functools.partial(self._not_opened, fh))
            return FileInfo(fh=fh, direct_io=True, keep_cache=False)
        self._inodes.check_may_open()
        async with self._tree.using(inode) as held:
            before = self._services.before()
            opened = await self._tree.open(held, flags)
            await self._recheck_opened(held, opened.fd, opened.stat, ctx, truncates=flags & os.O_TRUNC)
            info = await self._opened(held, opened, flags & ~os.O_TRUNC, before)
            told = held.told
            if flags & os.O_TRUNC:
                await self._truncate_open(held, info.fh, opened.stat, ctx)
            changed = held if flags & os.O_TRUNC or not info.keep_cache else None
            self.given.hold(functools.partial(self._not_opened, info.fh, changed, told))
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
        self._inodes.check_may_open()
        async with self._changing_names(parent_inode, name) as parent:
            before = self._services.before()
            io_flags = flags & (IO_FLAGS | os.O_EXCL | os.O_TRUNC)
            actor = self._actor(parent, ctx)
            opened, inode, st = await self._tree.create(parent, name, mode, io_flags, actor)
            with self._inodes.using(inode):
                told = inode.told
                entry = self._attributes(inode, st)
                info = await self._opened(inode, opened, flags, before)
                self.given.hold(functools.partial(self._not_created, info.fh, inode, told))
                return info, entry

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
        self.writes_begun += 1
        try:
            written, rollback = await self._handles[fh].write(off, buf)
            self.given.hold(rollback)
            return written
        finally:
            self.writes_ended += 1

    @handler
    async def flush(self, fh: FileHandleT) -> None:
        """A descriptor was closed: report what the source has to say.

        Where it never has anything to say, the first time is the last: ENOSYS tells the kernel not
        to ask again. It takes that for success.
        """
        if self._services.flushless:
            raise FUSEError(errno.ENOSYS)
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
        self.given.hold(None)
        fh = next(self._fhs)
        if (node := self._control.node(inode)) is not None:
            self._control_dirs[fh] = node
            return FileHandleT(fh)
        self._inodes.check_may_open()
        async with self._tree.using(inode) as held:
            fd = await self._tree.open_directory(held)
            try:
                st = await self._services.inline_if_local(held, os.fstat, fd)
            except BaseException:
                await self._tree.close(held, fd)
                raise
            await self._recheck_opened(held, fd, st, ctx)
            self._dirs[fh] = DirHandle(self._services, held, fd, handles=self._inodes.exports)
            self._inodes.opened(held, fd)
            self.given.hold(functools.partial(self._not_opened, FileHandleT(fh)))
        return FileHandleT(fh)

    @handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        """List from a position on; every entry carries its attributes."""
        self.given.hold(None)
        if (node := self._control_dirs.get(fh)) is not None:
            for position, (child_name, child) in enumerate(node.children[start_id:], start_id + 1):
                entry = self._control_entry(self._control.show(child))
                if not pyfuse3.readdir_reply(token, FileNameT(child_name), entry, position):
                    break
            return
        directory = self._dirs[fh]
        with directory.use:
            await self._list(directory, start_id, token)

    async def _list(self, directory: DirHandle, start_id: int, token: ReaddirToken) -> None:
        directory.batch = self._entries_per_reply
        if start_id == 0:
            await directory.rewind()
        else:
            directory.forget_stats()
        for position, name in ((0, b"."), (1, b"..")):
            if start_id <= position and not pyfuse3.readdir_reply(
                token, FileNameT(name), self._dot_entry(directory, name), position + 1
            ):
                self.given.hold(None)
                return
        position = max(start_id, 2)
        listed: list[tuple[Inode, Told]] = []
        while (found := await directory.entry(position - 2)) is not None:
            name, listing = found
            position += 1
            if listing is None or (directory.inode is self._inodes.root and name == CONTROL_NAME):
                continue
            if isinstance(listing, OSError):
                if not pyfuse3.readdir_reply(token, FileNameT(name), self._unknown_entry(), position):
                    self._entries_per_reply = position - max(start_id, 2)
                    break
                continue
            st = listing.stat
            linked = await self._find_link(directory, name) if self._inodes.may_be_link(st) else None
            if linked is not None:
                inode, st = linked
            else:
                inode = self._inodes.listed(st, directory.inode, name, listing.handle)
                self._tree.observe(inode, st, directory.before)
                self._inodes.referenced(inode, st, directory.inode, name)
            told = inode.told
            if not pyfuse3.readdir_reply(token, FileNameT(name), self._attributes(inode, st), position):
                inode.kernel_sizes, inode.access, inode.access_ctime = told  # it was not told
                self._inodes.forget(inode.node, 1)
                self._entries_per_reply = position - max(start_id, 2)
                break
            listed.append((inode, told))
        for inode, _ in listed:
            await self._tree.nothing_to_drop(inode)
        self.given.hold(functools.partial(self._not_listed, listed))
        self._tree.ask_to_forget()

    async def _find_link(
        self, directory: DirHandle, name: bytes
    ) -> tuple[Inode, os.stat_result] | None:
        """Look up a listed file that may have an inode by another name: its number does not tell."""
        with contextlib.suppress(OSError):
            async with Using(self._tree, directory.inode) as parent:
                return await self._tree.look_up(parent, name)
        return None

    @handler
    async def releasedir(self, fh: FileHandleT) -> None:
        """Close a directory."""
        self._control_dirs.pop(fh, None)
        directory = self._dirs.pop(fh, None)
        if directory is not None:
            with self._inodes.closing(directory.inode, directory.fd):
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
        if self._root is not None:
            st = await self._root.statfs(self._tree.in_thread_with_retry)
        else:
            st = await self._tree.in_thread_with_retry(os.statvfs, self._inodes.root.path())
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
        if self._control.node(inode) is not None:
            raise FUSEError(errno.EPERM)
        async with self._tree.using(inode) as held:
            if not held.open_fds:  # else it may be by a descriptor
                await self._stale_names.check(held, ctx)
            await self._may_change_xattr(held, name, ctx)
            caller = Caller.of(ctx) if name == ACCESS_ACL else None
            await self._tree.change_xattr(held, name, value, caller)
            self.given.hold(functools.partial(self._tell, held))

    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        """Value of an extended attribute, or ENODATA.

        The kernel asks for CAPABILITY before a write (see ``handshake``). A file that is open has
        a descriptor to ask at once; what went wrong is left to the long way.
        """
        held = self._inodes.get(inode) if name == CAPABILITY else None
        if held is not None and ctx.uid:
            # Root's question does not take the place of a user's: in doubt the bits go.
            held.asked_for = Caller.of(ctx)
        if held is not None and held.open_fds and self._services.is_local(held):
            self.given.hold(None)
            try:
                return os.getxattr(held.open_fds[-1], name)
            except OSError as exc:
                if exc.errno == errno.ENODATA:
                    raise FUSEError(pyfuse3.ENOATTR) from None
        return await self._getxattr(inode, name, ctx)

    @handler
    async def _getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        if self._control.node(inode) is not None:
            raise FUSEError(pyfuse3.ENOATTR)
        if inode == ROOT and self._root is not None and name in ACL_NAMES:
            acl = await self._root.acl(self._tree.in_thread_with_retry, name)
            self.given.hold(None)
            return acl
        async with self._tree.using(inode) as held:
            acl_before = held.acl
            if name == ACCESS_ACL:
                held.acl = b""
            try:
                value = await self._tree.inline_if_local(held, os.getxattr, held.path(), name)
            except OSError as exc:
                # A source without ACLs has none: the kernel, which looks for one before it lets
                # anybody in, takes any other error for its answer.
                if exc.errno == errno.EOPNOTSUPP and name in ACL_NAMES:
                    raise FUSEError(pyfuse3.ENOATTR) from exc
                raise
            self.given.hold(None)
            if name == ACCESS_ACL:
                held.acl = value
                if value != acl_before:
                    self.given.hold(functools.partial(held.untold, UNKNOWN))
            return value

    @handler
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        """Names of the extended attributes."""
        if self._control.node(inode) is not None:
            return []
        async with self._tree.using(inode) as held:
            names = await self._tree.inline_if_local(held, namespace.list_xattrs, held.path())
            # The daemon may see more than the caller would on the source itself.
            return [XAttrNameT(n) for n in names if ctx.uid == 0 or not n.startswith(b"trusted.")]

    @handler
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        """Remove an extended attribute, or ENODATA."""
        if self._control.node(inode) is not None:
            raise FUSEError(errno.EPERM)
        async with self._tree.using(inode) as held:
            if not held.open_fds:  # else it may be by a descriptor
                await self._stale_names.check(held, ctx)
            await self._may_change_xattr(held, name, ctx)
            await self._tree.change_xattr(held, name, None)
            held.lost_capability = name == CAPABILITY
            self.given.hold(functools.partial(self._tell, held))

    async def _may_change_xattr(self, inode: Inode, name: bytes, ctx: RequestContext) -> None:
        """Raises PermissionError, StaleError.

        The kernel checks ``user``, ``trusted``, ``security`` and POSIX ACLs. What else is ``system`` it
        leaves to file systems: there are ACLs of NFS, CIFS and NTFS. The source would ask us for it.
        """
        st = await self._recheck_owner(inode, ctx)
        if name.startswith(b"system.") and name not in ACL_NAMES and ctx.uid not in (0, st.st_uid):
            try:
                await self._tree.inline_if_local(inode, os.getxattr, inode.path(), name)
            except OSError as exc:
                if exc.errno == errno.EOPNOTSUPP:  # where there are none, that comes first
                    raise
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

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

    def _changing_names(self, parent_node: int, name: bytes) -> "_ChangingNames":
        """A directory in which ``name`` is about to change."""
        if parent_node == ROOT and name == CONTROL_NAME:
            raise FUSEError(errno.EPERM)
        if self._control.node(parent_node) is not None:
            raise FUSEError(errno.EPERM)
        namespace.forbid_slash(name)
        return _ChangingNames(self._tree, self._inodes[parent_node], name)

    def _actor(self, parent: Inode, ctx: RequestContext) -> Actor:
        return Actor(ctx.uid, ctx.gid, ctx.umask, local=self._services.is_local(parent))

    async def _opened(self, inode: Inode, opened: OpenedFile, flags: int, before: Before) -> FileInfo:
        """Make a handle of an opened file, with what coherency has to say."""
        services = self._services
        inode.file_key = opened.key
        if inode.dentry is None:
            inode.handle = opened.key.generation
        file = services.pagecache.file(opened.key, inode.dentry)
        handle = FileHandle(services, inode, file, opened.fd, flags)
        self._inodes.opened(inode, opened.fd)
        fh = self._add(handle)
        try:
            st = opened.stat
            changed = services.coherency.on_open(file, self._tree.fingerprint(st, before), before.clock)
            outdated = changed
            if changed and flags == FLAGS_FOR_AN_IOCTL:
                services.notifier.inode(inode.node)
                changed = False
            if changed:
                handle.drops_pages()
                inode.dropped_for = handle
                inode.pages_dropped_by = math.inf  # by no other open before this one is answered
            now = stamps_of(st)
            if inode.sent != now:
                inode.sent = now
                inode.doubts += 1
                if outdated and services.notifier.explicit:
                    services.notifier.inode(inode.node)  # before anybody is told of another size
            if services.coherency.mode is not Coherency.NONE:  # else the kernel knows all changes
                self._open_files.opened(inode)
                await self._settle_doubts(inode, outdated)
        except BaseException:
            if inode.dropped_for is handle:
                services.notifier.inode(inode.node)
            await self._release(fh)
            raise
        moment = trio.current_time()
        if inode.dropped_for is handle:
            inode.pages_dropped_by = moment + DROP_SECONDS
        drops = changed or moment < inode.pages_dropped_by
        if inode.dropped_for is not None and not drops:
            services.notifier.inode(inode.node)  # who opened it may still not have got to run
            inode.dropped_for = None
        drops = drops or services.notifier.is_pending(inode.node)
        if drops:
            handle.drops_pages()
        handle.may_write()
        return FileInfo(fh=fh, direct_io=opened.direct, keep_cache=not drops)

    async def _recheck_opened(
        self,
        inode: Inode,
        fd: int,
        st: os.stat_result,
        ctx: RequestContext,
        *,
        truncates: int = 0,
    ) -> None:
        """Whether what was opened is what the caller named, and may have; if not, closes ``fd``.

        Raises StaleError, OSError.
        """
        try:
            await self._stale_names.check(inode, ctx)
            await self._recheck_access(inode, fd, st, ctx)
            if truncates and st.st_size and (readers := open_to_read(ctx.pid, st.st_ino)):
                await self._tree.in_thread_with_retry(forbid_self_copy, readers, st)
        except BaseException:
            await self._tree.close(inode, fd)
            raise

    async def _recheck_access(
        self, inode: Inode, fd: int, st: os.stat_result, ctx: RequestContext
    ) -> None:
        """The caller was let in by mode, owners and ACL that the kernel was told some time ago.

        If they are others now, the kernel is to ask for them and to check again: raises StaleError.
        ctime moves with each of them. Root is let in anyway, and should not fail because somebody
        changes them all the time: the kernel asks again only once.
        """
        if ctx.uid == 0:
            return
        same = inode.access in (NOT_TOLD, access_of(st))
        if same and inode.access != NOT_TOLD and inode.access_ctime != st.st_ctime_ns:
            same = await self._services.inline_if_local(inode, namespace.access_acl, fd) == inode.acl
        if not same:
            await self._services.notifier.attributes_changed(inode.node)
            raise StaleError
        inode.access_ctime = st.st_ctime_ns

    async def _recheck_removed(self, inode: Inode, ctx: RequestContext) -> None:
        """Whether to give attributes of an inode without a link. Raises StaleError.

        fstat and stat ask alike. Where a descriptor may be meant (a file that is open here, or that
        was removed here, upon which the kernel forgot the name), there is an answer; the kernel is
        then made to look up the name that it may still have.
        """
        if self._services.space_retry.is_removed(inode.node):
            return
        if not inode.open_fds:
            await self._stale_names.check(inode, ctx, comes_again=False)
        elif inode.parent is not None:
            self._services.notifier.expire(inode.parent.node, inode.name)

    async def _recheck_owner(self, inode: Inode, ctx: RequestContext) -> os.stat_result:
        """The same for a change of attributes, which their owner may make: the inode's, now.

        Raises StaleError if the kernel went by others, unless the caller is the owner all the same.
        """
        st = await self._tree.inline_if_local(inode, os.fstat, inode.fd)
        if ctx.uid not in (0, st.st_uid) and inode.access not in (NOT_TOLD, access_of(st)):
            await self._services.notifier.attributes_changed(inode.node)
            raise StaleError
        return st

    async def _settle_doubts(self, inode: Inode, outdated: bool) -> None:
        """Make the kernel ask for the attributes, if it may go by old ones: for a size, above all.

        It asks before the open is answered. Left to the program's first read, another notification, or
        a write, could overtake the answer; then the kernel drops it, and goes by the old size.

        ``outdated`` says that its pages are: those go before it knows of another size.
        """
        pages = outdated and self._services.notifier.explicit
        known = inode.doubts  # those that come meanwhile are for later opens
        while inode.doubts_settled < known:
            if inode.settling is not None:
                await inode.settling.wait()
                continue
            inode.settling = settled = trio.Event()
            doubts = inode.doubts
            try:
                await self._services.notifier.refreshed(inode.node, inode.generation, pages=pages)
                inode.doubts_settled = doubts
            finally:
                inode.settling = None
                settled.set()

    async def _truncate_open(
        self, inode: Inode, fh: FileHandleT, st: os.stat_result, ctx: RequestContext
    ) -> None:
        """The O_TRUNC of an open, which also clears the set-id bits unless root asks for it."""
        handle = self._handles[fh]
        assert isinstance(handle, FileHandle)
        handle.drops_pages()
        io_fd = handle.fd if handle.writable else -1
        cleared = without_set_id(st, Caller.of(ctx))
        try:
            new = NewAttributes(size=0, mode=cleared)
            inode.sent = stamps_of(await self._tree.set_attributes(inode, io_fd, new))
            inode.set_size(0)
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
            with self._inodes.closing(handle.inode, handle.fd):
                self._open_files.closed(handle.inode)
                await handle.release()
        else:
            await handle.release()

    def _not_opened(
        self, fh: FileHandleT, changed: Inode | None = None, told: Told | None = None
    ) -> None:
        """The kernel was not told of an open file, nor of a change that came or was found with it."""
        self._tell(changed, before=told)
        release = self.releasedir if fh in self._dirs else self.release
        self._abandoned.append(functools.partial(release, fh))
        self._news.set()

    def _not_created(self, fh: FileHandleT, inode: Inode, told: Told) -> None:
        """Nor of the file's being there."""
        self._not_opened(fh)
        self._not_made(inode, told)

    def _not_made(self, inode: Inode, told: Told) -> None:
        """The kernel was not told of what was made, and has no reference to it."""
        place = [(inode.parent, inode.name)] if inode.parent is not None else []
        self._tell(inode, before=told, there=place)
        self._inodes.forget(inode.node, 1)

    def _not_found(self, inode: Inode, told: Told) -> None:
        """The kernel was not told what was found, and has no reference to it."""
        inode.untold(told)
        self._inodes.forget(inode.node, 1)

    def _not_listed(self, listed: list[tuple[Inode, Told]]) -> None:
        """Nor what was listed, some of it perhaps by two names."""
        for inode, told in reversed(listed):
            self._not_found(inode, told)

    async def _release_abandoned(self) -> None:
        """The background task of what was opened for programs that are gone."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._news.wait()
                self._news = trio.Event()
                while self._abandoned:
                    nursery.start_soon(_quietly, self._abandoned.pop())

    def _new_entry(self, inode: Inode, st: os.stat_result, made: bool = False) -> EntryAttributes:
        """An entry to which the kernel gets a reference; it was made, or found."""
        unheard = self._not_made if made else self._not_found
        self.given.hold(functools.partial(unheard, inode, inode.told))
        return self._attributes(inode, st)

    def _attributes(self, inode: Inode, st: os.stat_result) -> EntryAttributes:
        """What the kernel is told, and may believe for the attribute timeout."""
        entry = _entry(st)
        if inode is not self._inodes.root:  # the root's node id is FUSE's, its number its own
            entry.st_ino = InodeT(inode.node)
        entry.generation = inode.generation
        entry.attr_timeout = entry.entry_timeout = self._attr_timeout
        if self._patient is not None:
            entry.attr_timeout, entry.entry_timeout = self._timeouts(inode)
        now = stamps_of(st)
        if inode.sent not in (None, now):
            inode.doubts += 1
        inode.sent = now
        inode.access, inode.access_ctime = access_of(st), st.st_ctime_ns
        inode.told_size(st.st_size)
        return entry

    def _timeouts(self, inode: Inode) -> tuple[float, float]:
        """Of attributes and of the name: as long as was asked for, if changes are announced."""
        assert self._patient is not None
        own = self._attr_timeout if self._patient.announces(inode) else UNANNOUNCED_SECONDS
        where = inode.parent or inode
        name = self._attr_timeout if self._patient.announces(where) else UNANNOUNCED_SECONDS
        return own, name

    def _dot_entry(self, directory: DirHandle, name: bytes) -> EntryAttributes:
        """``.`` or ``..`` in a listing; the kernel takes no reference to them."""
        if directory.inode is self._inodes.root:
            return _entry(directory.dot(b"."))  # what is above is not ours to show
        entry = _entry(directory.dot(name))
        known = self._inodes.find(directory.dot(name))
        if directory.inode.dentry is not None:
            known = directory.inode if name == b"." else directory.inode.parent
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

    def _absent_entry(self) -> EntryAttributes:
        """There is no such name, and the kernel may believe that as long as it does any other.

        It forgets by itself when the name is made through the mount.
        """
        entry = EntryAttributes()
        entry.st_ino = InodeT(0)
        entry.attr_timeout, entry.entry_timeout = 0, self._attr_timeout
        return entry

    def _control_entry(self, node: Node) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = InodeT(node.number)
        entry.st_mode = ModeT(node.mode)
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.st_size = len(node.text)
        entry.st_blocks = -(-len(node.text) // 512)  # none at all would be a file that is one hole
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = node.made_ns
        entry.attr_timeout = entry.entry_timeout = 0
        return entry


async def _quietly(call: Callable[[], Awaitable[None]]) -> None:
    with contextlib.suppress(FUSEError):
        await call()


def _may_be_by_name(inode: Inode, new: NewAttributes) -> bool:
    """Whether a setattr that names no open file is by a path, so that the kernel can begin it again.

    ftruncate names its file. fchmod and its like do not, so they can only be told apart where no file
    is open. Times alone may be the kernel's own, which sets them late (``--writeback``).
    """
    if new.size is not None:
        return True
    return not inode.open_fds and (new.mode, new.uid, new.gid) != (None, None, None)


def _is_before_a_write(st: os.stat_result, caller: Caller, lost_capability: bool) -> bool:
    """Whether a setattr of no attribute says only that a write comes, which will take set-id bits away.

    The kernel sends one then, and also for a chown to nobody else. A user can chown such a file only
    if it is an own one; and there is no harm if an owner's bits go a moment before the write. Root's
    write leaves set-id bits alone: it is told of only after it has taken a capability away.
    """
    if caller.privileged:
        return lost_capability
    return caller.uid != st.st_uid and without_set_id(st, caller) is not None


class _ChangingNames(Using):
    """``CleanFS._changing_names``. After an error that leaves it open, the kernel looks the name up."""

    __slots__ = ("_name",)

    def __init__(self, tree: Tree, parent: Inode, name: bytes) -> None:
        super().__init__(tree, parent)
        self._name = name

    async def __aexit__(self, *exc: object) -> None:
        error, notifier = exc[1], self._tree.services.notifier
        if isinstance(error, HalfDoneError) or (
            isinstance(error, OSError) and error.errno not in DEFINITE
        ):
            self._tree.inodes.name_gone(self._inode.device, self._inode, self._name)
            notifier.entry(self._inode.node, self._name)
            notifier.inode(self._inode.node)
        await super().__aexit__(*exc)


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
