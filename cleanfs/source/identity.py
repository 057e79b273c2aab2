"""What a file's identity is, on each kind of source.

Cached pages belong to a file, and must find it again after the source's kernel forgot the file, which
happens when memory is short: the very moment that the pages are kept for. Two rules say how.

``inode``: the inode number and the file handle (``name_to_handle_at``: number and generation) stay with
a file until it is removed, and are not given to another. So it is on disks, and on NFS and CephFS,
whose servers say who a file is.

``path``: nothing lasts. A FUSE server names its files anew once the kernel forgot them (sshfs counts
up: 2, 9, 16), or gives one number to two files (bindfs, over two disks); FAT makes numbers up as they
are needed. Here a file is known by the directory that it is in and by its name there: a ``Dentry``.
What was read under that name is the file's for as long as the fingerprint says so (``coherency``).

While we hold an inode (an O_PATH descriptor) the source's kernel holds it too, and its number and
handle tell it from all others, whatever the rule. So under ``path`` a file that is held and has moved
takes its dentry along, and another file at its name gets a dentry of its own, with no pages.
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
    """By what a file is known when its inode was forgotten."""

    INODE = "inode"
    """Inode number and file handle."""
    PATH = "path"
    """Directory and name, and the fingerprint under which it was read."""


LASTING = LOCAL_FILE_SYSTEMS | {"squashfs", "erofs", "nfs", "nfs4", "ceph"}
"""Types on which number and handle last. The source of each is in docs/sources.md."""

UNKNOWN_TYPE = ""
"""``FileSystemTypes`` of a device that mountinfo does not list: a subvolume of btrfs, a layer of
overlayfs. It is learned when a directory there has been opened."""


def rule_of(fs_type: str) -> Rule:
    """The rule for a type of file system, as mountinfo gives it."""
    return Rule.INODE if fs_type in LASTING or fs_type == UNKNOWN_TYPE else Rule.PATH


BY_PATH = b"path"
"""In place of the file handle in the keys of files that are known by their path. No handle is that: its
type alone takes four bytes."""


class Types(Protocol):
    """``FileSystemTypes``, as far as it is needed."""

    def __getitem__(self, device: int) -> str:
        """The type of the file system of that device."""


class Rules:
    """The rule by device. Logs it when a file system is first met."""

    def __init__(self, types: Types) -> None:
        """``types`` are asked once for each device."""
        self._types = types
        self._rules: dict[int, Rule] = {}

    def __getitem__(self, device: int) -> Rule:
        """The rule for the file system of that device, which must be held."""
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

    It exists for as long as somebody refers to it: an inode, the record of a file with cached pages, or
    another dentry below.
    """

    __slots__ = ("__weakref__", "key", "occupant", "parent", "place")

    def __init__(self, key: FileKey) -> None:
        """Nowhere yet."""
        self.key = key
        """What the pages of the file that is here hang on. Never given again."""
        self.parent: Dentry | None = None
        """Referred to, so that it keeps its key: what is below is found by that."""
        self.place: Place | None = None
        """Where it is; None if nothing leads here any more."""
        self.occupant: object | None = None
        """The inode in memory that this is the dentry of."""


Place = tuple[Hashable, bytes]
"""What the directory is known by (its dentry's key; at the top of a file system, what that is mounted
on), and the name in it."""


class Dentries:
    """The dentries that are referred to, by place."""

    def __init__(self) -> None:
        """None."""
        self._ids = count(1)
        self._at: WeakValueDictionary[Place, Dentry] = WeakValueDictionary()

    # Invariant: self._at[place] is dentry if and only if dentry.place == place.

    def __len__(self) -> int:
        """How many have a place."""
        return len(self._at)

    def at(self, place: Place) -> Dentry | None:
        """The dentry of a place, if there is one."""
        return self._at.get(place)

    def make(self, device: int, parent: Dentry | None, place: Place) -> Dentry:
        """A new dentry, at a place that none has."""
        dentry = Dentry(FileKey(device, next(self._ids), BY_PATH))
        self.move(dentry, parent, place)
        return dentry

    def move(self, dentry: Dentry, parent: Dentry | None, place: Place) -> None:
        """Give a dentry, and with it all below, a place that none has."""
        assert place not in self._at
        self.remove(dentry)
        dentry.parent, dentry.place = parent, place
        self._at[place] = dentry

    def remove(self, dentry: Dentry) -> None:
        """Nothing leads to a dentry any more."""
        if dentry.place is not None:
            del self._at[dentry.place]
        dentry.parent = dentry.place = None
