"""Invalidate what a refused reply would have told the kernel.

A killed requester does not wait for its change, and the kernel refuses the reply (``interrupts``). By
itself the kernel drops only what it had cached when the requester ended. Other requests may come before
the change is done, and their replies are cached. So a handler registers this call for the case that its
reply is refused (``request.on_refusal``).
"""

from collections.abc import Iterable

from cleanfs.fuse.notify import Notifier
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.kernel_view import Told

Place = tuple[Inode, bytes]
"""A name in a directory."""


def invalidate(
    notifier: Notifier,
    *inodes: Inode | None,
    before: Told | None = None,
    there: Iterable[Place] = (),
    gone: Iterable[Place] = (),
) -> None:
    """Notify the kernel that inodes have changed, and that names have come or gone.

    ``before`` is what was told before the refused reply, if that tells attributes or moves the end of
    a file. A name that is there only expires: by now it may be in use, or mounted on.
    """
    for inode in inodes:
        if inode is None:
            continue
        inode.kernel.rollback(before)
        notifier.inode(inode.node)
        if inode.open_fds:
            notifier.refresh(inode.node, inode.generation, inode.mount_path())
    for parent, name in there:
        notifier.expire(parent.node, name)
        notifier.inode(parent.node)
    for parent, name in gone:
        notifier.entry(parent.node, name)
        notifier.inode(parent.node)
