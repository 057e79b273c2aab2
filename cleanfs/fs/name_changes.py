"""Change names, and record each change; after an uncertain one, make the kernel look the name up."""

import errno
import os
import stat as stat_module
from dataclasses import dataclass
from typing import Final

import pyfuse3
from pyfuse3 import FUSEError, RequestContext

from cleanfs.backends.ops import FileKey
from cleanfs.cache.fingerprint import Fingerprint
from cleanfs.cache.state import Stamps
from cleanfs.fs.control import CONTROL_NAME, Control
from cleanfs.linux import syscalls
from cleanfs.source import file_handles, namespace
from cleanfs.source.errors import HalfDoneError
from cleanfs.source.namespace import Renamed
from cleanfs.vfs.handles import Services
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.invalidate import Place
from cleanfs.vfs.node_ids import ROOT
from cleanfs.vfs.stale_names import StaleNames
from cleanfs.vfs.tree import Tree, Using

DEFINITE: Final = frozenset(
    {
        *(errno.EPERM, errno.ENOENT, errno.EACCES, errno.EEXIST, errno.EXDEV, errno.ENOTDIR),
        *(errno.EISDIR, errno.EINVAL, errno.ENOSPC, errno.EROFS, errno.EMLINK, errno.ENAMETOOLONG),
        *(errno.ENOTEMPTY, errno.EDQUOT, errno.EBUSY, errno.EOPNOTSUPP, errno.EMFILE, errno.ENFILE),
    }
)
"""Errors that say that a name was not changed. After any other error it may have been."""


@dataclass(frozen=True, slots=True)
class NameChange:
    """Says what a change of names did."""

    inodes: tuple[Inode | None, ...] = ()
    """The inodes whose link count or ctime it moved; None for one that is not in the table."""
    there: tuple[Place, ...] = ()
    """Names that lead elsewhere now, or are in use."""
    gone: tuple[Place, ...] = ()


class NameChanges:
    """Changes names in one mount."""

    def __init__(
        self,
        services: Services,
        inodes: InodeTable,
        tree: Tree,
        stale_names: StaleNames,
        control: Control,
    ) -> None:
        """Refuse to change the names of ``control``."""
        self._services = services
        self._inodes = inodes
        self._tree = tree
        self._stale_names = stale_names
        self._control = control

    def changing(self, parent_node: int, name: bytes) -> "ChangingName":
        """Hold a directory in which ``name`` is about to change. Raises FUSEError, OSError."""
        if parent_node == ROOT and name == CONTROL_NAME:
            raise FUSEError(errno.EPERM)
        if self._control.node(parent_node) is not None:
            raise FUSEError(errno.EPERM)
        namespace.forbid_slash(name)
        return ChangingName(self._tree, self._inodes[parent_node], name)

    async def make(
        self,
        parent_node: int,
        name: bytes,
        mode: int,
        ctx: RequestContext,
        *,
        rdev: int = 0,
        target: bytes = b"",
    ) -> tuple[Inode, os.stat_result]:
        """Make a directory, symbolic link or special file: its inode, with a kernel reference."""
        async with self.changing(parent_node, name) as parent:
            actor = self._tree.actor(parent, ctx)
            return await self._tree.make(parent, name, mode, rdev, target, actor)

    async def unlink(self, parent_node: int, name: bytes, ctx: RequestContext) -> NameChange:
        """Remove a name of a file."""
        async with self.changing(parent_node, name) as parent:
            actor, unlink = self._tree.actor(parent, ctx), namespace.unlink
            changed = await self._tree.change_names(parent, actor, unlink, parent.fd, name)
            inode = self._tree.name_changed(changed, parent, name)
            self._name_gone(changed.key.device, inode, parent, name)
            return NameChange((inode,), gone=((parent, name),))

    def unlinked(
        self,
        parent_node: int,
        name: bytes,
        node: int,
        fd: int,
        before: Stamps,
        after: Stamps | None,
        gone: bool,
    ) -> None:
        """Record what ``unlink`` would (``fuse.calls``)."""
        parent, inode = self._inodes[parent_node], self._inodes[node]
        key = inode.file_key or FileKey(inode.device, inode.ino, file_handles.name_to_handle(fd))
        after_it = None if after is None else Fingerprint(*after, racy=True)
        self._tree.note_name_change(inode, key, Fingerprint(*before, racy=True), after_it, gone=gone)
        self._name_gone(inode.device, inode, parent, name)

    def unlink_of(self, parent_node: int, name: bytes, node: int) -> NameChange:
        """Return what an unlink did that was recorded before."""
        return NameChange((self._inodes[node],), gone=((self._inodes[parent_node], name),))

    def _name_gone(self, device: int, inode: Inode | None, parent: Inode, name: bytes) -> None:
        self._inodes.name_gone(device, parent, name)
        if inode is not None:
            self._inodes.lost_name(inode, parent, name)

    async def rmdir(self, parent_node: int, name: bytes, ctx: RequestContext) -> NameChange:
        """Remove a directory."""
        async with self.changing(parent_node, name) as parent:
            actor, rmdir = self._tree.actor(parent, ctx), namespace.rmdir
            changed = await self._tree.change_names(parent, actor, rmdir, parent.fd, name)
            self._tree.name_changed(changed, parent, name)
            self._inodes.name_gone(changed.key.device, parent, name)
            return NameChange(gone=((parent, name),))

    async def rename(
        self, old: tuple[int, bytes], new: tuple[int, bytes], flags: int, ctx: RequestContext
    ) -> NameChange:
        """Rename what is at ``old``, a parent's node and a name, to ``new``."""
        (_, old_name), (_, new_name) = old, new
        # Look up both before the first wait, during which the kernel may forget either inode if the
        # requester is gone.
        using_old, using_new = self.changing(*old), self.changing(*new)
        async with using_old as old_parent, using_new as new_parent:
            actor, rename = self._tree.actor(old_parent, ctx), namespace.rename
            where = new_parent if self._services.is_local(old_parent) else old_parent
            names = old_parent.fd, old_name, new_parent.fd, new_name
            done = await self._tree.change_names(where, actor, rename, *names, flags)
            return self._renamed(done, (old_parent, old_name), (new_parent, new_name), flags)

    def _renamed(self, done: Renamed, old: Place, new: Place, flags: int) -> NameChange:
        exchanged = flags & pyfuse3.RENAME_EXCHANGE
        moved, replaced = self._tree.name_changed(done.moved, *old), None
        if done.replaced is not None:
            replaced = self._tree.name_changed(done.replaced, *new)
        self._inodes.name_gone(done.moved.key.device, *old)
        self._inodes.name_gone(done.moved.key.device, *new)
        if moved is not None:
            self._inodes.moved(moved, *new)
        if replaced is not None and exchanged:
            self._inodes.moved(replaced, *old)
        elif replaced is not None:
            self._inodes.lost_name(replaced, *new)
        # The kernel may still use the directory by its old name, so that name only expires.
        is_dir = stat_module.S_ISDIR(done.moved.before.st_mode)
        if is_dir or exchanged or flags & syscalls.RENAME_WHITEOUT:
            return NameChange((moved, replaced), there=(new, old))
        return NameChange((moved, replaced), there=(new,), gone=(old,))

    async def link(
        self, node: int, parent_node: int, name: bytes, ctx: RequestContext
    ) -> tuple[Inode, os.stat_result]:
        """Give a file one more name: its inode, with one more kernel reference."""
        if self._control.node(node) is not None:
            raise FUSEError(errno.EPERM)
        using, using_parent = self._tree.using(node), self.changing(parent_node, name)
        async with using as inode, using_parent as parent:
            await self._stale_names.check(inode, ctx)
            where = parent if self._services.is_local(inode) else inode
            linked = self._tree.run_on_names(where, namespace.link, inode.fd, parent.fd, name)
            self._tree.name_changed(await linked, parent, name)
            self._services.space_retry.named(inode.node)
            self._inodes.name_gone(parent.device, parent, name)
            return await self._tree.look_up(parent, name)


class ChangingName(Using):
    """Implements ``NameChanges.changing``.

    After an error that leaves the outcome open, the kernel must look the name up.
    """

    __slots__ = ("_name",)

    def __init__(self, tree: Tree, parent: Inode, name: bytes) -> None:
        """Prepare the block."""
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
