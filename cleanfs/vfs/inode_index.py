"""Find the inode of what the source shows: by number, by file handle, or by dentry (``identity``)."""

import os
import stat as stat_module
from collections.abc import Callable, Iterator, Mapping

from cleanfs.backends.ops import FileKey
from cleanfs.linux import syscalls
from cleanfs.source.identity import Dentries, Dentry, Place, Rule, Rules
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.node_ids import NodeIds
from cleanfs.vfs.parking import is_parked, looks_like

Id = int | tuple[int, int | bytes]
"""What identifies an inode: ``NodeIds.key``, or device and file handle."""


class InodeIndex:
    """Finds the inodes of one table by what identifies them.

    Invariant: it holds the inode that the source has now under a pair (device, inode number), and each
    that it holds is ``current``. Where numbers do not last it holds only inodes with a descriptor. Most
    node ids are inode numbers (``NodeIds``): such inodes are found in the table itself.
    """

    def __init__(
        self,
        rules: Rules,
        node_ids: NodeIds,
        nodes: Mapping[int, Inode],
        lost: Callable[[FileKey], None],
    ) -> None:
        """Index the table ``nodes``.

        ``lost`` is called with each file that nothing leads to any more, though it may be there.
        """
        self._rules = rules
        self._node_ids = node_ids
        self._nodes = nodes
        self._lost = lost
        self._by_id: dict[Id, Inode] = {}  # by _id, if that is not the node id
        self._dentries = Dentries()

    def __iter__(self) -> Iterator[Inode]:
        """Yield every inode in the index."""
        yield from (inode for inode in self._nodes.values() if self._is_at_node(inode))
        yield from self._by_id.values()

    def clear(self) -> None:
        """Forget all."""
        self._by_id.clear()

    def find(self, st: os.stat_result) -> Inode | None:
        """Find the inode of what was stat'ed, if the kernel knows it."""
        return self.by_id(st.st_dev, st.st_ino)

    def by_id(self, device: int, ino: int) -> Inode | None:
        """Find the inode of a (device, inode number) pair, if the kernel knows it."""
        return self._get(self._node_ids.key(device, ino))

    def _get(self, key: Id) -> Inode | None:
        if isinstance(key, int):
            inode = self._nodes.get(key)
            if inode is not None and self._is_at_node(inode):
                return inode
        return self._by_id.get(key)

    def _is_at_node(self, inode: Inode) -> bool:
        """Tell whether an inode is in the index by its node id: its number on the first file system."""
        return inode.ino == inode.node and inode.current and inode.dentry is None

    def find_opened(self, fd: int, st: os.stat_result, parent: Inode, name: bytes) -> Inode | None:
        """Find the inode of what a lookup opened."""
        if self._rules[st.st_dev] is Rule.INODE:
            inode = self.find(st)
            if inode is not None and inode.fd < 0 and not is_parked(inode, fd, st):
                return None  # the number was given to another file while this one was parked
            return inode
        held = self._by_id.get((st.st_dev, syscalls.event_handle(fd) or st.st_ino))
        if held is not None:
            return held
        inode = self._at(st.st_dev, parent, name)
        return inode if inode is not None and inode.fd < 0 and is_parked(inode, fd, st) else None

    def find_listed(self, st: os.stat_result, parent: Inode, name: bytes) -> Inode | None:
        """Find the inode of what a listing saw."""
        kind = stat_module.S_IFMT(st.st_mode)
        if self._rules[st.st_dev] is Rule.INODE:
            inode = self.find(st)
            return None if inode is not None and inode.fd < 0 and kind != inode.kind else inode
        inode = self._at(st.st_dev, parent, name)
        if inode is None:
            return None
        same = looks_like(inode, st) if inode.fd < 0 else st.st_ino == inode.ino
        return inode if same and kind == inode.kind else None

    def known_as(self, key: FileKey) -> Inode | None:
        """Find the inode that the source has now under a key (``namespace.file_key``)."""
        if self._rules[key.device] is Rule.INODE:
            return self.by_id(key.device, key.inode)
        return self._by_id.get((key.device, key.generation or key.inode))

    def subject(self, key: FileKey, parent: Inode, name: bytes) -> tuple[Inode | None, FileKey]:
        """Find the inode of a change of names, if in the table, and the key of its pages.

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
        """Tell whether a listed file may have an inode in the table that only a lookup finds."""
        linked = st.st_nlink > 1 and not stat_module.S_ISDIR(st.st_mode)
        return linked and self._rules[st.st_dev] is Rule.PATH

    def is_inode_of(self, inode: Inode, key: FileKey) -> bool:
        """Tell whether an inode with a descriptor is what the source calls ``key``."""
        same_handle = inode.dentry is None or not key.generation or inode.handle == key.generation
        return inode.id == (key.device, key.inode) and same_handle

    def add_new(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """Add an inode that was found by a name. Without a lasting number it is known by its dentry."""
        if self._rules[inode.device] is Rule.INODE:
            self.add(inode)
        else:
            self._settle(inode, self._vacant_dentry(inode.device, parent, name))

    def add_root(self, root: Inode) -> None:
        """Add the root, which comes first and has no name."""
        if self._rules[root.device] is Rule.PATH:
            self._settle(root, self._dentries.make(root.device, None, (root.device, b"")))
            root.handle = syscalls.event_handle(root.fd)
        self.add(root)

    def moved(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """Move the inode's dentry to where the inode was seen."""
        if inode.dentry is None:
            return
        place = self._place(inode.device, parent, name)
        if inode.dentry.place != place:
            self._clear(place)
            self._dentries.move(inode.dentry, parent.dentry, place)

    def dropped(self, inode: Inode) -> None:
        """Give up the dentry of an inode that has left the table."""
        if inode.dentry is not None:
            inode.dentry.occupant = None
            if inode.dentry.place is None:
                self._lost(inode.dentry.key)

    def add(self, inode: Inode) -> None:
        """Add the inode that the source has now under its pair."""
        key = self._id(inode)
        before = self._get(key)
        if before is not None:
            before.current = False
            self._by_id.pop(key, None)
        if key != inode.node:
            self._by_id[key] = inode
        inode.current = True

    def discard(self, inode: Inode) -> None:
        """Remove an inode that may not be there any more."""
        key = self._id(inode)
        if self._get(key) is inode:
            self._by_id.pop(key, None)
            inode.current = False

    def _id(self, inode: Inode) -> Id:
        if inode.dentry is not None:
            return inode.device, inode.handle or inode.ino
        return self._node_ids.key(inode.device, inode.ino)

    # -- dentries ---------------------------------------------------------------------------------

    def dentry(self, device: int, parent: Inode, name: bytes) -> Dentry | None:
        """Find the dentry of a name. Where files are known by inode there is none."""
        return self._dentries.at(self._place(device, parent, name))

    def name_gone(self, device: int, parent: Inode, name: bytes) -> None:
        """Remove the dentry of a name that no longer leads to what it did."""
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
        """Find the dentry of a name, with what is kept of the file; make one if that is taken."""
        place = self._place(device, parent, name)
        dentry = self._dentries.at(place)
        if dentry is not None and dentry.occupant is not None:
            self._clear(place)
            dentry = None
        return dentry or self._dentries.make(device, parent.dentry, place)

    def _settle(self, inode: Inode, dentry: Dentry) -> None:
        """Give an inode without a dentry one that no inode has."""
        inode.dentry, dentry.occupant = dentry, inode
        inode.set_file(dentry.key, None)

    def _clear(self, place: Place) -> None:
        dentry = self._dentries.at(place)
        if dentry is not None:
            self._dentries.remove(dentry)
            if dentry.occupant is None:
                self._lost(dentry.key)
