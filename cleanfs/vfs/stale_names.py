"""Refuse calls by a name that no longer leads to the inode that the request is for.

Within the entry timeout the kernel uses a name although it was removed, replaced or moved in the
source. What a program then writes would go to a file that has no name, or another one. ESTALE makes
the kernel look the name up, and begin the call again (``LOOKUP_REVAL``).

A call may go by a descriptor instead: by /proc/self/fd/N, or a file handle. No message says so. But
then there is no name to look up: the same thread comes again at once, without a LOOKUP, and is served.

With one, what it finds is served. The kernel begins a call again only once, so else a program would
fail on a name that is replaced all the time, and that did lead to what was found during its call.

With ``--coherency none`` no name is changed in the source, and nothing is asked.
"""

import math
from typing import Final

import trio
from pyfuse3 import RequestContext

from cleanfs.source.errors import StaleError
from cleanfs.vfs.coherency import Coherency
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.tree import Tree

MAX_REFUSED: Final = 64
"""Threads that may be about to come again. One that does not leaves an entry."""

AGAIN_SECONDS: Final = 1.0
"""What a thread gets to look names up again. What it finds later may be for another call, which comes
when the name leads elsewhere."""


class StaleNames:
    """See the module."""

    def __init__(self, tree: Tree) -> None:
        """Nobody was refused."""
        self._tree = tree
        self._may_change = tree.services.coherency.mode is not Coherency.NONE
        self._refused: dict[int, tuple[int, float]] = {}  # thread -> node to serve, when refused

    def looking_up(self, ctx: RequestContext) -> float | None:
        """The thread looks a name up: its next call is by that. When it was refused, if just now."""
        _, when = self._refused.pop(ctx.pid, (0, -math.inf))
        return when if trio.current_time() < when + AGAIN_SECONDS else None

    def found(self, inode: Inode, ctx: RequestContext, refused: float | None) -> None:
        """The name leads to that; ``refused`` is what ``looking_up`` said."""
        if refused is not None:
            self._serve(ctx, inode, refused)

    async def check(self, inode: Inode, ctx: RequestContext, *, comes_again: bool = True) -> None:
        """Raises StaleError if the call may be by a name that leads elsewhere by now; OSError.

        ``comes_again`` says that it comes with what a LOOKUP has found. A stat need not: that has told.
        """
        if not self._may_change:
            return
        node, _ = self._refused.pop(ctx.pid, (0, 0.0))
        if node == inode.node or await self._tree.is_named(inode):
            return
        self._serve(ctx, inode, trio.current_time() if comes_again else -math.inf)
        raise StaleError

    def _serve(self, ctx: RequestContext, inode: Inode, refused: float) -> None:
        """Serve the thread's next request if it is for that inode."""
        if ctx.pid:  # 0 is any thread of a process namespace that ours does not see
            if len(self._refused) == MAX_REFUSED:
                del self._refused[next(iter(self._refused))]
            self._refused[ctx.pid] = inode.node, refused
