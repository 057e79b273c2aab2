"""Undo what a reply gave if the kernel refuses the reply, as the requesting process is gone.

A handler calls one of these methods last, right before it returns (``RefusedReplies.hold``). The call
says what the reply gives: a kernel reference, an open file, news of a change. If the reply is refused,
that is taken back, or the kernel is told by notifications.
"""

import functools

from pyfuse3 import FileHandleT

from cleanfs.fs.handle_table import HandleTable
from cleanfs.fs.name_changes import NameChange
from cleanfs.fuse.notify import Notifier
from cleanfs.fuse.refused_replies import RefusedReplies
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.invalidate import invalidate
from cleanfs.vfs.kernel_view import UNKNOWN, Told


class ReplyRollback:
    """The undo actions of one mount's handlers."""

    def __init__(
        self, replies: RefusedReplies, notifier: Notifier, inodes: InodeTable, handles: HandleTable
    ) -> None:
        """``replies`` keeps the action for each reply until the kernel has taken it."""
        self._replies = replies
        self._invalidate = functools.partial(invalidate, notifier)
        self._inodes = inodes
        self._handles = handles

    def nothing(self) -> None:
        """The reply gives nothing."""
        self._replies.hold(None)

    def attributes(self, inode: Inode) -> None:
        """The reply tells attributes. Call this before they are recorded as told."""
        self._replies.hold(functools.partial(inode.kernel.rollback, inode.kernel.told))

    def acl(self, inode: Inode) -> None:
        """The reply tells an access ACL that is not the one told before."""
        self._replies.hold(functools.partial(inode.kernel.rollback, UNKNOWN))

    def change(self, inode: Inode, before: Told | None = None) -> None:
        """The reply tells of a change of an inode (see ``invalidate``)."""
        self._replies.hold(functools.partial(self._invalidate, inode, before=before))

    def names(self, change: NameChange) -> None:
        """The reply tells of a change of names."""
        self._replies.hold(
            functools.partial(self._invalidate, *change.inodes, there=change.there, gone=change.gone)
        )

    def found(self, inode: Inode) -> None:
        """The reply gives a reference to what was found, and tells its attributes."""
        self._replies.hold(functools.partial(self._not_found, inode, inode.kernel.told))

    def made(self, inode: Inode) -> None:
        """The reply gives a reference to what was made, and tells its attributes."""
        self._replies.hold(functools.partial(self._not_made, inode, inode.kernel.told))

    def listed(self, listed: list[tuple[Inode, Told]]) -> None:
        """The reply gives a reference to each inode. With each is what was told of it before."""
        self._replies.hold(functools.partial(self._not_listed, listed))

    def opened(self, fh: FileHandleT, changed: Inode | None = None, before: Told | None = None) -> None:
        """The reply gives an open file, and tells of a change that came or was found with the open."""
        self._replies.hold(functools.partial(self._not_opened, fh, changed, before))

    def created(self, fh: FileHandleT, inode: Inode, before: Told) -> None:
        """The reply gives an open file that was made."""
        self._replies.hold(functools.partial(self._not_created, fh, inode, before))

    def _not_found(self, inode: Inode, before: Told) -> None:
        inode.kernel.rollback(before)
        self._inodes.forget(inode.node, 1)

    def _not_made(self, inode: Inode, before: Told) -> None:
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
        self._not_made(inode, before)
