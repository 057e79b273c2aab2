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


class Notifier:
    """A queue of notifications and the task that empties it."""

    def __init__(self) -> None:
        """Queue until ``run`` is started."""
        # Unbounded, but each entry names an inode that the kernel has in memory, once.
        self._send, self._receive = trio.open_memory_channel[int](math.inf)
        self._queued: set[int] = set()
        self._sending: int | None = None
        self._drained = trio.Event()

    def inode(self, node: int) -> None:
        """The attributes and all pages of a node are out of date."""
        if node not in self._queued:
            self._queued.add(node)
            self._send.send_nowait(node)

    def is_pending(self, node: int) -> bool:
        """Whether the kernel has yet to learn that a node's pages are out of date."""
        return node in self._queued or node == self._sending

    async def drained(self) -> None:
        """Return when all that was queued has been sent."""
        if self._queued or self._sending is not None:
            await self._drained.wait()

    async def run(self) -> None:
        """Send, one after the other, until cancelled."""
        async for node in self._receive:
            # Before it is sent: what is queued from now on may be news.
            self._queued.discard(node)
            self._sending = node
            await trio.to_thread.run_sync(_notify, node, abandon_on_cancel=True)
            self._sending = None
            if not self._queued:
                self._drained.set()
                self._drained = trio.Event()


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


def _notify(node: int) -> None:
    try:
        pyfuse3.invalidate_inode(pyfuse3.InodeT(node))
    except OSError as exc:
        if exc.errno not in GONE:
            log.warning("the kernel refused to invalidate %d: %s", node, exc)


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
