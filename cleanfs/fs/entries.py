"""Translate attributes for pyfuse3; make the entries that replies carry, with their timeouts."""

import os
import stat as stat_module
from collections.abc import Callable
from typing import Final

from pyfuse3 import EntryAttributes, FileInfo, InodeT, ModeT, SetattrFields, StatvfsData

from cleanfs.fs.control import Node
from cleanfs.fuse.protocol import (
    FOPEN_DIRECT_IO,
    FOPEN_KEEP_CACHE,
    FUSE_ATTR,
    FUSE_ATTR_OUT,
    FUSE_ENTRY_OUT,
    FUSE_OPEN_OUT,
    FUSE_SX,
)
from cleanfs.linux.syscalls import STATX_BASIC_STATS, STATX_BTIME
from cleanfs.source.attributes import NewAttributes
from cleanfs.vfs.coherency import ATTR_TIMEOUTS, Coherency
from cleanfs.vfs.handles import DirHandle
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.source_watch import SourceWatch

UNANNOUNCED_SECONDS: Final = ATTR_TIMEOUTS[Coherency.WATCH]
"""With ``--coherency watch``, the longest attribute and entry timeout of an inode without a watch."""


STATVFS_FIELDS: Final = (
    *("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail"),
    *("f_files", "f_ffree", "f_favail", "f_namemax"),
)

NS: Final = 1_000_000_000
SIGN: Final = (1 << 64) - 1
"""Makes an unsigned field of negative seconds."""


class Entries:
    """Makes the entries of one mount."""

    def __init__(
        self,
        inodes: InodeTable,
        timeout: float,
        watch: SourceWatch | None,
        is_local: Callable[[Inode], bool] = lambda _: False,
    ) -> None:
        """Use ``timeout``, in seconds, for attributes and names.

        The channel may make the next entries of inodes that are ``is_local``.
        """
        self._inodes = inodes
        self._timeout = timeout
        self._is_local = is_local
        # A longer timeout applies only where changes are announced.
        self._watch = watch if timeout > UNANNOUNCED_SECONDS else None
        states = inodes.states
        states.timeout = timeout
        states.unwatched_timeout = timeout if self._watch is None else UNANNOUNCED_SECONDS

    def attributes(self, inode: Inode, st: os.stat_result) -> EntryAttributes:
        """Make the entry of an inode, and record that the kernel is told of it."""
        inode.kernel.reply_sent(st)
        return self.untold(inode, st)

    def untold(self, inode: Inode, st: os.stat_result) -> EntryAttributes:
        """Make the entry of an inode."""
        entry = _entry(st)
        if inode is not self._inodes.root:  # the root's node id is FUSE's, its number its own
            entry.st_ino = InodeT(inode.node)
        entry.generation = inode.generation
        entry.attr_timeout = entry.entry_timeout = self._timeout
        if self._watch is not None:
            entry.attr_timeout = self._timeout_of(inode, self._watch)
            entry.entry_timeout = self._timeout_of(inode.parent or inode, self._watch)
        if not inode.local:
            inode.local = self._is_local(inode)
        return entry

    def _timeout_of(self, inode: Inode, watch: SourceWatch) -> float:
        return self._timeout if watch.announces(inode) else UNANNOUNCED_SECONDS

    def dot(self, directory: DirHandle, name: bytes) -> EntryAttributes:
        """Make the entry of ``.`` or ``..`` in a listing; the kernel takes no reference to them."""
        if directory.inode is self._inodes.root:
            return _entry(directory.dot(b"."))  # the source's parent is not shown
        entry = _entry(directory.dot(name))
        known = self._inodes.find(directory.dot(name))
        if directory.inode.dentry is not None:
            known = directory.inode if name == b"." else directory.inode.parent
        if known is not None and known is not self._inodes.root:
            entry.st_ino = InodeT(known.node)
        return entry

    def unknown(self) -> EntryAttributes:
        """Make the entry of a name whose stat failed: it is listed, and a lookup of it gets the error.

        It is shown as a directory, as dead mount points are what fails in practice. Its node id is
        given out once, stands for nothing, and expires at once.
        """
        entry = EntryAttributes()
        entry.st_ino = InodeT(self._inodes.next_dynamic())
        entry.st_mode = ModeT(stat_module.S_IFDIR)
        entry.attr_timeout = entry.entry_timeout = 0
        return entry

    def absent(self) -> EntryAttributes:
        """Make the entry that says that there is no such name, for the usual entry timeout.

        The kernel drops it by itself when the name is made through the mount.
        """
        entry = EntryAttributes()
        entry.st_ino = InodeT(0)
        entry.attr_timeout, entry.entry_timeout = 0, self._timeout
        return entry


def control_entry(node: Node) -> EntryAttributes:
    """Make the entry of a control file or directory."""
    entry = EntryAttributes()
    entry.st_ino = InodeT(node.number)
    entry.st_mode = ModeT(node.mode)
    entry.st_nlink = 1
    entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
    entry.st_size = len(node.text)
    entry.st_blocks = -(-len(node.text) // 512)  # none at all would be a file that is one hole
    entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = node.made_ns
    entry.attr_timeout = entry.entry_timeout = 0
    return entry


def new_attributes(attr: EntryAttributes, fields: SetattrFields) -> NewAttributes:
    """Translate the attributes that a setattr sets."""
    return NewAttributes(
        mode=attr.st_mode if fields.update_mode else None,
        uid=attr.st_uid if fields.update_uid else None,
        gid=attr.st_gid if fields.update_gid else None,
        size=attr.st_size if fields.update_size else None,
        atime_ns=attr.st_atime_ns if fields.update_atime else None,
        mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
    )


def statvfs_data(st: os.statvfs_result) -> StatvfsData:
    """Translate free space for pyfuse3."""
    data = StatvfsData()
    for name in STATVFS_FIELDS:
        setattr(data, name, getattr(st, name))
    return data


def _entry(st: os.stat_result) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = InodeT(st.st_ino)
    entry.st_mode = ModeT(st.st_mode)
    entry.st_nlink = st.st_nlink
    entry.st_uid = st.st_uid
    entry.st_gid = st.st_gid
    entry.st_rdev = st.st_rdev
    entry.st_size = st.st_size
    entry.st_blksize = st.st_blksize
    entry.st_blocks = st.st_blocks
    entry.st_atime_ns = st.st_atime_ns
    entry.st_mtime_ns = st.st_mtime_ns
    entry.st_ctime_ns = st.st_ctime_ns
    return entry


def seconds_and_ns(seconds: float) -> tuple[int, int]:
    """Split a timeout as FUSE wants it."""
    return int(seconds), int(seconds % 1 * 1_000_000_000)


def attr_out(entry: EntryAttributes) -> bytes:
    """Pack attributes as struct fuse_attr."""
    times = [divmod(ns, NS) for ns in (entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns)]
    return FUSE_ATTR.pack(
        *(entry.st_ino, entry.st_size, entry.st_blocks),
        *(seconds & SIGN for seconds, _ in times),
        *(ns for _, ns in times),
        *(entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_gid),
        *(_new_rdev(entry.st_rdev), entry.st_blksize, 0),
    )


def getattr_out(entry: EntryAttributes) -> bytes:
    """Pack struct fuse_attr_out."""
    return FUSE_ATTR_OUT.pack(*seconds_and_ns(entry.attr_timeout), 0) + attr_out(entry)


def entry_out(entry: EntryAttributes) -> bytes:
    """Pack struct fuse_entry_out."""
    entry_s, entry_ns = seconds_and_ns(entry.entry_timeout)
    attr_s, attr_ns = seconds_and_ns(entry.attr_timeout)
    timeouts = entry_s, attr_s, entry_ns, attr_ns
    return FUSE_ENTRY_OUT.pack(entry.st_ino, entry.generation, *timeouts) + attr_out(entry)


def open_out(info: FileInfo) -> bytes:
    """Pack struct fuse_open_out."""
    flags = FOPEN_DIRECT_IO if info.direct_io else 0
    flags |= FOPEN_KEEP_CACHE if info.keep_cache else 0
    return FUSE_OPEN_OUT.pack(info.fh, flags, 0)


def statx_out(entry: EntryAttributes, made_ns: int | None) -> bytes:
    """Pack attributes as struct fuse_statx; ``made_ns`` is the birth time, None if unknown."""
    mask = STATX_BASIC_STATS | (0 if made_ns is None else STATX_BTIME)
    times = entry.st_atime_ns, made_ns or 0, entry.st_ctime_ns, entry.st_mtime_ns
    return FUSE_SX.pack(
        *(mask, entry.st_blksize, 0, entry.st_nlink, entry.st_uid, entry.st_gid, entry.st_mode, 0),
        *(entry.st_ino, entry.st_size, entry.st_blocks, 0),
        *(part for ns in times for part in (*divmod(ns, NS), 0)),
        *(os.major(entry.st_rdev), os.minor(entry.st_rdev), 0, 0),
    )


def _new_rdev(rdev: int) -> int:
    """Encode a device number in 32 bits as the kernel does (``new_encode_dev``)."""
    major, minor = os.major(rdev), os.minor(rdev)
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
