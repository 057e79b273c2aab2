"""Refuse calls by a name that no longer leads to the inode that the kernel calls us for.

Within the entry timeout the kernel goes by a name although it was removed, replaced or moved in the
source. What a program then writes would go to a file that nobody finds, or to another name. ESTALE
makes the kernel look the name up, and begin the call again (``LOOKUP_REVAL``).

A call may go by a descriptor instead: by /proc/self/fd/N, or a file handle. No message says so. But
then there is no name to look up: the same thread comes again at once, without a LOOKUP, and is served.

With ``--coherency none`` no name is changed in the source, and nothing is asked.
"""

from typing import Final

from pyfuse3 import RequestContext

from cleanfs.source.errors import StaleError
from cleanfs.vfs.coherency import Coherency
from cleanfs.vfs.inodes import Inode
from cleanfs.vfs.tree import Tree

MAX_REFUSED: Final = 64
"""Threads that may be about to come again. One that does not leaves an entry."""


class StaleNames:
    """See the module."""

    def __init__(self, tree: Tree) -> None:
        """Nobody was refused."""
        self._tree = tree
        self._may_change = tree.services.coherency.mode is not Coherency.NONE
        self._refused: dict[int, int] = {}  # thread -> node

    def looking_up(self, ctx: RequestContext) -> None:
        """The thread looks a name up: what it does next is by a name."""
        self._refused.pop(ctx.pid, None)

    async def check(self, inode: Inode, ctx: RequestContext) -> None:
        """Raises StaleError if the call may be by a name that leads elsewhere by now; OSError."""
        if not self._may_change:
            return
        if self._refused.pop(ctx.pid, None) == inode.node or await self._tree.is_named(inode):
            return
        if ctx.pid:  # 0 is any thread of a process namespace that ours does not see
            if len(self._refused) == MAX_REFUSED:
                del self._refused[next(iter(self._refused))]
            self._refused[ctx.pid] = inode.node
        raise StaleError
