"""What the kernel was told of an inode, and so may go by.

It need not go by the last reply: a reply takes effect when the requester gets to run, and others may
run before. A reply may also be refused, as the requester is gone. So older values are kept beside the
last one, and *doubts* are counted until a notification has settled them.
"""

import math
import mmap
import os
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

import trio

MAX_SIZES: Final = 8
"""Sizes of a file that are remembered as those that the kernel may go by."""

NOT_TOLD: Final = -1
"""No mode and owners."""

UNSURE: Final = -2
"""It is not known which ones."""


def access_of(st: os.stat_result) -> int:
    """Who may open the file, in one number: mode, owner, group."""
    return st.st_mode | st.st_uid << 32 | st.st_gid << 64


def stamps_of(st: os.stat_result) -> tuple[int, int, int]:
    """Size, mtime and ctime: what moves when the content does."""
    return st.st_size, st.st_mtime_ns, st.st_ctime_ns


class Told(NamedTuple):
    """What a reply may change, to return to if it is refused (see ``KernelView``'s attributes)."""

    sizes: tuple[int, ...]
    access: int
    access_ctime: int


UNKNOWN: Final = Told((), UNSURE, 0)
"""Access that is not what it is now."""


class KernelView:
    """One inode as the kernel may see it."""

    __slots__ = (
        "access",
        "access_ctime",
        "acl",
        "doubts",
        "doubts_settled",
        "dropped_for",
        "pages_dropped_by",
        "sent",
        "settling",
        "sizes",
    )

    def __init__(self) -> None:
        """The kernel was told nothing."""
        self.sizes: tuple[int, ...] = (NOT_TOLD,)
        """Where the kernel may see the end of the file, which is where it appends: the size that it
        was told last, and those from before, as it may still go by them."""
        self.sent: tuple[int, int, int] | None = None
        """``stamps_of`` what the kernel was last told, or knows by itself since: it made a write."""
        self.access = NOT_TOLD
        """Mode and owners that it was last told (``access_of``): what it lets requesters in by."""
        self.access_ctime = 0
        """The ctime under which that, and the ACL, was told or found to be what it was told."""
        self.acl = b""
        """The access ACL that it was last told; empty for none."""
        self.doubts = self.doubts_settled = 0
        """How often it was told other attributes than before, and how many of these were followed by a
        notification."""
        self.dropped_for: object = None
        """The handle whose open's reply told the kernel to drop the pages. It does when the opener
        gets to run, and others may run before; None once it is known to have done so."""
        self.pages_dropped_by = 0.0
        """When (``trio.current_time``) it should have, or will be notified."""
        self.settling: trio.Event | None = None
        """Set when the notification that is under way has been made."""

    # -- attributes ---------------------------------------------------------------------------

    def reply_sent(self, st: os.stat_result) -> None:
        """Record that a reply tells attributes."""
        now = stamps_of(st)
        if self.sent not in (None, now):
            self.doubts += 1
        self.sent = now
        self.access, self.access_ctime = access_of(st), st.st_ctime_ns
        if st.st_size != self.sizes[0]:
            self.size_sent(st.st_size)

    def size_sent(self, size: int) -> None:
        """Record that a reply tells the size of the file."""
        if size != self.sizes[0]:
            older = [other for other in self.sizes if other not in (size, NOT_TOLD)]
            self.sizes = (size, *older[: MAX_SIZES - 1])

    def changed(self, st: os.stat_result) -> bool:
        """Count a doubt if attributes are not those that were told. Return whether they are others."""
        now = stamps_of(st)
        if self.sent == now:
            return False
        self.sent = now
        self.doubts += 1
        return True

    @property
    def told(self) -> Told:
        """What to return to if the next reply is refused."""
        return Told(self.sizes, self.access, self.access_ctime)

    def not_sent(self, before: Told) -> None:
        """Return to what was told before, as attributes did not fit into a reply."""
        self.sizes, self.access, self.access_ctime = before

    def rollback(self, before: Told | None = None) -> None:
        """Take in that a reply was refused: the kernel may still go by what it was told ``before``.

        Without ``before``, the reply told no attributes.
        """
        self.doubts += 1
        if before is None:
            return
        sizes = dict.fromkeys((*before.sizes, *self.sizes))
        if len(sizes) > 1:
            sizes.pop(NOT_TOLD, None)
        self.sizes = tuple(sizes)[:MAX_SIZES]
        if self.access == before.access:
            self.access_ctime = before.access_ctime
        else:
            self.access = UNSURE

    # -- writes through the mount -------------------------------------------------------------

    def truncated(self, size: int) -> None:
        """Record that the kernel had the file truncated."""
        self.sizes = (size,)

    def written_to(self, end: int) -> None:
        """Record a write up to ``end`` by the kernel, which moves an end that was before that."""
        if end > min(self.sizes):
            self.sizes = tuple(dict.fromkeys(max(size, end) for size in self.sizes))

    def knows_change(self, before: os.stat_result, after: os.stat_result) -> None:
        """Record a change that the kernel made: what it knew before, it knows after."""
        if self.sent == stamps_of(before):
            self.sent = stamps_of(after)

    def may_append(self, start: int, stop: int) -> bool:
        """Whether a write may be one at the end that the kernel sees.

        Not what it sends of a mapping: whole pages, of which the last may end where the file does.
        Nor a write to the beginning, as after a program has taken O_APPEND away; all files were empty.
        """
        last, *older = self.sizes
        if start >= last or start % mmap.PAGESIZE:
            return start == last or start in older
        is_mapped = stop % mmap.PAGESIZE == 0 or stop in self.sizes
        return start > 0 and start in older and not is_mapped

    # -- access -------------------------------------------------------------------------------

    def has_access_of(self, st: os.stat_result) -> bool:
        """Whether mode and owners are those that the kernel goes by, or it was told none."""
        return self.access in (NOT_TOLD, access_of(st))

    def may_have_other_acl(self, st: os.stat_result) -> bool:
        """Whether the ACL may have changed since the kernel was told of it: ctime moves with it."""
        return self.access != NOT_TOLD and self.access_ctime != st.st_ctime_ns

    # -- pages --------------------------------------------------------------------------------

    def drops_pages_for(self, handle: object, by: float = math.inf) -> None:
        """The reply to the open of ``handle`` drops the pages. Until ``by``, every open's does."""
        self.dropped_for, self.pages_dropped_by = handle, by

    def pages_dropped(self, handle: object) -> None:
        """The opener of ``handle`` has run: the kernel has dropped the pages if that was to do it."""
        if self.dropped_for is handle:
            self.dropped_for, self.pages_dropped_by = None, 0.0

    # -- doubts -------------------------------------------------------------------------------

    async def settle(self, refresh: Callable[[], Awaitable[None]]) -> None:
        """Have ``refresh`` make the kernel ask for the attributes, unless it is known to have them."""
        known = self.doubts  # those that come meanwhile are for later opens
        while self.doubts_settled < known:
            if self.settling is not None:
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
