"""What the kernel was not told of, as who asked for it is gone (``interrupts``).

Who is gone does not wait for the change that was asked for, and its answer is refused. But others can
ask before the change is done, and the kernel believes what they are told. It drops by itself only what
it had believed when the call was given up. So a handler holds this (``RefusedReplies``) beside its
reply.
"""

from collections.abc import Iterable

from cleanfs.fuse.notify import Notifier
from cleanfs.vfs.inodes import Inode, Told

Place = tuple[Inode, bytes]
"""A name in a directory."""


def tell(
    notifier: Notifier,
    *inodes: Inode | None,
    before: Told | None = None,
    there: Iterable[Place] = (),
    gone: Iterable[Place] = (),
) -> None:
    """By notifications: inodes have changed, and names have come or gone.

    ``before`` is what was told before the answer that is refused, if that tells attributes or moves
    the end of a file. A name that is there is only looked up again: by now somebody may work in it,
    or have mounted on it.
    """
    for inode in inodes:
        if inode is None:
            continue
        inode.untold(before)
        notifier.inode(inode.node)
        if inode.open_fds:
            notifier.refresh(inode.node, inode.generation)
    for parent, name in there:
        notifier.expire(parent.node, name)
        notifier.inode(parent.node)
    for parent, name in gone:
        notifier.entry(parent.node, name)
        notifier.inode(parent.node)
