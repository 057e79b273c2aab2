"""List directories; every entry carries its attributes (READDIRPLUS)."""

import contextlib
import os

import pyfuse3
from pyfuse3 import FileNameT, ReaddirToken

from cleanfs.fs.control import CONTROL_NAME, Control, Node
from cleanfs.fs.entries import Entries, control_entry
from cleanfs.fs.rollback import ReplyRollback
from cleanfs.source.listing import ListedEntry
from cleanfs.vfs.handles import DirHandle
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.kernel_view import Told
from cleanfs.vfs.tree import Tree, Using

DOTS = (b".", b"..")


class Lister:
    """Fills replies to readdir."""

    def __init__(
        self, inodes: InodeTable, tree: Tree, entries: Entries, rollback: ReplyRollback
    ) -> None:
        """Start with a guess of how many entries a reply takes."""
        self._inodes = inodes
        self._tree = tree
        self._entries = entries
        self._rollback = rollback
        self._entries_per_reply = 64
        """How many entries the last full reply took, and the one that did not fit any more."""

    async def fill(self, directory: DirHandle, start: int, token: ReaddirToken) -> None:
        """Fill a reply with the entries from a position on."""
        directory.batch = self._entries_per_reply
        if start == 0:
            await directory.rewind()
        else:
            directory.forget_stats()
        listed: list[tuple[Inode, Told]] = []
        if self._add_dots(directory, start, token):
            listed = await self._add_names(directory, max(start, len(DOTS)), token)
        for inode, _ in listed:
            await self._tree.nothing_to_drop(inode)
        self._rollback.listed(listed)
        self._tree.ask_to_forget()

    async def _add_names(
        self, directory: DirHandle, first: int, token: ReaddirToken
    ) -> list[tuple[Inode, Told]]:
        """Add names until one does not fit. Return their inodes, and what was told of each before."""
        listed: list[tuple[Inode, Told]] = []
        position = first
        while (found := await directory.entry(position - len(DOTS))) is not None:
            name, listing = found
            position += 1
            if listing is None or (directory.inode is self._inodes.root and name == CONTROL_NAME):
                continue
            if isinstance(listing, OSError):
                entry = self._entries.unknown()
                fits = pyfuse3.readdir_reply(token, FileNameT(name), entry, position)
            else:
                added = await self._add_inode(directory, name, listing, position, token)
                fits = added is not None
                if added is not None:
                    listed.append(added)
            if not fits:
                self._entries_per_reply = position - first
                break
        return listed

    async def _add_inode(
        self,
        directory: DirHandle,
        name: bytes,
        listing: ListedEntry,
        position: int,
        token: ReaddirToken,
    ) -> tuple[Inode, Told] | None:
        """Add a name with attributes, and a kernel reference to its inode.

        Returns the inode and what was told of it before; None if the entry does not fit.
        """
        linked = None
        if self._inodes.may_be_link(listing.stat):
            linked = await self._find_link(directory, name)
        inode, st = linked or self._inode_of(directory, name, listing)
        if not pyfuse3.readdir_reply(token, FileNameT(name), self._entries.untold(inode, st), position):
            self._inodes.forget(inode.node, 1)
            return None
        told = inode.kernel.told
        inode.kernel.reply_sent(st)
        return inode, told

    def _add_dots(self, directory: DirHandle, start: int, token: ReaddirToken) -> bool:
        """Add ``.`` and ``..``, unless the reply starts behind them. Return whether they fit."""
        for position, name in enumerate(DOTS[start:], start + 1):
            entry = self._entries.dot(directory, name)
            if not pyfuse3.readdir_reply(token, FileNameT(name), entry, position):
                return False
        return True

    def _inode_of(
        self, directory: DirHandle, name: bytes, listing: ListedEntry
    ) -> tuple[Inode, os.stat_result]:
        """Return the inode of an entry, with one more kernel reference, and its attributes."""
        st = listing.stat
        inode = self._inodes.listed(st, directory.inode, name, listing.handle)
        self._tree.observe(inode, st, directory.before)
        self._inodes.referenced(inode, st, directory.inode, name)
        return inode, st

    async def _find_link(
        self, directory: DirHandle, name: bytes
    ) -> tuple[Inode, os.stat_result] | None:
        """Look up a listed file that may have an inode by another name: its number does not tell."""
        with contextlib.suppress(OSError):
            async with Using(self._tree, directory.inode) as parent:
                return await self._tree.look_up(parent, name)
        return None


def list_control(control: Control, node: Node, start: int, token: ReaddirToken) -> None:
    """Fill a reply with the entries of a control directory from a position on."""
    for position, (name, child) in enumerate(node.children[start:], start + 1):
        entry = control_entry(control.show(child))
        if not pyfuse3.readdir_reply(token, FileNameT(name), entry, position):
            break
