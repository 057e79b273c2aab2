"""The inode table: what the kernel's node ids stand for.

An inode is a (device, inode number) pair below the source, held by an O_PATH descriptor: it is
followed through renames and links, inside and outside the mount, and its number can not be given to
another file while we hold it. Where numbers do not last, or say nothing (``identity``), the pair is
(device, file handle), and only while it is held; then the inode is found again by its dentry.

Descriptors are scarce (20,000 by default), inodes are not. The table keeps at most ``fd_budget`` of
them, and fewer when more than that many files are open. Beyond, the least recently used inode that no
request uses is *parked*: its descriptor is closed, and its
file handle (``name_to_handle_at``) and last known place, a parent and a name, are kept. When it is
used again it is opened through an open file of it, by handle, or without the privilege for that by
place, and must still be the same file; else ESTALE, upon which the kernel looks the name up again.
Directory listings enter inodes that were never opened parked, with only their place.

Memory is scarce too: beyond ``max_inodes`` the kernel is asked to forget (``forgettable``).

Everything here runs on the main thread, except ``open_parked``, which waits for the source.
"""

import errno
import mmap
import os
import stat as stat_module
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple, Protocol

import trio

from cleanfs.backends.ops import FileKey
from cleanfs.linux import syscalls
from cleanfs.source.caller import Caller
from cleanfs.source.errors import StaleError
from cleanfs.source.identity import Dentries, Dentry, Place, Rule, Rules
from cleanfs.source.namespace import PATH_FLAGS
from cleanfs.source.space_retry import SpaceRetry

ROOT = 1
"""FUSE's node id of the root."""

DEVICE_SHIFT = 48
"""Node ids of inodes on further file systems: ``nth device << 48 | inode number``."""

DYNAMIC_BASE = 3 << 62
"""First of the node ids given where the derived one is taken."""

CONTROL_BASE = 1 << 63
"""First of the node ids of the control directory; never given to an inode of the source."""

CONTROL_END = CONTROL_BASE + (1 << 32)

LEAST_HELD = 16
"""Inodes that may be held however many files are open."""

EXPECTED = -2
"""In place of a descriptor that is being opened."""

MAX_SIZES = 8
"""Sizes of a file that are remembered as those that the kernel may believe."""


NOT_TOLD = -1
"""No mode and owners."""

UNSURE = -2
"""It is not known which ones."""


def access_of(st: os.stat_result) -> int:
    """Who may open the file, in one number: mode, owner, group."""
    return st.st_mode | st.st_uid << 32 | st.st_gid << 64


def stamps_of(st: os.stat_result) -> tuple[int, int, int]:
    """Size, mtime and ctime: what moves when the content does."""
    return st.st_size, st.st_mtime_ns, st.st_ctime_ns


def generation_of(handle: bytes) -> int:
    """A generation by the handle that the source gives an inode: 32 bits that last as long as that.

    Handles of two files that had one number differ in 32 consecutive bits, which a CRC always shows.
    """
    return zlib.crc32(handle)


class Told(NamedTuple):
    """What the kernel was told of an inode (see ``Inode``'s attributes of these names)."""

    kernel_sizes: tuple[int, ...]
    access: int
    access_ctime: int


UNKNOWN = Told((), UNSURE, 0)
"""Access that is not what it is now."""


class Inode:
    """One file, directory or other object of the source that the kernel knows."""

    __slots__ = (
        "access", "access_ctime", "acl", "asked_for", "dentry", "device",
        "doubts",
        "doubts_settled",
        "dropped_for",
        "fd",
        "file_key",
        "generation",
        "handle",
        "ino",
        "kernel_sizes",
        "kind",
        "lost_capability",
        "name",
        "nlookup",
        "node",
        "open_fds",
        "pages_dropped_by",
        "parent",
        "pins",
        "sent",
        "settling",
        "suspect",
    )  # fmt: skip

    def __init__(self, device: int, ino: int, kind: int, node: int, generation: int) -> None:
        """A parked inode without a place."""
        self.device = device
        self.ino = ino
        self.kind = kind
        """File type bits of the mode."""
        self.node = node
        self.suspect = False
        """Whether a call on ``fd`` failed in a way that another descriptor of the file may not."""
        self.generation = generation
        """Tells the kernel two inodes apart that had one node id at different times."""
        self.fd = -1
        """O_PATH descriptor, or -1 if parked."""
        self.handle: bytes | None = None
        """File handle; None if never asked for, empty if the file system has none."""
        self.dentry: Dentry | None = None
        """Where it was seen last, if that is what it is known by."""
        self.parent: Inode | None = None
        self.name = b""
        self.nlookup = 0
        """The kernel's references."""
        self.pins = 0
        """Requests that are using ``fd``: it must not be closed."""
        self.open_fds: tuple[int, ...] = ()
        """Descriptors of its open file handles."""
        self.file_key: FileKey | None = None
        self.kernel_sizes: tuple[int, ...] = (NOT_TOLD,)
        """Where the kernel may see the end of the file, which is where it appends: the size that it
        was told last, and those from before, as it need not believe what it is told (``doubts``)."""
        self.asked_for: Caller | None = None
        """Whose write may come next: for whom the kernel asked for capabilities, as it does before it
        sends a program's write to a file with set-id bits, and not before it sends what is dirty in a
        mapping. None for nobody, and for root unless a user asked before: a question need not be
        followed by a write, and then it can not be told whose the next one is."""
        self.lost_capability = False
        """Its capabilities were taken away by the last request: by a change to come, it may be."""
        self.sent: tuple[int, int, int] | None = None
        """``stamps_of`` what the kernel was last told, or knows by itself since: it made a write."""
        self.access = NOT_TOLD
        """Mode and owners that the kernel was last told (``access_of``): what it lets callers in by."""
        self.access_ctime = 0
        """The ctime under which that, and the ACL, was told or found to be what it was told."""
        self.acl = b""
        """The access ACL that it was last told; empty for none."""
        self.doubts = self.doubts_settled = 0
        """How often it was told others than before, and how many of these were followed by a
        notification. It need not believe the last that it was told: a reply takes effect when
        whoever asked gets to run, and somebody else may run before."""
        self.dropped_for: object = None
        """The handle whose opening told the kernel to drop the pages. It does when who opens gets to
        run, and somebody else may run before; None when it is known to have done so."""
        self.pages_dropped_by = 0.0
        """When (``trio.current_time``) it should have, or will be told once more."""
        self.settling: trio.Event | None = None
        """Set when the notification that is under way has been made."""

    @property
    def id(self) -> tuple[int, int]:
        """The (device, inode number) pair."""
        return self.device, self.ino

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return self.kind == stat_module.S_IFDIR

    @property
    def idle(self) -> bool:
        """Whether no request and no open file uses it."""
        return not self.pins and not self.open_fds

    def told_size(self, size: int) -> None:
        """The kernel is told the size of the file."""
        if size != self.kernel_sizes[0]:
            older = [other for other in self.kernel_sizes if other not in (size, NOT_TOLD)]
            self.kernel_sizes = (size, *older[: MAX_SIZES - 1])

    @property
    def told(self) -> Told:
        """What the kernel was told last."""
        return Told(self.kernel_sizes, self.access, self.access_ctime)

    def untold(self, before: Told | None = None) -> None:
        """The kernel was not told what we said it was: it may still believe what it was told before.

        Without ``before``: what was to be told does not bear on that.
        """
        self.doubts += 1
        if before is None:
            return
        sizes = dict.fromkeys((*before.kernel_sizes, *self.kernel_sizes))
        if len(sizes) > 1:
            sizes.pop(NOT_TOLD, None)
        self.kernel_sizes = tuple(sizes)[:MAX_SIZES]
        if self.access == before.access:
            self.access_ctime = before.access_ctime
        else:
            self.access = UNSURE

    def set_size(self, size: int) -> None:
        """The kernel had the file truncated."""
        self.kernel_sizes = (size,)

    def wrote_to(self, end: int) -> None:
        """The kernel had the file written, to what is the end of it now, if it was not beyond that."""
        if end > min(self.kernel_sizes):
            self.kernel_sizes = tuple(dict.fromkeys(max(size, end) for size in self.kernel_sizes))

    def appends(self, start: int, stop: int) -> bool:
        """Whether a write may be one at the end that the kernel sees.

        Not what it sends of a mapping: whole pages, of which the last may end where the file does.
        Nor what is written to the beginning, as by who has taken O_APPEND away; all files were empty.
        """
        last, *older = self.kernel_sizes
        if start >= last or start % mmap.PAGESIZE:
            return start == last or start in older
        is_mapped = stop % mmap.PAGESIZE == 0 or stop in self.kernel_sizes
        return start > 0 and start in older and not is_mapped

    def path(self) -> str:
        """A path that stands for ``fd`` in calls that take no O_PATH descriptor."""
        return f"/proc/self/fd/{self.fd}"


@dataclass(frozen=True, slots=True)
class InodeStats:
    """A snapshot."""

    inodes: int
    held: int
    """Inodes with a descriptor."""
    parked_total: int
    """How often a descriptor was closed to stay within the budget."""


class Watcher(Protocol):
    """Who wants to know of inodes."""

    def held(self, inode: Inode) -> None:
        """The inode has a descriptor, from now on or again."""

    def dropped(self, inode: Inode) -> None:
        """The inode is no longer in the table; a descriptor of it is about to be closed."""


class InodeTable:
    """See the module."""

    def __init__(
        self,
        root_fd: int,
        fd_budget: int,
        max_inodes: int,
        space_retry: SpaceRetry,
        rules: Rules,
        lost: Callable[[FileKey], None] = lambda _: None,
        *,
        exports: bool = False,
    ) -> None:
        """``root_fd`` is an O_PATH descriptor of the source and stays the caller's.

        ``lost`` is told of files that nothing leads to any more, though they may be there. ``exports``
        says that generations last where inodes do, for file handles of the mount (``export``).
        """
        st = os.fstat(root_fd)
        self.fd_budget = fd_budget
        self.max_inodes = max_inodes
        self._generations = count(1)
        self._dynamic = count(DYNAMIC_BASE)
        self._devices: dict[int, int] = {st.st_dev: 0}  # st_dev -> order of appearance
        self._mount_fds: dict[int, int] = {st.st_dev: os.open(".", os.O_RDONLY, dir_fd=root_fd)}
        self._nodes: OrderedDict[int, Inode] = OrderedDict()  # least recently used first
        self._by_id: dict[int | tuple[int, int | bytes], Inode] = {}  # by _id
        self._held: OrderedDict[int, Inode] = OrderedDict()  # by node, least recently used first
        self._open_fds = 0
        self._parked_total = 0
        self.forgotten = 0
        """Inodes that left the table."""
        self._watcher: Watcher | None = None
        self.exports = exports
        self._on_drop: Callable[[Inode], None] = lambda _: None
        self._on_leave: Callable[[int, bytes], None] = lambda _, __: None
        self.space_retry = space_retry
        self._rules = rules
        self._dentries = Dentries()
        self._lost = lost
        self.root = Inode(st.st_dev, st.st_ino, stat_module.S_IFDIR, ROOT, next(self._generations))
        self.root.fd = os.dup(root_fd)
        self.root.nlookup = 1
        self.root.pins = 1
        self._nodes[ROOT] = self.root
        if rules[st.st_dev] is Rule.PATH:
            self._settle(self.root, self._dentries.make(st.st_dev, None, (st.st_dev, b"")))
            self.root.handle = syscalls.event_handle(root_fd)
        self._know(self.root)

    def watch(self, watcher: Watcher) -> None:
        """Tell ``watcher`` of every inode that is held from now on."""
        self._watcher = watcher

    def on_drop(self, call: Callable[[Inode], None]) -> None:
        """Call ``call`` with every inode that leaves the table."""
        self._on_drop = call

    def on_leave(self, call: Callable[[int, bytes], None]) -> None:
        """Call ``call`` with places (parent node, name) that files were found to have left."""
        self._on_leave = call

    # Invariant: _by_id holds the inode that the source has now under that pair; _nodes also holds
    # inodes that the kernel still refers to although their number was given to another file. Where
    # numbers do not last it holds only inodes with a descriptor.

    def __getitem__(self, node: int) -> Inode:
        """The inode of a node id that the kernel has not forgotten. Raises StaleError."""
        try:
            return self._nodes[node]
        except KeyError:
            raise StaleError from None

    def get(self, node: int) -> Inode | None:
        """The same, None if there is none."""
        return self._nodes.get(node)

    def __len__(self) -> int:
        """Inodes in the table."""
        return len(self._nodes)

    def find(self, st: os.stat_result) -> Inode | None:
        """The inode of what was stat'ed, if the kernel knows it."""
        return self.by_id(st.st_dev, st.st_ino)

    def by_id(self, device: int, ino: int) -> Inode | None:
        """The inode of a (device, inode number) pair, if the kernel knows it."""
        return self._by_id.get(self._key(device, ino))

    def all(self) -> list[Inode]:
        """Every inode in the table."""
        return list(self._nodes.values())

    def looked_up(self, fd: int, st: os.stat_result, parent: Inode, name: bytes) -> Inode:
        """A lookup opened ``fd``: the inode that it refers to, with one more kernel reference.

        Takes over ``fd``.
        """
        inode = self._find_opened(fd, st, parent, name)
        if inode is None:
            inode = self._new(st, parent, name, _handle_of(fd) if self.exports else None)
        if inode.fd < 0:
            self._hold(inode, fd, st.st_ino)
        else:
            if inode.suspect and stat_module.S_IFMT(st.st_mode) == inode.kind:
                # In place: whoever is using the number goes on with what is there now.
                os.dup2(fd, inode.fd, inheritable=False)
                inode.suspect = False
                if inode.dentry is None:
                    inode.handle = inode.file_key = None
            os.close(fd)
            self._touch(inode)
        self.referenced(inode, st, parent, name)
        return inode

    def lasts(self, device: int) -> bool:
        """Whether inode numbers and file handles of a file system last, and handles can be opened."""
        return self.exports and self._rules[device] is Rule.INODE

    def decode(self, node: int) -> tuple[int, int]:
        """Device and inode number that a derived node id stands for. Raises StaleError."""
        nth = node >> DEVICE_SHIFT
        device = next((device for device, number in self._devices.items() if number == nth), None)
        if device is None or nth == 0:
            device, ino = self.root.device, node
        else:
            ino = node & ((1 << DEVICE_SHIFT) - 1)
        if not 1 < node < DYNAMIC_BASE or CONTROL_BASE <= node < CONTROL_END:
            raise StaleError
        return device, ino

    def decoded(self, fd: int, st: os.stat_result, handle: bytes, node: int = 0) -> Inode:
        """A file handle led to ``fd``: the inode that it refers to, with one more kernel reference.

        Takes over ``fd``. Raises StaleError if inodes of that file system do not last, or if ``node``,
        unless it is 0, is not its node id.
        """
        inode = self.by_id(st.st_dev, st.st_ino) if self.lasts(st.st_dev) else None
        if inode is not None and inode.fd < 0 and not is_parked(inode, fd, st):
            inode = None
        taken = node in self._nodes if inode is None else node not in (0, inode.node)
        if taken or not self.lasts(st.st_dev):
            os.close(fd)
            raise StaleError
        if inode is None:
            inode = self._make(st, handle, node)
            self._know(inode)
        if inode.fd < 0:
            self._hold(inode, fd, st.st_ino)
        else:
            os.close(fd)
        inode.nlookup += 1
        return inode

    def listed(
        self, st: os.stat_result, parent: Inode, name: bytes, handle: bytes | None = None
    ) -> Inode:
        """A directory listing saw ``st``: its inode, parked if new. The kernel has no reference yet.

        ``handle`` is its file handle, if asked for. Call ``referenced`` next, and ``forget`` if the
        entry does not fit into the reply.
        """
        inode = self._find_listed(st, parent, name)
        if inode is None:
            inode = self._new(st, parent, name, handle)
            inode.parent, inode.name = parent, name
        return inode

    def referenced(self, inode: Inode, st: os.stat_result, parent: Inode, name: bytes) -> None:
        """The kernel got one more reference, by this name, under which ``st`` was found."""
        inode.nlookup += 1
        if (
            st.st_nlink == 1
            and inode.parent is not None
            and (inode.parent is not parent or inode.name != name)
        ):
            self._on_leave(inode.parent.node, inode.name)
        self.moved(inode, parent, name)

    def forget(self, node: int, nlookup: int) -> None:
        """The kernel gave up ``nlookup`` references."""
        inode = self._nodes.get(node)
        if inode is None or inode is self.root:
            return
        inode.nlookup -= nlookup
        self._drop_unused(inode)

    def moved(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """The inode has a new place, or is seen at its old one."""
        inode.parent, inode.name = parent, name
        if inode.dentry is not None:
            place = self._place(inode.device, parent, name)
            if inode.dentry.place != place:
                self._clear(place)
                self._dentries.move(inode.dentry, parent.dentry, place)

    def lost_name(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """A name of the inode was taken away through the mount: the kernel goes by another, if any."""
        if inode.parent is parent and inode.name == name:
            inode.parent, inode.name = None, b""

    def check_may_open(self) -> None:
        """Raises OSError (EMFILE) if another open file would leave no descriptors for anything else."""
        if self._open_fds >= 2 * self.fd_budget:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def opened(self, inode: Inode, fd: int) -> None:
        """A file handle on the inode has ``fd``."""
        inode.open_fds += (fd,)
        self._open_fds += 1
        self.shrink()

    @contextmanager
    def closing(self, inode: Inode, fd: int) -> Iterator[None]:
        """Around the close of a file handle: the inode stays in the table until that has been done."""
        self.space_retry.closing(inode.node)
        self._open_fds -= 1
        inode.open_fds = tuple(other for other in inode.open_fds if other != fd)
        inode.pins += 1
        try:
            yield
        finally:
            self.unpin(inode)

    @contextmanager
    def using(self, inode: Inode) -> Iterator[None]:
        """Around requests that use ``inode.fd`` across an await."""
        self.pin(inode)
        try:
            yield
        finally:
            self.unpin(inode)

    def pin(self, inode: Inode) -> None:
        """``inode.fd`` is in use from now on."""
        self._touch(inode)
        inode.pins += 1

    def unpin(self, inode: Inode) -> None:
        """And no longer."""
        inode.pins -= 1
        self._drop_unused(inode)

    def unpark(self, inode: Inode, fd: int, ino: int) -> None:
        """``open_parked`` gave ``fd`` and ``ino``; somebody else may have been faster."""
        if inode.fd < 0:
            self._hold(inode, fd, ino)
        else:
            os.close(fd)

    def mount_fd(self, device: int) -> int:
        """A descriptor on the file system ``device``, for opening by handle; -1 if there is none."""
        return self._mount_fds.get(device, -1)

    def wants_mount_fd(self, inode: Inode) -> bool:
        """Whether an open of the inode would give a ``mount_fd``, which its file system has not yet."""
        return inode.is_dir and inode.device not in self._mount_fds

    def expect_mount_fd(self, device: int) -> None:
        """Somebody opens one."""
        self._mount_fds[device] = EXPECTED

    def add_mount_fd(self, device: int, fd: int) -> None:
        """Takes over ``fd``; -1: there can be none, and inodes are opened by place instead."""
        self._mount_fds[device] = fd
        if self._watcher is not None:  # which waited for it
            for inode in [inode for inode in self._held.values() if inode.device == device]:
                self._watcher.held(inode)

    def shrink(self, budget: int | None = None) -> None:
        """Park the least recently used inodes down to ``budget`` descriptors, or to the usual."""
        most = self._most_held() if budget is None else budget
        tries = len(self._held)
        while len(self._held) > most and tries > 0:
            tries -= 1
            node, inode = self._held.popitem(last=False)
            if inode.pins:
                self._held[node] = inode  # in use: to the young end
                continue
            if inode.handle is None:
                try:
                    inode.handle = syscalls.name_to_handle(inode.fd)
                except OSError:
                    inode.handle = b""  # the source fails: it has its place
            if inode.dentry is not None:
                self._know_no_more(inode)
            os.close(inode.fd)
            inode.fd = -1
            self._parked_total += 1

    def forgettable(self, most: int) -> list[tuple[int, bytes]]:
        """Up to ``most`` places (parent node, name) that the kernel should forget, oldest first.

        Empty while there are no more than ``max_inodes``. Directories are left alone: to drop one
        from the kernel's cache also unmounts what the user mounted below it.
        """
        places: list[tuple[int, bytes]] = []
        if len(self._nodes) <= self.max_inodes:
            return places
        for inode in list(islice(self._nodes.values(), most)):
            if inode.idle and not inode.is_dir and inode.parent is not None:
                places.append((inode.parent.node, inode.name))
            self._nodes.move_to_end(inode.node)  # others come first next time
        return places

    def next_dynamic(self) -> int:
        """A node id that nothing has, had or will have."""
        return next(self._dynamic)

    def stats(self) -> InodeStats:
        """A snapshot."""
        return InodeStats(len(self._nodes), len(self._held) + 1, self._parked_total)

    def close(self) -> None:
        """Close every descriptor."""
        for inode in self._nodes.values():
            if inode.fd >= 0:
                os.close(inode.fd)
        for fd in self._mount_fds.values():
            os.close(fd)
        self._nodes.clear()
        self._by_id.clear()
        self._held.clear()
        self._mount_fds.clear()

    def _new(self, st: os.stat_result, parent: Inode, name: bytes, handle: bytes | None) -> Inode:
        if self._rules[st.st_dev] is Rule.INODE:
            inode = self._make(st, handle)
            self._know(inode)
            return inode
        inode = self._make(st, None)
        self._settle(inode, self._vacant_dentry(st.st_dev, parent, name))
        return inode

    def _make(self, st: os.stat_result, handle: bytes | None, node: int = 0) -> Inode:
        node = node or self._node_id(st)
        kind = stat_module.S_IFMT(st.st_mode)
        generation = generation_of(handle) if handle else next(self._generations)
        inode = Inode(st.st_dev, st.st_ino, kind, node, generation)
        inode.handle = handle
        self._nodes[node] = inode
        return inode

    def _key(self, device: int, ino: int) -> int | tuple[int, int]:
        """What stands for the pair: on the first file system the number, as a tuple takes 56 bytes."""
        return ino if self._devices.get(device) == 0 else (device, ino)

    def _node_id(self, st: os.stat_result) -> int:
        """The inode number itself on the first file system; unique in any case."""
        nth = self._devices.setdefault(st.st_dev, len(self._devices))
        node = st.st_ino if nth == 0 else nth << DEVICE_SHIFT | st.st_ino
        fits = 1 < node < DYNAMIC_BASE and not CONTROL_BASE <= node < CONTROL_END
        if fits and (nth == 0 or st.st_ino < 1 << DEVICE_SHIFT) and node not in self._nodes:
            return node
        return self.next_dynamic()

    def _hold(self, inode: Inode, fd: int, ino: int) -> None:
        inode.fd = fd
        if inode.dentry is not None:
            inode.ino, inode.handle = ino, syscalls.event_handle(fd)
            self._know(inode)
        self._held[inode.node] = inode
        # The first directory of a file system comes again, once there is a descriptor for handles.
        awaited = EXPECTED if inode.is_dir else -1
        if self._watcher is not None and self._mount_fds.get(inode.device, awaited) != EXPECTED:
            self._watcher.held(inode)
        self.shrink()

    def _most_held(self) -> int:
        """Open files come first: what they leave of both halves, and at most one half."""
        left = 2 * self.fd_budget - self._open_fds
        return min(max(left, LEAST_HELD), self.fd_budget)

    def _touch(self, inode: Inode) -> None:
        if inode.node in self._nodes:
            self._nodes.move_to_end(inode.node)
        if inode.node in self._held:
            self._held.move_to_end(inode.node)

    def _drop_unused(self, inode: Inode) -> None:
        if inode.nlookup <= 0 and inode.idle:
            self._drop(inode)

    def _drop(self, inode: Inode) -> None:
        self.forgotten += 1
        # The tables may have a successor of it by now.
        if self._nodes.get(inode.node) is inode:
            del self._nodes[inode.node]
        self._know_no_more(inode)
        if self._held.get(inode.node) is inode:
            del self._held[inode.node]
        if self._watcher is not None:
            self._watcher.dropped(inode)
        self._on_drop(inode)
        if inode.fd >= 0:
            os.close(inode.fd)
            inode.fd = -1
        self.space_retry.given_up(inode.node)
        if inode.dentry is not None:
            inode.dentry.occupant = None
            if inode.dentry.place is None:
                self._lost(inode.dentry.key)

    # -- which inode it is ----------------------------------------------------------------------

    def _find_opened(self, fd: int, st: os.stat_result, parent: Inode, name: bytes) -> Inode | None:
        """The inode of what a lookup opened."""
        if self._rules[st.st_dev] is Rule.INODE:
            inode = self._by_id.get(self._key(st.st_dev, st.st_ino))
            if inode is not None and inode.fd < 0 and not is_parked(inode, fd, st):
                return None  # the number was given to another file while this one was parked
            return inode
        held = self._by_id.get((st.st_dev, syscalls.event_handle(fd) or st.st_ino))
        if held is not None:
            return held
        inode = self._at(st.st_dev, parent, name)
        return inode if inode is not None and inode.fd < 0 and is_parked(inode, fd, st) else None

    def _find_listed(self, st: os.stat_result, parent: Inode, name: bytes) -> Inode | None:
        """The inode of what a listing saw."""
        kind = stat_module.S_IFMT(st.st_mode)
        if self._rules[st.st_dev] is Rule.INODE:
            inode = self._by_id.get(self._key(st.st_dev, st.st_ino))
            return None if inode is not None and inode.fd < 0 and kind != inode.kind else inode
        inode = self._at(st.st_dev, parent, name)
        if inode is None:
            return None
        same = looks_like(inode, st) if inode.fd < 0 else st.st_ino == inode.ino
        return inode if same and kind == inode.kind else None

    def known_as(self, key: FileKey) -> Inode | None:
        """The inode that the source has now under a key (``namespace.file_key``), if in the table."""
        if self._rules[key.device] is Rule.INODE:
            return self.by_id(key.device, key.inode)
        return self._by_id.get((key.device, key.generation or key.inode))

    def subject(self, key: FileKey, parent: Inode, name: bytes) -> tuple[Inode | None, FileKey]:
        """What a change of names was about: its inode, if in the table, and what its pages hang on.

        ``key`` is what the source called it (``namespace.file_key``); it had that name right before.
        """
        inode = self.known_as(key)
        if self._rules[key.device] is Rule.INODE:
            return inode, key
        if inode is None:
            dentry = self.dentry(key.device, parent, name)
            if dentry is None:
                return None, key
            if dentry.occupant is None:
                return None, dentry.key
            assert isinstance(dentry.occupant, Inode)
            if dentry.occupant.fd >= 0:  # it is another
                return None, key
            inode = dentry.occupant
        return inode, inode.file_key or key

    def may_be_link(self, st: os.stat_result) -> bool:
        """Whether a listed file may have an inode in the table that only a lookup finds."""
        linked = st.st_nlink > 1 and not stat_module.S_ISDIR(st.st_mode)
        return linked and self._rules[st.st_dev] is Rule.PATH

    def is_inode_of(self, inode: Inode, key: FileKey) -> bool:
        """Whether an inode with a descriptor is what the source calls ``key``."""
        same_handle = inode.dentry is None or not key.generation or inode.handle == key.generation
        return inode.id == (key.device, key.inode) and same_handle

    def _know(self, inode: Inode) -> None:
        self._by_id[self._id(inode)] = inode

    def _know_no_more(self, inode: Inode) -> None:
        if self._by_id.get(self._id(inode)) is inode:
            del self._by_id[self._id(inode)]

    def _id(self, inode: Inode) -> int | tuple[int, int | bytes]:
        if inode.dentry is not None:
            return inode.device, inode.handle or inode.ino
        return self._key(inode.device, inode.ino)

    # -- dentries ---------------------------------------------------------------------------------

    def dentry(self, device: int, parent: Inode, name: bytes) -> Dentry | None:
        """The dentry of a name, if there is one. Where files are known by inode there never is."""
        return self._dentries.at(self._place(device, parent, name))

    def name_gone(self, device: int, parent: Inode, name: bytes) -> None:
        """A name no longer leads to what it did."""
        self._clear(self._place(device, parent, name))

    def _at(self, device: int, parent: Inode, name: bytes) -> Inode | None:
        dentry = self.dentry(device, parent, name)
        if dentry is None or dentry.occupant is None:
            return None
        assert isinstance(dentry.occupant, Inode)
        return dentry.occupant

    def _place(self, device: int, parent: Inode, name: bytes) -> Place:
        if parent.dentry is None:
            return (device, *parent.id), name
        key = parent.dentry.key
        return (key if parent.device == device else (device, key)), name

    def _vacant_dentry(self, device: int, parent: Inode, name: bytes) -> Dentry:
        """The one of that name, with what is kept of the file; a new one if it is another inode's."""
        place = self._place(device, parent, name)
        dentry = self._dentries.at(place)
        if dentry is not None and dentry.occupant is not None:
            self._clear(place)
            dentry = None
        return dentry or self._dentries.make(device, parent.dentry, place)

    def _settle(self, inode: Inode, dentry: Dentry) -> None:
        inode.dentry, dentry.occupant = dentry, inode
        inode.file_key = dentry.key

    def _clear(self, place: Place) -> None:
        dentry = self._dentries.at(place)
        if dentry is not None:
            self._dentries.remove(dentry)
            if dentry.occupant is None:
                self._lost(dentry.key)


def _handle_of(fd: int) -> bytes | None:
    try:
        return syscalls.name_to_handle(fd)
    except OSError:  # a source that fails says so to whoever wants the file itself
        return None


def is_parked(parked: Inode, fd: int, st: os.stat_result) -> bool:
    """Whether ``fd`` refers to the very file that a parked inode stands for."""
    if (st.st_dev, stat_module.S_IFMT(st.st_mode)) != (parked.device, parked.kind):
        return False
    if parked.dentry is not None and looks_like(parked, st):
        return True
    if st.st_ino != parked.ino:
        return False
    return not parked.handle or syscalls.name_to_handle(fd) == parked.handle


def looks_like(inode: Inode, st: os.stat_result) -> bool:
    """Whether what was found where a parked inode was may pass for it.

    Its pages are held against the fingerprint apart from this. Of a directory nothing is kept.
    """
    return inode.is_dir or inode.sent in (None, stamps_of(st))


def open_parked(inode: Inode, mount_fd: int, parent_fd: int) -> tuple[int, int]:
    """A new O_PATH descriptor of a parked inode, and the number that the source gives it now.

    Waits for the source: call it in a thread.

    Tries an open file of it, its file handle below ``mount_fd``, its name below ``parent_fd``; -1
    for what there is not. Raises StaleError if it is not where it was, OSError if the source fails.
    """
    fd = _open_somehow(inode, mount_fd, parent_fd)
    st = os.fstat(fd)
    # An open file may have been closed and its number used again while we looked.
    if not is_parked(inode, fd, st):
        os.close(fd)
        raise StaleError
    return fd, st.st_ino


def _open_somehow(inode: Inode, mount_fd: int, parent_fd: int) -> int:
    for open_fd in inode.open_fds[-1:]:
        return os.open(f"/proc/self/fd/{open_fd}", os.O_PATH | os.O_CLOEXEC)
    if inode.dentry is not None and inode.dentry.place is None:
        raise StaleError  # its name leads to another
    if inode.handle and mount_fd >= 0 and inode.dentry is None:
        try:
            return syscalls.open_by_handle(mount_fd, inode.handle, os.O_PATH | os.O_NOFOLLOW)
        except PermissionError:
            pass  # needs CAP_DAC_READ_SEARCH; try the place
        except OSError as exc:
            if exc.errno == errno.ESTALE:
                raise StaleError from exc
            raise
    if parent_fd < 0:
        raise StaleError
    try:
        return os.open(inode.name, PATH_FLAGS, dir_fd=parent_fd)
    except FileNotFoundError as exc:
        raise StaleError from exc
