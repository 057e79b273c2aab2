"""Refuse calls by a name that no longer leads to the inode that the request is for.

Within the entry timeout the kernel uses a name even if it was removed, replaced or moved in the
source. A program would then write to a file that has no name, or another one. ESTALE makes the kernel
look the name up, and begin the call again (``LOOKUP_REVAL``).

A call may also use an fd, by /proc/self/fd/N, or a file handle. No request says so. But then there is
no name to look up: the same thread comes again at once, without a LOOKUP, and is served.

If the thread does send a LOOKUP, it is served what that finds. The kernel begins a call again only
once. So a program would otherwise fail on a name that is replaced all the time, although the name led
to the found file during its call. A call may be several requests: a GETATTR before the OPEN, a LOOKUP
of the new name before the LINK.

With ``--coherency none`` no name is changed in the source, and nothing is checked.
"""

from dataclasses import dataclass
from typing import Final

import trio
from pyfuse3 import RequestContext

from cleanfs.source.errors import StaleError
from cleanfs.vfs.coherency import Coherency
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.tree import Tree

MAX_REFUSED: Final = 64
"""How many threads that may come again are remembered. One that does not come leaves an entry."""

AGAIN_SECONDS: Final = 0.5
"""How many seconds a refused thread has to look names up again and to use what it found. A later
request may belong to another call, made after the name came to lead elsewhere."""

NO_NODE: Final = 0
"""A node id that no inode has."""


@dataclass(slots=True)
class _Refused:
    """Remembers a thread that was refused, and the inodes that it is served next."""

    node: int
    """The inode for which it was refused, until it looks a name up."""
    found: int
    """The inode that it has found since."""
    until: float
    """The time after which it is not served what it found."""


class StaleNames:
    """Refuses calls by stale names (see the module)."""

    def __init__(self, tree: Tree) -> None:
        """Start with no thread refused."""
        self._tree = tree
        self._may_change = tree.services.coherency.mode is not Coherency.NONE
        self._refused: dict[int, _Refused] = {}  # by thread

    def looking_up(self, ctx: RequestContext) -> None:
        """Note that the thread looks a name up: its next call is by a name."""
        if (refused := self._refused.get(ctx.pid)) is not None:
            refused.node = NO_NODE
            if trio.current_time() >= refused.until:
                self._forget(ctx.pid)

    def found(self, inode: Inode, ctx: RequestContext) -> None:
        """Note what the name that the thread looked up leads to."""
        if (refused := self._refused.get(ctx.pid)) is not None:
            refused.found = inode.node

    async def check(self, inode: Inode, ctx: RequestContext, *, is_stat: bool = False) -> None:
        """Raise StaleError if the call may be by a name that leads elsewhere by now; or OSError.

        ``is_stat`` says that it may be a part of the call that comes again.
        """
        if not self._may_change:
            return
        refused = self._refused.get(ctx.pid)
        if refused is not None and inode.node in (refused.node, refused.found):
            if not is_stat or inode.node == refused.node:
                self._forget(ctx.pid)
            return
        if await self._tree.is_named(inode):
            return
        if ctx.pid:  # 0 is any thread of a process namespace that the daemon does not see
            if len(self._refused) == MAX_REFUSED:
                self._forget(next(iter(self._refused)))
            self._refused[ctx.pid] = _Refused(inode.node, NO_NODE, trio.current_time() + AGAIN_SECONDS)
            self._tree.inodes.states.refuse(ctx.pid)
        raise StaleError

    def _forget(self, thread: int) -> None:
        del self._refused[thread]
        self._tree.inodes.states.stop_refusing(thread)
