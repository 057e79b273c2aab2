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
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar, TypeVarTuple

import pyfuse3
import trio

from cleanfs.cache.read_ranges import RangeSet
from cleanfs.fuse.isolated_threads import IsolatedThreads
from cleanfs.fuse.size_sync import MountedAt, can_refresh, refresh_kernel_size
from cleanfs.linux.timeouts import wait_with_stall_grace

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

GONE = (errno.ENOENT, errno.ENOSYS, errno.ENOTCONN, errno.EBADF, errno.ENODEV, errno.ENOTEMPTY)
"""Not failures: the kernel had forgotten by itself, or the mount is going."""

STUCK_SECONDS = 0.1
"""A notification waits for pages that are being read, or for a directory that is being changed. If the
source hangs there, the next one is sent all the same after so long."""

REFRESH_SECONDS = 0.5
"""What the kernel gets to learn a file's size before an open is answered: the source may hang."""

REFRESH_THREADS = 8
"""Threads that ask the kernel what it believes."""

MAX_REFRESHES = 64
"""Files that it is asked about at a time. An answer takes some 0.3 ms, unless the source hangs."""

PAGES_SECONDS = 0.5
"""What the kernel gets to drop pages before a write is answered. It takes 0.1 ms."""

PAGES_LOOK_SECONDS = 0.001
"""How often it is looked whether that waits, as it may be for the answer."""

NO_THREAD_SECONDS = 1.0
"""When a thread is tried for again where none can be started."""

MAX_STUCK = 256
"""Notifications that may be on their way at a time."""


BATCH: Final = 64
"""Notifications that one hop to a thread may send."""

HEADER: Final = struct.Struct("=IiQ")
"""fuse_out_header: length, error (of a notification, what it is), unique (0)."""

INVAL_INODE: Final = struct.Struct("=Qqq")
"""fuse_notify_inval_inode_out: node, offset (negative: attributes alone), length (0: to the end)."""

INVAL_ENTRY: Final = struct.Struct("=QII")
"""fuse_notify_inval_entry_out: parent, namelen, flags."""

FUSE_NOTIFY_INVAL_INODE: Final = 2
FUSE_NOTIFY_INVAL_ENTRY: Final = 3
FUSE_EXPIRE_ONLY: Final = 1


@dataclass(frozen=True, slots=True)
class Expiry:
    """A name that the kernel should look up again before it believes it."""

    parent: int
    name: bytes


@dataclass(frozen=True, slots=True)
class AttrRefresh:
    """A file whose attributes the kernel should ask for now, and not when it next needs them."""

    node: int
    generation: int


@dataclass(frozen=True, slots=True)
class Pages:
    """A range of a file, in bytes, whose pages are out of date."""

    node: int
    offset: int
    length: int


Notification = int | tuple[int, bytes] | Expiry | Pages
Item = Notification | AttrRefresh


def inode_message(
    node: int, *, attributes_only: bool = False, offset: int = 0, length: int = 0
) -> bytes:
    """What libfuse calls ``fuse_lowlevel_notify_inval_inode``."""
    body = INVAL_INODE.pack(node, -1 if attributes_only else offset, length)
    return _message(FUSE_NOTIFY_INVAL_INODE, body)


def entry_message(parent: int, name: bytes, flags: int = 0) -> bytes:
    """``fuse_lowlevel_notify_inval_entry``, and with FUSE_EXPIRE_ONLY ``..._expire_entry``.

    Linux before 6.2 takes the second for the first, which is the stronger one.
    """
    body = INVAL_ENTRY.pack(parent, len(name), flags) + name + b"\0"
    return _message(FUSE_NOTIFY_INVAL_ENTRY, body)


def _message(what: int, body: bytes) -> bytes:
    return HEADER.pack(HEADER.size + len(body), what, 0) + body


class _Drop:
    """The notification of a write's pages."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.done = trio.Event()
        self.scope = trio.CancelScope()
        self.thread = 0
        """Which one sends it, once that runs."""

    def waits(self) -> bool:
        """Whether that thread waits in the kernel, for a page: no signal would end that."""
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
        self._where: MountedAt | None = None
        self._isolated = IsolatedThreads(REFRESH_THREADS)
        self._refreshing: dict[int, trio.Event] = {}  # nodes that the kernel is being asked about
        self._in_a_hurry = False
        self._again: dict[int, AttrRefresh] = {}  # those that are to be asked about once more
        self._nursery: trio.Nursery | None = None
        self.explicit = False
        """Whether the kernel drops pages only when it is told to, and not as soon as it is told of
        another mtime or size (FUSE_EXPLICIT_INVAL_DATA, see ``handshake``)."""
        # By node, of which an inode number that was given away may have two.
        self._in_writing: dict[int, list[RangeSet]] = {}
        self._dropping: Counter[int] = Counter()  # nodes of writes whose pages are being dropped
        self._lock = threading.Lock()  # of the next two; nobody waits for anything who has it
        self._writers = 0
        self._closed = False

    def use_device(self, fd: int) -> None:
        """The descriptor of the FUSE device; -1 if it is not known.

        With it, notifications go by a descriptor of our own: libfuse's may be another file for a
        moment (``interrupts``). Without it pyfuse3 sends them, and expiries are sent as drops.
        """
        self._device = -1 if fd < 0 else os.dup(fd)

    def start(self) -> None:
        """Before the device is opened."""
        self._isolated.start()

    def use_mount(self, where: MountedAt) -> None:
        """Where the kernel can be asked what it believes, if we may."""
        if can_refresh():
            self._where = where
        else:
            log.info("the kernel cannot be asked what size it believes: CAP_DAC_READ_SEARCH is missing")

    def hurry(self) -> None:
        """Nobody is kept waiting any more for what is out of date to be dropped.

        There is little time, and much to write that is dirty in mappings: a drop for each of its pages
        would be most of the work (4,096 scattered ones took 3.1 s and not 0.7).
        """
        self._in_a_hurry = True

    def close(self) -> None:
        """The device is about to be closed, upon which the kernel ends every wait for an answer.

        A thread may be about to write to ours: then the number leads nowhere, until it has.
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

    def in_writing(self, node: int, answers: RangeSet) -> None:
        """A file is open for writing: note in ``answers`` when its pages may be dropped."""
        self._in_writing.setdefault(node, []).append(answers)

    def not_in_writing(self, node: int, answers: RangeSet) -> None:
        """Nobody has it open for writing any more."""
        self._in_writing[node].remove(answers)
        if not self._in_writing[node]:
            del self._in_writing[node]

    def may_drop(self, node: int) -> None:
        """The kernel may drop pages of a node that a program has just filled."""
        for answers in self._in_writing.get(node, ()):
            answers.dropped = True

    def may_drop_any(self) -> None:
        """Of any node."""
        for node in self._in_writing:
            self.may_drop(node)

    def inode(self, node: int) -> None:
        """The attributes and all pages of a node are out of date."""
        self.may_drop(node)
        self._queue(node)

    async def pages_dropped(self, node: int) -> None:
        """The same; returns when the kernel has dropped them.

        Not for a request that sets a size: the kernel holds back writes until that is answered, and
        what is dirty is written before it is dropped. It waits where a page is being read or written,
        as the kernel itself would have that drops pages upon an answer. Who waits for it must hold no
        lock that a read or a write needs.
        """
        self.may_drop(node)
        self._queued.discard(node)
        self._sending[node] += 1
        try:
            await self._in_a_thread(self._send_one, node)
        finally:
            self._sent([node])

    def entry(self, parent: int, name: bytes) -> None:
        """The kernel should drop a name, and with it, if idle, the inode."""
        self._queue((parent, name))

    def expire(self, parent: int, name: bytes) -> None:
        """The kernel should look a name up again, and keep what it has if that is what is found.

        To drop it would unmount what is mounted below a directory, and cut off who works in it.
        """
        self._queue(Expiry(parent, name))

    def refresh(self, node: int, generation: int) -> None:
        """The kernel should believe the present size of a file, after all that is queued by now."""
        self._queue(AttrRefresh(node, generation))

    def is_pending(self, node: int) -> bool:
        """Whether the kernel has yet to learn that a node's pages are out of date."""
        return node in self._queued or node in self._sending

    def drops_pages(self, node: int) -> bool:
        """Whether the kernel is being told to drop pages of a node, or will be."""
        return self.is_pending(node) or node in self._dropping

    def is_learning(self, node: int) -> bool:
        """Whether the kernel is just asked for the size of a node, until it believes it."""
        return node in self._refreshing

    async def drained(self) -> None:
        """Return when all that was queued has been sent."""
        if self._queued or self._sending:
            await self._drained.wait()

    async def run(self) -> None:
        """Send, in order unless one is stuck, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._isolated.run)
            async for item in self._receive:
                batch = deque([item])
                with contextlib.suppress(trio.WouldBlock):
                    while len(batch) < BATCH:
                        batch.append(self._receive.receive_nowait())
                batch = deque(item for item in dict.fromkeys(batch) if item in self._queued)
                # Before they are sent: what is queued from now on may be news.
                self._queued.difference_update(batch)
                self._sending.update(batch)
                while batch:
                    sent = trio.Event()
                    nursery.start_soon(self._send_some, batch, sent)
                    with trio.move_on_after(STUCK_SECONDS):
                        await sent.wait()

    async def drop_names(self, places: list[tuple[int, bytes]]) -> None:
        """Have the kernel drop names (parent node, name), and with each, if idle, the inode.

        All in one thread call: with one for each name, programs that look names up are faster.
        """
        await trio.to_thread.run_sync(self._send_all, deque(places), abandon_on_cancel=True)

    async def written(self, node: int, start: int, stop: int, read: Callable[[], bool]) -> None:
        """The pages of a write are out of date; returns when the kernel has dropped them, or soon.

        The kernel keeps a page locked until the write is answered if it did not have the rest of it
        (``fuse_fill_write_pages``), and waits for the answer to what it sends of a mapping. So this
        does not wait where the thread that tells it does, unless that can be for a page which is just
        being ``read``: such a read will end, if the source does not hang. A thread that only wants a
        processor is waited for.
        """
        if self._nursery is None or self._in_a_hurry:
            self.inode(node)
            return
        drop = _Drop(Pages(node, start, stop - start))
        self._dropping[node] += 1
        self._nursery.start_soon(self._drop, drop)
        until = trio.current_time() + PAGES_SECONDS
        looks = 0  # a read that was sent before may come between two
        while not drop.done.is_set() and looks < 2 and trio.current_time() <= until:
            with trio.move_on_after(PAGES_LOOK_SECONDS):
                await drop.done.wait()
            looks = looks + 1 if drop.waits() and not read() else 0
        if not drop.thread:  # so many others are stuck
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

    async def _in_a_thread(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """As soon as there may be one more."""
        begun = False

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
                log.warning("the kernel cannot be told now of what is out of date: %s", exc)
                await trio.sleep(NO_THREAD_SECONDS)

    async def attributes_changed(self, node: int) -> None:
        """The attributes of a node are out of date; returns when the kernel knows.

        Takes no page lock, so it may be awaited while an open of that node is being handled.
        """
        await trio.to_thread.run_sync(self._send_one, node, True)

    async def refreshed(self, node: int, generation: int, *, pages: bool = False) -> None:
        """The same; returns when the kernel believes the present size (``belief``), or need not.

        ``pages`` says that its pages are out of date, too.
        """
        await (self.pages_dropped(node) if pages else self.attributes_changed(node))
        self._learn(AttrRefresh(node, generation))

        async def _refresh_once() -> None:
            for _ in range(2):  # something may have been asked before
                if (learning := self._refreshing.get(node)) is not None:
                    await learning.wait()

        await wait_with_stall_grace(REFRESH_SECONDS, _refresh_once)

    def _learn(self, lesson: AttrRefresh) -> None:
        """Have the kernel asked, unless it is being asked, or too many questions hang.

        Each may hang for as long as the source does. So there is one for a file at a time, and a
        bound on all. One that was asked before need not have heard of the last change.
        """
        if self._where is None or self._nursery is None:
            return
        if lesson.node in self._refreshing:
            self._again[lesson.node] = lesson
        elif len(self._refreshing) < MAX_REFRESHES:
            self._refreshing[lesson.node] = trio.Event()
            self._nursery.start_soon(self._have_learned, self._where, lesson)

    async def _have_learned(self, where: MountedAt, lesson: AttrRefresh) -> None:
        try:
            await self._isolated.ask(refresh_kernel_size, where, lesson.node, lesson.generation)
        except Exception:  # it is for the best, not for life
            log.exception("the kernel could not be asked")
        finally:
            self._refreshing.pop(lesson.node).set()
            if (again := self._again.pop(lesson.node, None)) is not None:
                self._learn(again)

    async def _send_some(self, batch: deque[Item], sent: trio.Event) -> None:
        done = await self._in_a_thread(self._send_all, batch)
        for item in done:
            if isinstance(item, AttrRefresh):
                self._learn(item)
        self._sent(done)
        sent.set()

    def _sent(self, items: list[Item]) -> None:
        self._sending -= Counter(items)
        if not self._queued and not self._sending:
            self._drained.set()
            self._drained = trio.Event()

    def _queue(self, item: Item) -> None:
        if item not in self._queued:
            self._queued.add(item)
            self._send.send_nowait(item)

    # -- in threads -----------------------------------------------------------------------------

    def _send_all(self, batch: deque[Item] | deque[tuple[int, bytes]]) -> list[Item]:
        """Send what nobody else has taken from the batch. Returns what was sent."""
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


def _send_by_pyfuse3(item: Notification, attributes_only: bool) -> None:
    if isinstance(item, Pages):
        item = item.node
    if isinstance(item, int):
        pyfuse3.invalidate_inode(pyfuse3.InodeT(item), attr_only=attributes_only)
        return
    parent, name = (item.parent, item.name) if isinstance(item, Expiry) else item
    pyfuse3.invalidate_entry(pyfuse3.InodeT(parent), pyfuse3.FileNameT(name))
