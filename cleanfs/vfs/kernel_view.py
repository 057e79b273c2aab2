"""Track what the kernel was told of an inode, and so may use.

The kernel need not use the last reply: it takes effect when the requester gets to run, and other
processes may run before. A reply may also be refused because the requester is gone. So older values
are kept beside the last one, and *doubts* are counted until a notification has settled them.
"""

import math
import os
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

import trio

from cleanfs.cache.state import Stamps
from cleanfs.eager import before_wait
from cleanfs.vfs.inode_state import NOT_TOLD as NOT_TOLD
from cleanfs.vfs.inode_state import KernelViewState

UNSURE: Final = -2
"""The access of an inode when it is not known which mode and owners the kernel has."""


def access_of(st: os.stat_result) -> int:
    """Pack what decides access to the file into one number: mode, owner, group."""
    return st.st_mode | st.st_uid << 32 | st.st_gid << 64


def stamps_of(st: os.stat_result) -> Stamps:
    """Return size, mtime and ctime: one of them moves when the content does."""
    return st.st_size, st.st_mtime_ns, st.st_ctime_ns


class Told(NamedTuple):
    """Holds attributes of ``KernelView`` from before a reply, to restore if it is refused."""

    size: int
    access: int
    access_ctime: int


NOTHING: Final = Told(-1, NOT_TOLD, 0)
"""What the kernel was told of an inode that was just made."""

UNKNOWN: Final = Told(NOT_TOLD, UNSURE, 0)
"""Access that differs from any that a file can have."""


class KernelView(KernelViewState):
    """Holds what the kernel may know of one inode."""

    __slots__ = ("settling",)

    def __init__(self) -> None:
        """Start with a kernel that was told nothing."""
        super().__init__()
        self.settling: trio.Event | None = None
        """An event that is set when the notification under way has been made."""

    # -- attributes ---------------------------------------------------------------------------

    def reply_sent(self, st: os.stat_result) -> None:
        """Record that a reply tells attributes."""
        self.tell(st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_mode, st.st_uid, st.st_gid)

    def changed(self, st: os.stat_result) -> bool:
        """Count a doubt if attributes are not those that were told. Return whether they differ."""
        now = stamps_of(st)
        if self.sent == now:
            return False
        self.sent = now
        self._doubt(size=st.st_size != self.size)
        return True

    def _doubt(self, *, size: bool) -> None:
        """Count a doubt about attributes; ``size`` says whether the size is one of them."""
        self.doubts += 1
        if size:
            self.size_doubt = self.doubts

    @property
    def told(self) -> Told:
        """Return the state to return to if the next reply is refused."""
        return Told(self.size, self.access, self.access_ctime)

    def rollback(self, before: Told | None = None) -> None:
        """Note that a reply was refused: the kernel may still use what it was told ``before``.

        Without ``before``, the reply told no attributes.
        """
        self._doubt(size=before is not None and before.size != self.size)
        if before is None:
            return
        self.size = before.size
        if self.access == before.access:
            self.access_ctime = before.access_ctime
        else:
            self.access = UNSURE

    # -- reads and writes through the mount ---------------------------------------------------

    def read_ended(self, end: int) -> None:
        """Record that a READ reply came short at ``end``.

        If the kernel saw a later end of the file, it takes that for the end
        (``fuse_read_update_size``).
        """
        if end < self.size:
            self._doubt(size=True)
            self.size = end

    def written_to(self, end: int) -> None:
        """Record a write that the kernel sent: its size of the file is at least ``end`` now."""
        self.size = max(self.size, end)

    def knows_change(self, before: os.stat_result, after: os.stat_result) -> None:
        """Record a change that the kernel made: if it knew the state before, it knows the one after."""
        if self.sent == stamps_of(before):
            self.sent = stamps_of(after)

    # -- access -------------------------------------------------------------------------------

    def has_access_of(self, st: os.stat_result) -> bool:
        """Tell whether the kernel has this mode and these owners, or was told none."""
        return self.access in (NOT_TOLD, access_of(st))

    def may_have_other_acl(self, st: os.stat_result) -> bool:
        """Tell whether the ACL may have changed since the kernel was told of it: ctime moved."""
        return self.access != NOT_TOLD and self.access_ctime != st.st_ctime_ns

    # -- pages --------------------------------------------------------------------------------

    def drops_pages_for(self, serial: int, by: float = math.inf) -> None:
        """Note that the OPEN reply for a handle drops the pages; until ``by``, all of them do."""
        self.dropped_for, self.pages_dropped_by = serial, by

    # -- doubts -------------------------------------------------------------------------------

    async def settle(self, refresh: Callable[[], Awaitable[None]], *, size: bool = False) -> None:
        """Have ``refresh`` make the kernel request attributes, unless it is known to have them.

        With ``size``, only doubts about the size count.
        """
        known = (
            self.size_doubt if size else self.doubts
        )  # later requests settle those that come meanwhile
        while self.doubts_settled < known:
            if self.settling is not None:
                await before_wait()
                await self.settling.wait()
                continue
            self.settling = settled = trio.Event()
            doubts = self.doubts
            try:
                await refresh()
                self.doubts_settled = doubts
            finally:
                self.settling = None
                settled.set()
