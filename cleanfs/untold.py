"""What the kernel was not told of, as who asked for it is gone (``interrupts``).

Who is gone does not wait for the change that was asked for, and its answer is refused. But others can
ask before the change is done, and the kernel believes what they are told. It drops by itself only what
it had believed when the call was given up.
"""

import functools
from collections.abc import Iterable

from cleanfs.given import Given
from cleanfs.inodes import Inode, Told
from cleanfs.notify import Notifier

Place = tuple[Inode, bytes]
"""A name in a directory."""


class Untold:
    """Tells of changes by notifications where answers are refused."""

    def __init__(self, given: Given, notifier: Notifier) -> None:
        """One mount's."""
        self._given = given
        self._notifier = notifier

    def hold(
        self,
        *inodes: Inode | None,
        before: Told | None = None,
        there: Iterable[Place] = (),
        gone: Iterable[Place] = (),
    ) -> None:
        """A handler is about to return (``Given.hold``), and its answer says what ``tell`` does."""
        self._given.hold(functools.partial(self.tell, *inodes, before=before, there=there, gone=gone))

    def tell(
        self,
        *inodes: Inode | None,
        before: Told | None = None,
        there: Iterable[Place] = (),
        gone: Iterable[Place] = (),
    ) -> None:
        """Inodes have changed, and names have come or gone.

        ``before`` is what was told before the answer that is refused, if that tells attributes or moves
        the end of a file. A name that is there is only looked up again: by now somebody may work in it,
        or have mounted on it.
        """
        for inode in inodes:
            if inode is None:
                continue
            inode.untold(before)
            self._notifier.inode(inode.node)
            if inode.open_fds:
                self._notifier.teach(inode.node, inode.generation)
        for parent, name in there:
            self._notifier.expire(parent.node, name)
            self._notifier.inode(parent.node)
        for parent, name in gone:
            self._notifier.entry(parent.node, name)
            self._notifier.inode(parent.node)
