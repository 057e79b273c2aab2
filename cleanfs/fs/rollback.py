"""Undo what a reply gave if the kernel refuses the reply because the requester is gone.

A handler calls one of these methods last, right before it returns (``request.on_refusal``). The call
says what the reply gives: a kernel reference, an open file, news of a change. If the reply is refused,
that is taken back, or the kernel is told by notifications.
"""

import functools

from pyfuse3 import FileHandleT

from cleanfs.fs.handle_table import HandleTable
from cleanfs.fs.name_changes import NameChange
from cleanfs.fuse.notify import Notifier
from cleanfs.fuse.request import on_refusal
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.invalidate import invalidate
from cleanfs.vfs.kernel_view import UNKNOWN, Told


class ReplyRollback:
    """Registers the undo action of each reply of one mount's handlers."""

    def __init__(self, notifier: Notifier, inodes: InodeTable, handles: HandleTable) -> None:
        """Undo in these tables, and by notifications."""
        self._invalidate = functools.partial(invalidate, notifier)
        self._inodes = inodes
        self._handles = handles

    def attributes(self, inode: Inode) -> None:
        """Register the undo of attributes. Call this before they are recorded as told."""
        on_refusal(functools.partial(inode.kernel.rollback, inode.kernel.told))

    def acl(self, inode: Inode) -> None:
        """Register the undo of an access ACL that is not the one told before."""
        on_refusal(functools.partial(inode.kernel.rollback, UNKNOWN))

    def change(self, inode: Inode, before: Told | None = None) -> None:
        """Register the undo of news that an inode changed (see ``invalidate``)."""
        on_refusal(functools.partial(self._invalidate, inode, before=before))

    def undo_change(self, inode: Inode, before: Told) -> None:
        """Undo news that an inode changed, as the reply was refused."""
        self._invalidate(inode, before=before)

    def names(self, change: NameChange) -> None:
        """Register the undo of news that names changed."""
        on_refusal(functools.partial(self.undo_names, change))

    def undo_names(self, change: NameChange) -> None:
        """Undo news that names changed, as the reply was refused."""
        self._invalidate(*change.inodes, there=change.there, gone=change.gone)

    def found(self, inode: Inode) -> None:
        """Register the undo of a reference to an inode that was found, and of its attributes."""
        on_refusal(functools.partial(self._not_found, inode, inode.kernel.told))

    def made(self, inode: Inode) -> None:
        """Register the undo of a reference to an inode that was made, and of its attributes."""
        on_refusal(functools.partial(self.undo_made, inode, inode.kernel.told))

    def listed(self, listed: list[tuple[Inode, Told]]) -> None:
        """Register the undo of references to inodes; with each is what was told of it before."""
        on_refusal(functools.partial(self._not_listed, listed))

    def opened(self, fh: FileHandleT, changed: Inode | None = None, before: Told | None = None) -> None:
        """Register the undo of an open file, and of news of a change that the open made or found."""
        on_refusal(functools.partial(self._not_opened, fh, changed, before))

    def created(self, fh: FileHandleT, inode: Inode, before: Told) -> None:
        """Register the undo of a file that was made and opened."""
        on_refusal(functools.partial(self._not_created, fh, inode, before))

    def _not_found(self, inode: Inode, before: Told) -> None:
        inode.kernel.rollback(before)
        self._inodes.forget(inode.node, 1)

    def undo_made(self, inode: Inode, before: Told) -> None:
        """Undo a reference to an inode that was made, as the reply was refused."""
        place = [(inode.parent, inode.name)] if inode.parent is not None else []
        self._invalidate(inode, before=before, there=place)
        self._inodes.forget(inode.node, 1)

    def _not_listed(self, listed: list[tuple[Inode, Told]]) -> None:
        for inode, before in reversed(listed):  # the first of two names of a file has the oldest
            self._not_found(inode, before)

    def _not_opened(self, fh: FileHandleT, changed: Inode | None, before: Told | None) -> None:
        self._invalidate(changed, before=before)
        self._handles.abandon(fh)

    def _not_created(self, fh: FileHandleT, inode: Inode, before: Told) -> None:
        self._handles.abandon(fh)
        self.undo_made(inode, before)
