"""The identity of a file, on each kind of source.

Cached pages belong to a file. They must be found again after the source's kernel forgot the inode. That
happens when memory is short: just when the pages are needed. There are two rules.

``inode``: the inode number and the file handle (``name_to_handle_at``: number and generation) stay with
a file until it is removed, and are not given to another. This holds on disks, and on NFS and CephFS,
whose servers identify files.

``path``: no number lasts. A FUSE server numbers files anew once the kernel forgot them (sshfs counts
up: 2, 9, 16), or gives one number to two files (bindfs, over two disks). FAT makes numbers up as they
are needed. Here a file is identified by its directory and its name there: a ``Dentry``. The pages read
under that name are the file's for as long as its fingerprint is the same (``coherency``).

While the daemon holds an inode (an O_PATH descriptor) the source's kernel holds it too. Its number and
handle then distinguish it from all others, whatever the rule. So under ``path`` a held file that has
moved takes its dentry along, and another file at its name gets a dentry of its own, without pages.

Main thread only; no call awaits.
"""

import logging
from collections.abc import Hashable
from enum import StrEnum
from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

from cleanfs.backends.ops import FileKey
from cleanfs.linux.mounts import LOCAL_FILE_SYSTEMS

log = logging.getLogger(__name__)


class Rule(StrEnum):
    """What identifies a file whose inode was forgotten."""

    INODE = "inode"
    """Inode number and file handle."""
    PATH = "path"
    """Directory and name, and the fingerprint under which it was read."""


LASTING = LOCAL_FILE_SYSTEMS | {"squashfs", "erofs", "nfs", "nfs4", "ceph"}
"""File-system types on which number and handle last. The source for each is in docs/sources.md."""

UNKNOWN_TYPE = ""
"""``FileSystemTypes`` of a device that mountinfo does not list: a subvolume of btrfs, a layer of
overlayfs. It is learned when a directory there has been opened."""


def rule_of(fs_type: str) -> Rule:
    """Return the rule for a type of file system, as mountinfo gives it."""
    return Rule.INODE if fs_type in LASTING or fs_type == UNKNOWN_TYPE else Rule.PATH


BY_PATH = b"path"
"""Stands for the file handle in the keys of files that are identified by their path. No handle equals
it: a handle's type alone takes four bytes."""


class Types(Protocol):
    """The part of ``FileSystemTypes`` that is needed here."""

    def __getitem__(self, device: int) -> str:
        """Return the type of the device's file system."""


class Rules:
    """The rule of each device. Logs it when a file system is first seen."""

    def __init__(self, types: Types) -> None:
        """Look each device up in ``types`` once."""
        self._types = types
        self._rules: dict[int, Rule] = {}

    def __getitem__(self, device: int) -> Rule:
        """Return the rule for the file system of that device, of which an inode must be held."""
        rule = self._rules.get(device)
        if rule is None:
            fs_type = self._types[device]
            rule = rule_of(fs_type)
            if fs_type != UNKNOWN_TYPE:
                self._rules[device] = rule
                log.info("files on %s are known by their %s", fs_type, rule)
        return rule


class Dentry:
    """A name in a directory of a source whose inodes do not last.

    It exists for as long as it is referenced: by an inode, by the record of a file with cached pages,
    or by a dentry below.
    """

    __slots__ = ("__weakref__", "key", "occupant", "parent", "place")

    def __init__(self, key: FileKey) -> None:
        """Make one without a place."""
        self.key = key
        """The key of the cached pages of the file with this name. Never reused."""
        self.parent: Dentry | None = None
        """Referenced, so that it keeps its key: places below contain that."""
        self.place: Place | None = None
        """Where it is; None if no name leads here any more."""
        self.occupant: object | None = None
        """The inode in memory that has this dentry."""


Place = tuple[Hashable, bytes]
"""What identifies the directory (its dentry's key; at the top of a file system, its mount point), and
the name in it."""


class Dentries:
    """The dentries that are referenced, by place."""

    def __init__(self) -> None:
        """Start with none."""
        self._ids = count(1)
        self._at: WeakValueDictionary[Place, Dentry] = WeakValueDictionary()

    # Invariant: self._at[place] is dentry if and only if dentry.place == place.

    def __len__(self) -> int:
        """Return how many have a place."""
        return len(self._at)

    def at(self, place: Place) -> Dentry | None:
        """Return the dentry of a place, if there is one."""
        return self._at.get(place)

    def make(self, device: int, parent: Dentry | None, place: Place) -> Dentry:
        """Make a dentry at a free place."""
        dentry = Dentry(FileKey(device, next(self._ids), BY_PATH))
        self.move(dentry, parent, place)
        return dentry

    def move(self, dentry: Dentry, parent: Dentry | None, place: Place) -> None:
        """Move a dentry, and with it all below, to a free place."""
        assert place not in self._at
        self.remove(dentry)
        dentry.parent, dentry.place = parent, place
        self._at[place] = dentry

    def remove(self, dentry: Dentry) -> None:
        """Take a dentry's place away: no name leads to it any more."""
        if dentry.place is not None:
            del self._at[dentry.place]
        dentry.parent = dentry.place = None
