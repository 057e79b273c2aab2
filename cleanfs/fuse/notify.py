"""Invalidate what the kernel caches, by notifications.

For a notification the kernel takes locks that it may hold while it waits for one of our replies. So
none is sent from a handler: they are queued, and a task sends each from a thread.
"""

import contextlib
import errno
import logging
import math
import os
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar, TypeVarTuple

import pyfuse3
import trio

from cleanfs.cache.read_ranges import RangeSet
from cleanfs.eager import before_wait
from cleanfs.fuse.isolated_threads import IsolatedThreads
from cleanfs.fuse.protocol import (
    FUSE_EXPIRE_ONLY,
    FUSE_NOTIFY_INVAL_ENTRY,
    FUSE_NOTIFY_INVAL_ENTRY_OUT,
    FUSE_NOTIFY_INVAL_INODE,
    FUSE_NOTIFY_INVAL_INODE_OUT,
    FUSE_OUT_HEADER,
)
from cleanfs.fuse.size_sync import MountedAt, can_open_handles, refresh_kernel_size
from cleanfs.linux.timeouts import wait_with_stall_grace

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

GONE = (errno.ENOENT, errno.ENOSYS, errno.ENOTCONN, errno.EBADF, errno.ENODEV, errno.ENOTEMPTY)
"""Errors that are no failures: the kernel has forgotten the object, or the mount is ending."""

STUCK_SECONDS = 0.1
"""How long to wait for a notification before the next one is sent anyway. It waits for pages that are
being read or for a directory that is being changed, where the source may hang."""

REFRESH_SECONDS = 0.5
"""How long an open may wait until the kernel has refreshed the file's size: the source may hang."""

REFRESH_THREADS = 8
"""Threads that make the kernel refresh file sizes."""

MAX_REFRESHES = 64
"""Files refreshed at a time. Each takes some 0.3 ms, unless the source hangs."""

PAGES_SECONDS = 0.5
"""How long the reply to a write may wait until the kernel has dropped its pages. It takes 0.1 ms."""

PAGES_LOOK_SECONDS = 0.001
"""How often to check whether dropping them waits, which may be for the reply."""

NO_THREAD_SECONDS = 1.0
"""The pause before the next attempt to start a thread."""

MAX_STUCK = 256
"""Notifications in progress at a time."""

BATCH: Final = 64
"""Notifications that one hop to a thread may send."""


@dataclass(frozen=True, slots=True)
class Expiry:
    """Identifies a name that the kernel should look up again before it uses it."""

    parent: int
    name: bytes


@dataclass(frozen=True, slots=True)
class AttrRefresh:
    """Identifies a file whose attributes the kernel should refresh now, not when it next needs them."""

    node: int
    generation: int
    path: bytes
    """The path by which the kernel found it below the root of the mount; empty if unknown."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Identifies a range of a file, in bytes, whose pages are stale."""

    node: int
    offset: int
    length: int


Notification = int | tuple[int, bytes] | Expiry | Pages
Item = Notification | AttrRefresh


def inode_message(
    node: int, *, attributes_only: bool = False, offset: int = 0, length: int = 0
) -> bytes:
    """Make the message that libfuse calls ``fuse_lowlevel_notify_inval_inode``."""
    body = FUSE_NOTIFY_INVAL_INODE_OUT.pack(node, -1 if attributes_only else offset, length)
    return _message(FUSE_NOTIFY_INVAL_INODE, body)


def entry_message(parent: int, name: bytes, flags: int = 0) -> bytes:
    """Make ``fuse_lowlevel_notify_inval_entry``, or with FUSE_EXPIRE_ONLY ``..._expire_entry``.

    Linux before 6.2 treats the second like the first, which is the stronger one.
    """
    body = FUSE_NOTIFY_INVAL_ENTRY_OUT.pack(parent, len(name), flags) + name + b"\0"
    return _message(FUSE_NOTIFY_INVAL_ENTRY, body)


def _message(code: int, body: bytes) -> bytes:
    return FUSE_OUT_HEADER.pack(FUSE_OUT_HEADER.size + len(body), code, 0) + body


class PendingNodes(Protocol):
    """Holds the nodes of which an invalidation is queued or being sent."""

    def set_invalidating(self, node: int, pending: bool) -> None:
        """Note whether there is one."""


class EvictionHolds(Protocol):
    """Keeps pages of a node that the kernel evicts from being put while they may be stale."""

    def hold(self, node: int) -> None:
        """Begin: the kernel will be told to drop the node's pages."""

    def release(self, node: int) -> None:
        """End: it has dropped them."""


class _Drop:
    """Tracks the invalidation of the pages of a write."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.done = trio.Event()
        self.scope = trio.CancelScope()
        self.thread = 0
        """The id of the sending thread, once it runs."""

    def waits(self) -> bool:
        """Return whether that thread is in an uninterruptible wait in the kernel, for a page."""
        if not self.thread:
            return False
        try:
            with open(
                f"/proc/self/task/{self.thread}/stat", encoding="ascii", errors="replace"
            ) as stat:
                return stat.read().rpartition(")")[2].split()[0] == "D"
        except OSError:  # it has ended
            return False


class Notifier:
    """Queues notifications, and sends them in a task."""

    def __init__(self) -> None:
        """Queue until ``run`` is started."""
        # Unbounded, but it holds each inode and name in the kernel's memory at most once.
        self._send, self._receive = trio.open_memory_channel[Item](math.inf)
        self._queued: set[Item] = set()
        self._sending: Counter[Item] = Counter()
        self._limiter = trio.CapacityLimiter(MAX_STUCK)
        self._drained = trio.Event()
        self._device = -1
        self._where: MountedAt | None = None
        self._opens_handles = False
        self._isolated = IsolatedThreads(REFRESH_THREADS)
        self._refreshing: dict[int, trio.Event] = {}  # by node
        self._in_a_hurry = False
        self._pending_nodes: PendingNodes | None = None
        self._holds: EvictionHolds | None = None
        self._again: dict[int, AttrRefresh] = {}  # to be refreshed once more
        self._nursery: trio.Nursery | None = None
        self.explicit = False
        """Whether the kernel drops pages only upon an invalidation, and not upon another mtime or size
        (FUSE_EXPLICIT_INVAL_DATA, see ``init_flags``)."""
        # By node. A node has two sets if its inode number was reused.
        self._in_writing: dict[int, list[RangeSet]] = {}
        self._dropping: Counter[int] = Counter()  # nodes of writes whose pages are being dropped
        self._lock = threading.Lock()  # guards the next two; never held during a wait
        self._writers = 0
        self._closed = False

    def use_device(self, fd: int) -> None:
        """Send notifications through a duplicate of the device's fd; -1 if that is not known.

        A thread may still send when libfuse closes its own. Without the fd, pyfuse3 sends
        notifications, and an expiry becomes an invalidation.
        """
        self._device = -1 if fd < 0 else os.dup(fd)

    def note_pending_in(self, nodes: PendingNodes) -> None:
        """Keep in ``nodes`` what ``is_pending`` says."""
        self._pending_nodes = nodes

    def _note_pending(self, *items: Item) -> None:
        if self._pending_nodes is None:
            return
        for item in items:
            if isinstance(item, int):
                self._pending_nodes.set_invalidating(item, self.is_pending(item))

    def use_evictions(self, holds: EvictionHolds) -> None:
        """Hold back evicted pages of each node until an invalidation of its pages has been sent."""
        self._holds = holds

    def hold_evictions(self, node: int) -> None:
        """Hold back evicted pages of a node, as the kernel drops its pages by itself at some time."""
        if self._holds is not None:
            self._holds.hold(node)

    def release_evictions(self, node: int) -> None:
        """End that: the kernel has dropped them."""
        if self._holds is not None:
            self._holds.release(node)

    def start(self) -> None:
        """Start the threads, before the device is opened."""
        self._isolated.start()

    def use_mount(self, where: MountedAt) -> None:
        """Refresh sizes through this mount."""
        self._where = where
        self._opens_handles = can_open_handles()
        if not self._opens_handles:
            log.info("CAP_DAC_READ_SEARCH is missing: the kernel may use an old file size for longer")

    def hurry(self) -> None:
        """Stop delaying replies until invalidations complete (used during shutdown).

        Time is short, and mappings may have many dirty pages: an invalidation for each would be most of
        the work (4,096 scattered pages took 3.1 s instead of 0.7).
        """
        self._in_a_hurry = True

    def close(self) -> None:
        """Close our fd. The device is about to be closed, which ends all waits for a reply.

        A thread may be about to write to our fd. Then the number refers to /dev/null until it has.
        """
        with self._lock:
            self._closed = True
            if self._device >= 0 and self._writers:
                nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
                os.dup2(nowhere, self._device, inheritable=False)
                os.close(nowhere)
            elif self._device >= 0:
                os.close(self._device)
        self._isolated.close()

    def in_writing(self, node: int, read_ranges: RangeSet) -> None:
        """Note in ``read_ranges`` when pages of a file that is open for writing may be dropped."""
        self._in_writing.setdefault(node, []).append(read_ranges)

    def not_in_writing(self, node: int, read_ranges: RangeSet) -> None:
        """Stop that: the file is no longer open for writing."""
        self._in_writing[node].remove(read_ranges)
        if not self._in_writing[node]:
            del self._in_writing[node]

    def may_drop(self, node: int) -> None:
        """Note that the kernel may drop pages of a node that a program has just filled."""
        for read_ranges in self._in_writing.get(node, ()):
            read_ranges.dropped = True

    def may_drop_any(self) -> None:
        """Note that for all nodes."""
        for node in self._in_writing:
            self.may_drop(node)

    def inode(self, node: int) -> None:
        """Invalidate the attributes and all pages of a node."""
        self.may_drop(node)
        self._queue(node)

    def pages(self, node: int, offset: int, length: int) -> None:
        """Invalidate a range of a node, in bytes."""
        self.may_drop(node)
        self._queue(Pages(node, offset, length))

    async def pages_dropped(self, node: int) -> None:
        """Invalidate a node, and return when the kernel has dropped its pages.

        Never await it in a request that sets a size: the kernel delays writes until the reply, and
        writes dirty pages back before it drops them. It waits for pages that are being read or written,
        as the kernel does when it drops pages after a reply. The caller must hold no lock that a read
        or a write needs.
        """
        self.may_drop(node)
        self.hold_evictions(node)
        if node in self._queued:
            self._queued.remove(node)
            self.release_evictions(node)
        self._sending[node] += 1
        self._note_pending(node)
        try:
            await self._in_a_thread(self._send_one, node)
        finally:
            self._sent([node])

    def entry(self, parent: int, name: bytes) -> None:
        """Invalidate a name, and with it the inode if that is idle."""
        self._queue((parent, name))

    def expire(self, parent: int, name: bytes) -> None:
        """Have the kernel look a name up again, and keep its inode if the lookup finds the same.

        An invalidation would unmount mounts below a directory, and detach processes that work in it.
        """
        self._queue(Expiry(parent, name))

    def refresh(self, node: int, generation: int, path: bytes) -> None:
        """Have the kernel refresh the size of a file, after all notifications queued so far."""
        self._queue(AttrRefresh(node, generation, path))

    def is_pending(self, node: int) -> bool:
        """Return whether an invalidation of a node is queued or being sent."""
        return node in self._queued or node in self._sending

    def drops_pages(self, node: int) -> bool:
        """Return whether an invalidation of pages of a node is queued or being sent."""
        return self.is_pending(node) or node in self._dropping

    @property
    def can_refresh_sizes(self) -> bool:
        """Return whether the kernel can be made to refresh the size of any file."""
        return self._where is not None and self._opens_handles

    def is_refresher(self, thread: int) -> bool:
        """Return whether a requester is a thread of ours that refreshes a size."""
        return thread in self._isolated.ids

    async def drained(self) -> None:
        """Return when all queued notifications have been sent."""
        if self._queued or self._sending:
            await self._drained.wait()

    async def run(self) -> None:
        """Send notifications, in order unless one is stuck, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._isolated.run)
            async for item in self._receive:
                batch = deque([item])
                with contextlib.suppress(trio.WouldBlock):
                    while len(batch) < BATCH:
                        batch.append(self._receive.receive_nowait())
                batch = deque(item for item in dict.fromkeys(batch) if item in self._queued)
                # Before they are sent, since the same item may be queued again for a later change.
                self._queued.difference_update(batch)
                self._sending.update(batch)
                while batch:
                    sent = trio.Event()
                    nursery.start_soon(self._send_some, batch, sent)
                    with trio.move_on_after(STUCK_SECONDS):
                        await sent.wait()

    async def drop_names(self, places: list[tuple[int, bytes]]) -> None:
        """Invalidate names (parent node, name), and with each the inode if that is idle.

        One thread call sends all. With one for each name, programs look names up faster than we drop
        them.
        """
        await trio.to_thread.run_sync(self._send_all, deque(places), abandon_on_cancel=True)

    async def written(self, node: int, start: int, stop: int, read: Callable[[], bool]) -> None:
        """Invalidate the pages of a write; returns when the kernel has dropped them, or soon.

        The kernel keeps a page locked until the reply to the write, if it lacked the rest of the page
        (``fuse_fill_write_pages``). It also waits for the reply when it writes back a mapping. So this
        stops waiting when the sending thread waits in the kernel, unless it may wait for a page that is
        being ``read``: such a read ends, if the source does not hang. A thread that only waits for a
        CPU is waited for.
        """
        if self._nursery is None or self._in_a_hurry:
            self.inode(node)
            return
        await before_wait()
        drop = _Drop(Pages(node, start, stop - start))
        self._dropping[node] += 1
        self.hold_evictions(node)
        self._nursery.start_soon(self._drop, drop)
        until = trio.current_time() + PAGES_SECONDS
        looks = 0  # an earlier read may come between two
        while not drop.done.is_set() and looks < 2 and trio.current_time() <= until:
            with trio.move_on_after(PAGES_LOOK_SECONDS):
                await drop.done.wait()
            looks = looks + 1 if drop.waits() and not read() else 0
        if not drop.thread:  # MAX_STUCK others are stuck
            drop.scope.cancel()
            self.inode(node)

    async def _drop(self, drop: "_Drop") -> None:
        def send() -> None:
            drop.thread = threading.get_native_id()
            self._send_one(drop.pages)

        with drop.scope:
            await self._in_a_thread(send)
            drop.done.set()
        self._dropping -= Counter((drop.pages.node,))
        self.release_evictions(drop.pages.node)

    async def _in_a_thread(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a call in a thread, as soon as one can be started."""
        begun = False
        await before_wait()

        def run() -> T:
            nonlocal begun
            begun = True
            return call(*args)

        while True:
            try:
                return await trio.to_thread.run_sync(run, abandon_on_cancel=True, limiter=self._limiter)
            except RuntimeError as exc:  # a limit on processes, or no memory
                if begun:
                    raise
                log.warning("stale caches of the kernel cannot be invalidated now: %s", exc)
                await trio.sleep(NO_THREAD_SECONDS)

    async def attributes_changed(self, node: int) -> None:
        """Invalidate the attributes of a node; returns when the kernel has done so.

        It takes no page lock, so it may be awaited while an open of that node is being handled.
        """
        await before_wait()
        await trio.to_thread.run_sync(self._send_one, node, True)

    async def refreshed(self, node: int, generation: int, path: bytes, *, pages: bool = False) -> None:
        """Invalidate the attributes of a node, and wait until the kernel has its size (``size_sync``).

        ``pages`` says that its pages are stale, too. The wait has a limit.
        """
        await (self.pages_dropped(node) if pages else self.attributes_changed(node))
        self._refresh(AttrRefresh(node, generation, path))

        async def _refresh_once() -> None:
            for _ in range(2):  # one may have begun before the change
                if (refreshing := self._refreshing.get(node)) is not None:
                    await refreshing.wait()

        await wait_with_stall_grace(REFRESH_SECONDS, _refresh_once)

    def _refresh(self, request: AttrRefresh) -> None:
        """Start a refresh, unless too many hang.

        Each may hang for as long as the source does. So there is one for a file at a time, and a limit
        on all. A refresh that began before the last change may miss it, so it is repeated.
        """
        if self._where is None or self._nursery is None:
            return
        if not (self._opens_handles or request.path):
            return
        if request.node in self._refreshing:
            self._again[request.node] = request
        elif len(self._refreshing) < MAX_REFRESHES:
            self._refreshing[request.node] = trio.Event()
            self._nursery.start_soon(self._run_refresh, self._where, request)

    async def _run_refresh(self, where: MountedAt, request: AttrRefresh) -> None:
        path = b"" if self._opens_handles else request.path
        try:
            await self._isolated.run_sync(
                refresh_kernel_size, where, request.node, request.generation, path
            )
        except Exception:  # the mount works without it
            log.exception("the kernel's size of a file could not be refreshed")
        finally:
            self._refreshing.pop(request.node).set()
            if (again := self._again.pop(request.node, None)) is not None:
                self._refresh(again)

    async def _send_some(self, batch: deque[Item], sent: trio.Event) -> None:
        done = await self._in_a_thread(self._send_all, batch)
        for item in done:
            if isinstance(item, AttrRefresh):
                self._refresh(item)
        self._sent(done)
        sent.set()

    def _sent(self, items: list[Item]) -> None:
        self._sending -= Counter(items)
        for item in items:
            if node := _node_of(item):
                self.release_evictions(node)
        self._note_pending(*items)
        if not self._queued and not self._sending:
            self._drained.set()
            self._drained = trio.Event()

    def _queue(self, item: Item) -> None:
        if item not in self._queued:
            self._queued.add(item)
            if node := _node_of(item):
                self.hold_evictions(node)
            self._note_pending(item)
            self._send.send_nowait(item)

    # -- in threads -----------------------------------------------------------------------------

    def _send_all(self, batch: deque[Item] | deque[tuple[int, bytes]]) -> list[Item]:
        """Send the items that no other thread has taken from the batch. Returns those sent."""
        done: list[Item] = []
        with contextlib.suppress(IndexError):
            while True:
                done.append(item := batch.popleft())
                if not isinstance(item, AttrRefresh):
                    self._send_one(item)
        return done

    def _send_one(self, item: Notification, attributes_only: bool = False) -> None:
        try:
            if self._device < 0:
                _send_by_pyfuse3(item, attributes_only)
            elif isinstance(item, Pages):
                self._write(inode_message(item.node, offset=item.offset, length=item.length))
            elif isinstance(item, int):
                self._write(inode_message(item, attributes_only=attributes_only))
            elif isinstance(item, Expiry):
                self._write(entry_message(item.parent, item.name, FUSE_EXPIRE_ONLY))
            else:
                self._write(entry_message(*item))
        except OSError as exc:
            if exc.errno not in GONE:
                log.warning("the kernel refused to invalidate %r: %s", item, exc)

    def _write(self, message: bytes) -> None:
        with self._lock:
            if self._closed:
                return
            self._writers += 1
        try:
            os.write(self._device, message)
        finally:
            self._written()

    def _written(self) -> None:
        with self._lock:
            self._writers -= 1
            if self._closed and not self._writers:
                os.close(self._device)


def _node_of(item: Item) -> int:
    """Return the node whose pages an item invalidates; 0 for none."""
    if isinstance(item, Pages):
        return item.node
    return item if isinstance(item, int) else 0


def _send_by_pyfuse3(item: Notification, attributes_only: bool) -> None:
    if isinstance(item, Pages):
        item = item.node
    if isinstance(item, int):
        pyfuse3.invalidate_inode(pyfuse3.InodeT(item), attr_only=attributes_only)
        return
    parent, name = (item.parent, item.name) if isinstance(item, Expiry) else item
    pyfuse3.invalidate_entry(pyfuse3.InodeT(parent), pyfuse3.FileNameT(name))
