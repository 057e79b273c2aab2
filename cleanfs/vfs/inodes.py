"""Map the kernel's node ids to inodes (``node_ids``, ``inode``).

An inode is a (device, inode number) pair below the source, held by an O_PATH fd. The fd follows the
file through renames and links, inside and outside the mount. While it is open, no other file can get
the inode number. Where numbers do not last, or identify nothing (``identity``), the pair is (device,
file handle) while the inode is held; afterwards it is found again by its dentry.

Fds are scarce (20,000 by default), inodes are not. The table keeps at most ``fd_budget`` of them, and
fewer when more than that many files are open. Beyond that, the least recently used inode that no
request uses is *parked*: its fd is closed. Its file handle (``name_to_handle_at``) and its last known
place, a parent and a name, are kept. When it is used again, it is opened through an open file of it, by
handle, or by place if the daemon may not open handles (``parking``). Directory listings enter inodes
that were never opened; these begin parked, with only their place.

Memory is scarce too: beyond ``max_inodes`` the kernel is made to forget inodes (``forgettable``).

Everything here runs on the main thread.
"""

import errno
import os
import stat as stat_module
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Final, Protocol

from cleanfs.backends.ops import FileKey
from cleanfs.linux import syscalls
from cleanfs.source import file_handles
from cleanfs.source.errors import StaleError
from cleanfs.source.identity import Rule, Rules
from cleanfs.source.space_retry import SpaceRetry
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inode_index import InodeIndex
from cleanfs.vfs.inode_state import InodeStates
from cleanfs.vfs.node_ids import ROOT, NodeIds, generation_of
from cleanfs.vfs.parking import is_parked

LEAST_HELD = 16
"""How many inodes may be held in any case, however many files are open."""

EXPECTED: Final = -2
"""Stands in for an fd that is being opened."""


@dataclass(frozen=True, slots=True)
class InodeStats:
    """Holds a snapshot."""

    inodes: int
    held: int
    """Inodes with a descriptor."""
    parked_total: int
    """How often a descriptor was closed to stay within the budget."""


class Watcher(Protocol):
    """Gets notified of inodes."""

    def held(self, inode: Inode) -> None:
        """Note that the inode has a descriptor, from now on or again."""

    def dropped(self, inode: Inode) -> None:
        """Note that the inode left the table; its descriptor is about to be closed."""


class InodeTable:
    """Maps node ids to inodes (see the module)."""

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
        """Start with the root. ``root_fd`` is an O_PATH fd of the source and stays the caller's.

        ``lost`` is called with files that nothing leads to any more, though they may be there.
        ``exports`` says that generations last where inodes do, for file handles of the mount
        (``export``).
        """
        st = os.fstat(root_fd)
        self.states = InodeStates()
        """The same inodes, as the channel sees them."""
        self.fd_budget = fd_budget
        self.states.wants_handles = exports
        self.max_inodes = max_inodes
        self._generations = count(1)
        self._node_ids = NodeIds(st.st_dev)
        self._mount_fds: dict[int, int] = {st.st_dev: os.open(".", os.O_RDONLY, dir_fd=root_fd)}
        self._nodes: OrderedDict[int, Inode] = OrderedDict()  # least recently used first
        self._index = InodeIndex(rules, self._node_ids, self._nodes, lost)
        self._held: OrderedDict[int, Inode] = OrderedDict()  # by node, least recently used first
        self._parked_total = 0
        self.forgotten = 0
        """Inodes that left the table."""
        self._watcher: Watcher | None = None
        self.exports = exports
        self._on_drop: list[Callable[[Inode], None]] = []
        self._on_leave: Callable[[int, bytes], None] = lambda _, __: None
        self.space_retry = space_retry
        self._rules = rules
        self.root = Inode(st.st_dev, st.st_ino, stat_module.S_IFDIR, ROOT, next(self._generations))
        self.root.fd = os.dup(root_fd)
        self.root.nlookup = 1
        self.root.pins = 1
        self._nodes[ROOT] = self.root
        self.states.add(self.root)
        self._index.add_root(self.root)
        # The lookups that others need; bound here, they cost no further call.
        self.find = self._index.find
        self.known_as = self._index.known_as
        self.subject = self._index.subject
        self.may_be_link = self._index.may_be_link
        self.is_inode_of = self._index.is_inode_of
        self.name_gone = self._index.name_gone
        self.decode = self._node_ids.decode
        self.next_dynamic = self._node_ids.next_dynamic

    @property
    def fd_budget(self) -> int:
        """Return how many inodes may be held, and half of the fds that file handles may have."""
        return self.states.fd_budget

    @fd_budget.setter
    def fd_budget(self, number: int) -> None:
        self.states.fd_budget = number

    @property
    def max_inodes(self) -> int:
        """Return how many inodes there may be before the kernel is made to forget some."""
        return self.states.max_inodes

    @max_inodes.setter
    def max_inodes(self, most: int) -> None:
        self.states.max_inodes = most

    def watch(self, watcher: Watcher) -> None:
        """Tell ``watcher`` of every inode that is held from now on."""
        self._watcher = watcher

    def on_drop(self, call: Callable[[Inode], None]) -> None:
        """Call ``call``, too, with every inode that is about to leave the table."""
        self._on_drop.append(call)

    def on_leave(self, call: Callable[[int, bytes], None]) -> None:
        """Call ``call`` with places (parent node, name) that files were found to have left."""
        self._on_leave = call

    # Invariant: _nodes holds what _index does, and also inodes that the kernel still refers to although
    # their number was given to another file.

    def __getitem__(self, node: int) -> Inode:
        """Return the inode of a node id that the kernel has not forgotten. Raises StaleError."""
        try:
            return self._nodes[node]
        except KeyError:
            raise StaleError from None

    def get(self, node: int) -> Inode | None:
        """Return the same, or None if there is none."""
        return self._nodes.get(node)

    def __len__(self) -> int:
        """Count the inodes in the table."""
        return len(self._nodes)

    def all(self) -> list[Inode]:
        """List every inode in the table."""
        return list(self._nodes.values())

    def looked_up(self, fd: int, st: os.stat_result, parent: Inode, name: bytes) -> Inode:
        """Find or make the inode of ``fd``, which a lookup opened, with one more kernel reference.

        Takes over ``fd``.
        """
        inode = self._index.find_opened(fd, st, parent, name)
        if inode is None:
            inode = self._new(st, parent, name, _handle_of(fd) if self.exports else None)
        if inode.fd < 0:
            self._hold(inode, fd, st.st_ino)
        else:
            if inode.suspect and stat_module.S_IFMT(st.st_mode) == inode.kind:
                # Replace it in place: requests that use the fd number continue with the new file.
                os.dup2(fd, inode.fd, inheritable=False)
                inode.suspect = False
                if inode.dentry is None:
                    inode.handle = None
                    inode.set_file(None, None)
            os.close(fd)
            self._touch(inode)
        self.referenced(inode, st, parent, name)
        return inode

    def made_nameless(self, fd: int, st: os.stat_result) -> Inode:
        """Make the inode of a new file without a name, with one kernel reference.

        Takes over ``fd``. Raises OSError (EOPNOTSUPP) where files are known by their names.
        """
        if self._rules[st.st_dev] is not Rule.INODE:
            os.close(fd)
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        inode = self._make(st, _handle_of(fd) if self.exports else None)
        self._index.add(inode)
        self._hold(inode, fd, st.st_ino)
        inode.nlookup += 1
        return inode

    def lasts(self, device: int) -> bool:
        """Tell whether a file system's inode numbers and handles last, and handles can be opened."""
        return self.exports and self._rules[device] is Rule.INODE

    def decoded(self, fd: int, st: os.stat_result, handle: bytes, node: int = 0) -> Inode:
        """Find or make the inode of ``fd``, to which a file handle led, with one more kernel reference.

        Takes over ``fd``. Raises StaleError if inodes of that file system do not last, or if ``node``,
        unless it is 0, is not its node id.
        """
        inode = self._index.by_id(st.st_dev, st.st_ino) if self.lasts(st.st_dev) else None
        if inode is not None and inode.fd < 0 and not is_parked(inode, fd, st):
            inode = None
        taken = node in self._nodes if inode is None else node not in (0, inode.node)
        if taken or not self.lasts(st.st_dev):
            os.close(fd)
            raise StaleError
        if inode is None:
            inode = self._make(st, handle, node)
            self._index.add(inode)
        if inode.fd < 0:
            self._hold(inode, fd, st.st_ino)
        else:
            os.close(fd)
        inode.nlookup += 1
        return inode

    def listed(
        self, st: os.stat_result, parent: Inode, name: bytes, handle: bytes | None = None
    ) -> Inode:
        """Find the inode of a listed ``st``, parked if new. The kernel has no reference yet.

        ``handle`` is its file handle, if requested. Call ``referenced`` next, and ``forget`` if the
        entry does not fit into the reply.
        """
        inode = self._index.find_listed(st, parent, name)
        if inode is None:
            inode = self._new(st, parent, name, handle)
            inode.move(parent, name)
        return inode

    def referenced(self, inode: Inode, st: os.stat_result, parent: Inode, name: bytes) -> None:
        """Count a kernel reference by this name, under which ``st`` was found."""
        inode.nlookup += 1
        if (
            st.st_nlink == 1
            and inode.parent is not None
            and (inode.parent is not parent or inode.name != name)
        ):
            self._on_leave(inode.parent.node, inode.name)
        self.moved(inode, parent, name)

    def forget(self, node: int, nlookup: int) -> None:
        """Take back ``nlookup`` kernel references."""
        inode = self._nodes.get(node)
        if inode is None or inode is self.root:
            return
        inode.nlookup -= nlookup
        self._drop_unused(inode)

    def drop_unused(self, nodes: list[int]) -> None:
        """Drop inodes whose last reference the kernel has given up, unless they are in use."""
        for node in nodes:
            inode = self._nodes.get(node)
            if inode is not None:
                self._drop_unused(inode)

    def moved(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """Record where the inode was seen."""
        inode.move(parent, name)
        self._index.moved(inode, parent, name)

    def lost_name(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """Forget the place of an inode that lost that name through the mount; it may have another."""
        if inode.parent is parent and inode.name == name:
            inode.move(None, b"")

    def check_may_open(self) -> None:
        """Raise OSError (EMFILE) if another open file would leave no fd for anything else."""
        if not self.may_open():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def may_open(self) -> bool:
        """Tell whether another open file leaves fds for everything else."""
        return self.states.open_fds < 2 * self.fd_budget

    def opened(self, inode: Inode, fd: int) -> None:
        """Count ``fd``, the descriptor of a file handle on the inode."""
        inode.add_open_fd(fd)
        self.states.open_fds += 1
        self.shrink()

    @contextmanager
    def closing(self, inode: Inode, fd: int) -> Iterator[None]:
        """Keep the inode in the table until a file handle of it has been closed."""
        self.space_retry.closing(inode.node)
        self.states.open_fds -= 1
        inode.remove_open_fd(fd)
        inode.pins += 1
        try:
            yield
        finally:
            self.unpin(inode)

    @contextmanager
    def using(self, inode: Inode) -> Iterator[None]:
        """Keep ``inode.fd`` open while requests use it across an await."""
        self.pin(inode)
        try:
            yield
        finally:
            self.unpin(inode)

    def pin(self, inode: Inode) -> None:
        """Count a user of ``inode.fd``."""
        self._touch(inode)
        inode.pins += 1

    def unpin(self, inode: Inode) -> None:
        """Count one user less."""
        inode.pins -= 1
        self._drop_unused(inode)

    def unpark(self, inode: Inode, fd: int, ino: int) -> None:
        """Take the ``fd`` and ``ino`` that ``open_parked`` gave, unless another request was faster."""
        if inode.fd < 0:
            self._hold(inode, fd, ino)
        else:
            os.close(fd)

    def hold_parked(self, node: int, fd: int) -> bool:
        """Take over ``fd`` if it refers to a parked inode, whose device, number and kind it has."""
        inode = self._nodes[node]
        if inode.fd >= 0 or (inode.handle and file_handles.name_to_handle(fd) != inode.handle):
            return False
        self._hold(inode, fd, inode.ino)
        return True

    def enter_opened(
        self, fd: int, st: os.stat_result, parent_node: int, name: bytes, handle: bytes | None
    ) -> int:
        """Make the inode of a local ``fd``, which was opened by a name; see ``channel.Calls``."""
        parent = self._nodes[parent_node]
        if self._index.find(st) is not None:
            return 0
        inode = self._new(st, parent, name, handle)
        inode.local = True
        self._hold(inode, fd, st.st_ino)
        self.moved(inode, parent, name)
        return inode.node

    def enter_listed(
        self, parent_node: int, entries: list[tuple[os.stat_result, bytes, bytes | None]]
    ) -> list[int] | None:
        """Make or move inodes of local files that a listing met; see ``channel.Calls``."""
        parent = self._nodes[parent_node]
        for st, _, _ in entries:
            inode = self._index.find(st)
            if inode is not None and inode.node != st.st_ino:
                return None  # the channel has not seen it
        nodes = []
        for st, name, handle in entries:
            inode = self.listed(st, parent, name, handle)
            inode.local = True
            self.moved(inode, parent, name)
            nodes.append(inode.node)
        return nodes

    def mount_fd(self, device: int) -> int:
        """Return a descriptor on the file system ``device``, for opening by handle; -1 for none."""
        return self._mount_fds.get(device, -1)

    def wants_mount_fd(self, inode: Inode) -> bool:
        """Tell whether the inode can give its file system the ``mount_fd`` that it lacks."""
        return inode.is_dir and inode.device not in self._mount_fds

    def expect_mount_fd(self, device: int) -> None:
        """Record that a ``mount_fd`` is being opened."""
        self._mount_fds[device] = EXPECTED

    def add_mount_fd(self, device: int, fd: int) -> None:
        """Take over ``fd``; -1: there can be none, and inodes are opened by place instead."""
        self._mount_fds[device] = fd
        if self._watcher is not None:  # which waited for it
            for inode in [inode for inode in self._held.values() if inode.device == device]:
                self._watcher.held(inode)

    def shrink(self, budget: int | None = None) -> None:
        """Park the least recently used inodes down to ``budget`` descriptors, or to the usual."""
        most = self._most_held() if budget is None else budget
        tries = 2 * len(self._held)  # the first may only find that all were used
        while len(self._held) > most and tries > 0:
            tries -= 1
            node, inode = self._held.popitem(last=False)
            used, inode.used = inode.used, False
            if inode.pins or used:
                self._held[node] = inode  # in use: it becomes the youngest
                continue
            if inode.handle is None:
                try:
                    inode.handle = file_handles.name_to_handle(inode.fd)
                except OSError:
                    inode.handle = b""  # the source fails: the inode is known by its place
            if inode.dentry is not None:
                self._index.discard(inode)
            os.close(inode.fd)
            inode.fd = -1
            self._parked_total += 1

    def forgettable(self, most: int) -> list[tuple[int, bytes]]:
        """List up to ``most`` places (parent node, name) that the kernel should forget, oldest first.

        Empty while there are no more than ``max_inodes``. Directories are left alone: to drop one
        from the kernel's cache also unmounts what the user mounted below it.
        """
        places: list[tuple[int, bytes]] = []
        if len(self._nodes) <= self.max_inodes:
            return places
        for inode in list(islice(self._nodes.values(), most)):
            if inode.used:
                self._touch(inode)
            elif inode.idle and not inode.is_dir and inode.parent is not None:
                places.append((inode.parent.node, inode.name))
            self._nodes.move_to_end(inode.node)  # others come first next time
        return places

    def stats(self) -> InodeStats:
        """Return a snapshot."""
        return InodeStats(len(self._nodes), len(self._held) + 1, self._parked_total)

    def close(self) -> None:
        """Close every descriptor."""
        for inode in self._nodes.values():
            if inode.fd >= 0:
                os.close(inode.fd)
        for fd in self._mount_fds.values():
            os.close(fd)
        for inode in self._nodes.values():
            self.states.remove(inode)
        self._nodes.clear()
        self._index.clear()
        self._held.clear()
        self._mount_fds.clear()

    def _new(self, st: os.stat_result, parent: Inode, name: bytes, handle: bytes | None) -> Inode:
        lasting = self._rules[st.st_dev] is Rule.INODE
        inode = self._make(st, handle if lasting else None)
        self._index.add_new(inode, parent, name)
        return inode

    def _make(self, st: os.stat_result, handle: bytes | None, node: int = 0) -> Inode:
        node = node or self._node_ids.encode(st.st_dev, st.st_ino, self._nodes)
        kind = stat_module.S_IFMT(st.st_mode)
        generation = generation_of(handle) if handle else next(self._generations)
        inode = Inode(st.st_dev, st.st_ino, kind, node, generation)
        inode.handle = handle
        self._nodes[node] = inode
        self.states.add(inode)
        return inode

    def _hold(self, inode: Inode, fd: int, ino: int) -> None:
        inode.fd = fd
        if inode.dentry is not None:
            inode.ino, inode.handle = ino, syscalls.event_handle(fd)
            self._index.add(inode)
        self._held[inode.node] = inode
        # The watcher gets the first directory of a file system once there is a ``mount_fd``.
        awaited = EXPECTED if inode.is_dir else -1
        if self._watcher is not None and self._mount_fds.get(inode.device, awaited) != EXPECTED:
            self._watcher.held(inode)
        self.shrink()

    def _most_held(self) -> int:
        """Return how many inodes may be held: what open files leave, but at most one half."""
        left = 2 * self.fd_budget - self.states.open_fds
        return min(max(left, LEAST_HELD), self.fd_budget)

    def _touch(self, inode: Inode) -> None:
        inode.used = False
        if inode.node in self._nodes:
            self._nodes.move_to_end(inode.node)
        if inode.node in self._held:
            self._held.move_to_end(inode.node)

    def _drop_unused(self, inode: Inode) -> None:
        if inode.nlookup <= 0 and inode.idle:
            self._drop(inode)

    def _drop(self, inode: Inode) -> None:
        self.forgotten += 1
        for call in self._on_drop:
            call(inode)
        self._index.discard(inode)
        # The tables may have a successor of the inode by now.
        if self._nodes.get(inode.node) is inode:
            del self._nodes[inode.node]
            self.states.remove(inode)
        if self._held.get(inode.node) is inode:
            del self._held[inode.node]
        if self._watcher is not None:
            self._watcher.dropped(inode)
        if inode.fd >= 0:
            os.close(inode.fd)
            inode.fd = -1
        self.space_retry.released(inode.node)
        self._index.dropped(inode)


def _handle_of(fd: int) -> bytes | None:
    try:
        return file_handles.name_to_handle(fd)
    except OSError:  # if the source fails, a use of the file itself will report it
        return None
