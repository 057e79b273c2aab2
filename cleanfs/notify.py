"""Telling the kernel what it should no longer believe.

The kernel takes locks for a notification that it may hold while it waits for one of our answers, so
none is sent from a handler: they are queued, and a task sends each from a thread.
"""

import errno
import logging
import math

import pyfuse3
import trio

log = logging.getLogger(__name__)

GONE = (errno.ENOENT, errno.ENOSYS, errno.ENOTCONN, errno.EBADF, errno.ENODEV, errno.ENOTEMPTY)
"""Not failures: the kernel had forgotten by itself, or the mount is going."""

STUCK_SECONDS = 0.1
"""A notification waits for pages that are being read, or for a directory that is being changed. If the
source hangs there, the next one is sent all the same after so long."""

MAX_STUCK = 256
"""Notifications that may be on their way at a time."""


class Notifier:
    """A queue of notifications and the task that empties it."""

    def __init__(self) -> None:
        """Queue until ``run`` is started."""
        # Unbounded, but each entry names an inode or a name that the kernel has in memory, once.
        self._send, self._receive = trio.open_memory_channel[int | tuple[int, bytes]](math.inf)
        self._queued: set[int | tuple[int, bytes]] = set()
        self._sending: dict[int | tuple[int, bytes], int] = {}  # how often
        self._limiter = trio.CapacityLimiter(MAX_STUCK)
        self._drained = trio.Event()

    def inode(self, node: int) -> None:
        """The attributes and all pages of a node are out of date."""
        self._queue(node)

    def entry(self, parent: int, name: bytes) -> None:
        """The kernel should drop a name, and with it, if idle, the inode."""
        self._queue((parent, name))

    def is_pending(self, node: int) -> bool:
        """Whether the kernel has yet to learn that a node's pages are out of date."""
        return node in self._queued or node in self._sending

    async def drained(self) -> None:
        """Return when all that was queued has been sent."""
        if self._queued or self._sending:
            await self._drained.wait()

    async def run(self) -> None:
        """Send, one after the other unless one is stuck, until cancelled."""
        async with trio.open_nursery() as nursery:
            async for item in self._receive:
                # Before it is sent: what is queued from now on may be news.
                self._queued.discard(item)
                self._sending[item] = self._sending.get(item, 0) + 1
                sent = trio.Event()
                nursery.start_soon(self._send_one, item, sent)
                with trio.move_on_after(STUCK_SECONDS):
                    await sent.wait()

    async def _send_one(self, item: int | tuple[int, bytes], sent: trio.Event) -> None:
        await trio.to_thread.run_sync(_notify, item, abandon_on_cancel=True, limiter=self._limiter)
        self._sending[item] -= 1
        if not self._sending[item]:
            del self._sending[item]
        sent.set()
        if not self._queued and not self._sending:
            self._drained.set()
            self._drained = trio.Event()

    def _queue(self, item: int | tuple[int, bytes]) -> None:
        if item not in self._queued:
            self._queued.add(item)
            self._send.send_nowait(item)


async def drop_names(places: list[tuple[int, bytes]]) -> None:
    """Have the kernel drop names (parent node, name), and with each, if idle, the inode.

    All in one thread call: with one for each name, programs that look names up are faster.
    """
    await trio.to_thread.run_sync(_drop_names, places, abandon_on_cancel=True)


async def attributes_changed(node: int) -> None:
    """The attributes of a node are out of date; returns when the kernel knows.

    Takes no page lock, so it may be awaited while an open of that node is being handled.
    """
    await trio.to_thread.run_sync(_notify_attributes, node)


def _notify(item: int | tuple[int, bytes]) -> None:
    if isinstance(item, tuple):
        _drop_names([item])
        return
    try:
        pyfuse3.invalidate_inode(pyfuse3.InodeT(item))
    except OSError as exc:
        if exc.errno not in GONE:
            log.warning("the kernel refused to invalidate %d: %s", item, exc)


def _drop_names(places: list[tuple[int, bytes]]) -> None:
    for parent, name in places:
        try:
            pyfuse3.invalidate_entry(pyfuse3.InodeT(parent), pyfuse3.FileNameT(name))
        except OSError as exc:
            if exc.errno not in GONE:
                log.warning("the kernel refused to drop %r from %d: %s", name, parent, exc)


def _notify_attributes(node: int) -> None:
    try:
        pyfuse3.invalidate_inode(pyfuse3.InodeT(node), attr_only=True)
    except OSError as exc:
        if exc.errno not in GONE:
            log.warning("the kernel refused to invalidate the attributes of %d: %s", node, exc)
