"""Telling the kernel what it should no longer believe.

The kernel takes locks for a notification that it may hold while it waits for one of our answers, so
none is sent from a handler: they are queued, and a task sends each from a thread.
"""

import contextlib
import errno
import logging
import math
import os
import struct
from collections import Counter, deque
from dataclasses import dataclass
from typing import Final

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


BATCH: Final = 64
"""Notifications that one hop to a thread may send."""

EXPIRY: Final = struct.Struct("=IiQQII")
"""fuse_out_header (length, error, unique) and fuse_notify_inval_entry_out: parent, namelen, flags."""

FUSE_NOTIFY_INVAL_ENTRY: Final = 3
FUSE_EXPIRE_ONLY: Final = 1


@dataclass(frozen=True, slots=True)
class Expiry:
    """A name that the kernel should look up again before it believes it."""

    parent: int
    name: bytes

    def message(self) -> bytes:
        """What libfuse calls ``fuse_lowlevel_notify_expire_entry``, and pyfuse3 has no name for.

        Linux before 6.2 takes it for the stronger ``Notifier.entry``.
        """
        length = EXPIRY.size + len(self.name) + 1
        head = (length, FUSE_NOTIFY_INVAL_ENTRY, 0, self.parent, len(self.name), FUSE_EXPIRE_ONLY)
        return EXPIRY.pack(*head) + self.name + b"\0"


Item = int | tuple[int, bytes] | Expiry


class Notifier:
    """A queue of notifications and the task that empties it."""

    def __init__(self) -> None:
        """Queue until ``run`` is started."""
        # Unbounded, but each entry names an inode or a name that the kernel has in memory, once.
        self._send, self._receive = trio.open_memory_channel[Item](math.inf)
        self._queued: set[Item] = set()
        self._sending: Counter[Item] = Counter()
        self._limiter = trio.CapacityLimiter(MAX_STUCK)
        self._drained = trio.Event()
        self._device = -1

    def use_device(self, fd: int) -> None:
        """The descriptor of the FUSE device, for what pyfuse3 can not say; -1 if it is not known."""
        self._device = -1 if fd < 0 else os.dup(fd)

    def close(self) -> None:
        """The device is about to be closed, upon which the kernel ends every wait for an answer.

        A thread may be about to write to ours: then the number stays, and leads nowhere.
        """
        if self._device >= 0 and not self._sending:
            os.close(self._device)
        elif self._device >= 0:
            nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(nowhere, self._device, inheritable=False)
            os.close(nowhere)

    def inode(self, node: int) -> None:
        """The attributes and all pages of a node are out of date."""
        self._queue(node)

    def entry(self, parent: int, name: bytes) -> None:
        """The kernel should drop a name, and with it, if idle, the inode."""
        self._queue((parent, name))

    def expire(self, parent: int, name: bytes) -> None:
        """The kernel should look a name up again, and keep what it has if that is what is found.

        To drop it would unmount what is mounted below a directory, and cut off who works in it.
        """
        self._queue(Expiry(parent, name) if self._device >= 0 else (parent, name))

    def is_pending(self, node: int) -> bool:
        """Whether the kernel has yet to learn that a node's pages are out of date."""
        return node in self._queued or node in self._sending

    async def drained(self) -> None:
        """Return when all that was queued has been sent."""
        if self._queued or self._sending:
            await self._drained.wait()

    async def run(self) -> None:
        """Send, in order unless one is stuck, until cancelled."""
        async with trio.open_nursery() as nursery:
            async for item in self._receive:
                batch = deque([item])
                with contextlib.suppress(trio.WouldBlock):
                    while len(batch) < BATCH:
                        batch.append(self._receive.receive_nowait())
                # Before they are sent: what is queued from now on may be news.
                self._queued.difference_update(batch)
                self._sending.update(batch)
                while batch:
                    sent = trio.Event()
                    nursery.start_soon(self._send_some, batch, sent)
                    with trio.move_on_after(STUCK_SECONDS):
                        await sent.wait()

    async def _send_some(self, batch: deque[Item], sent: trio.Event) -> None:
        done = await trio.to_thread.run_sync(
            _notify_all, self._device, batch, abandon_on_cancel=True, limiter=self._limiter
        )
        self._sending -= Counter(done)
        sent.set()
        if not self._queued and not self._sending:
            self._drained.set()
            self._drained = trio.Event()

    def _queue(self, item: Item) -> None:
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


def _notify_all(device: int, batch: deque[Item]) -> list[Item]:
    """Send what nobody else has taken from the batch. Returns what was sent."""
    done: list[Item] = []
    with contextlib.suppress(IndexError):
        while True:
            done.append(item := batch.popleft())
            _notify(device, item)
    return done


def _notify(device: int, item: Item) -> None:
    if isinstance(item, tuple):
        _drop_names([item])
        return
    try:
        if isinstance(item, Expiry):
            os.write(device, item.message())
        else:
            pyfuse3.invalidate_inode(pyfuse3.InodeT(item))
    except OSError as exc:
        if exc.errno not in GONE:
            log.warning("the kernel refused to invalidate %r: %s", item, exc)


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
