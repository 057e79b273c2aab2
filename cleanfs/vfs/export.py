"""Find inodes that the kernel has forgotten, for file handles: ``open_by_handle_at``, NFS servers.

A handle of the mount is a node id and a generation. If the kernel does not know the node id, it sends
a LOOKUP of ".", and compares the generation of the reply with that of the handle.

The generation is a checksum of the source's own handle, so it lasts as long as the file does. The node
id is the inode number. Where the layout of the source's handles is known, a handle is composed of the
inode number (``Layout``). Then handles of the mount last, even across a remount. Elsewhere the daemon
remembers the source's handles of the inodes that the kernel forgot last (``Forgotten``).

A handle reaches any file of a file system, but the source may be only a part of it. So a file is given
out only if it is seen to be below the source: a directory by its parents, another file by its
remembered name. For a composed handle no name is known. It gives a file only where everything on the
file system is below the source.
"""

import errno
import fcntl
import os
import stat as stat_module
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cleanfs.linux import syscalls
from cleanfs.linux.mounts import is_file_system_root
from cleanfs.source import namespace
from cleanfs.source.errors import StaleError
from cleanfs.source.namespace import PATH_FLAGS
from cleanfs.vfs.handles import Services
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.node_ids import DYNAMIC_BASE
from cleanfs.vfs.tree import Tree, Using

MAX_FORGOTTEN: Final = 1 << 14
"""How many forgotten inodes are remembered, at some 0.3 KiB each."""

MAX_DEPTH: Final = 128
"""How many levels of forgotten parents are found for a forgotten file."""

NOT_FOUND: Final = (errno.EPERM, errno.EINVAL, errno.ENOENT, errno.ENOTTY)
"""Errors, beside ESTALE, that handles and inode numbers give if they lead to nothing or are refused."""

BTRFS_SUBVOLUME: Final = 256
"""Inode number of the root of each subvolume."""

XFS_IOC_BULKSTAT: Final = 0x8040587F
XFS_BULKSTAT: Final = struct.Struct("=QIIII40x Q56xI124x")
"""``struct xfs_bulk_ireq`` (ino, flags, icount, ocount, agno), and of ``struct xfs_bulkstat`` bs_ino
and bs_gen."""


def can_export(directory: str) -> bool:
    """Tell whether the handles of a directory's file system can be opened. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(syscalls.open_by_handle(fd, syscalls.name_to_handle(fd), os.O_PATH))
    except OSError:  # no CAP_DAC_READ_SEARCH, or no handles
        return False
    finally:
        os.close(fd)
    return True


def _any_generation(_: int, __: int) -> int:
    return 0


def _xfs_generation(fd: int, ino: int) -> int:
    """Read the generation by bulkstat. It takes CAP_SYS_ADMIN. Raises StaleError, OSError."""
    buffer = bytearray(XFS_BULKSTAT.pack(ino, 0, 1, 0, 0, 0, 0))
    fcntl.ioctl(fd, XFS_IOC_BULKSTAT, buffer)
    *_, found, number = XFS_BULKSTAT.unpack(buffer)
    if found != ino:  # there is no such inode, and this is the next one
        raise StaleError
    return int(number)


@dataclass(frozen=True, slots=True)
class Layout:
    """Describes the handles that ``name_to_handle_at`` gives on a file system."""

    types: tuple[str, ...]
    """The names of the file systems in mountinfo; any if empty."""
    kind: int
    """The ``handle_type``."""
    ino: struct.Struct
    """The inode number, with which the body begins."""
    generation_at: int
    """The offset of the generation in the body, which ends with it: 32 bits."""
    generation: Callable[[int, int], int]
    """Returns the generation of an inode number on the file system of an fd. Raises OSError."""

    def fits(self, fs_type: str, handle: bytes) -> bool:
        """Tell whether a handle of that type of file system has this layout."""
        kind = int.from_bytes(handle[:4], "little", signed=True)
        return (
            (not self.types or fs_type in self.types)
            and kind == self.kind
            and len(handle) == 4 + self.generation_at + 4
        )

    def compose(self, example: bytes, ino: int, number: int) -> bytes:
        """Make the handle of an inode from another's. Raises StaleError if there can be none."""
        try:
            packed = self.ino.pack(ino)
        except struct.error:
            raise StaleError from None
        middle = example[4 + len(packed) : 4 + self.generation_at]
        return example[:4] + packed + middle + number.to_bytes(4, "little")


NUMBER32: Final = struct.Struct("<I")
NUMBER64: Final = struct.Struct("<Q")

LAYOUTS: Final = (
    Layout(("ext2", "ext3", "ext4", "f2fs"), 1, NUMBER32, 4, _any_generation),
    Layout(("xfs",), 1, NUMBER32, 4, _xfs_generation),
    Layout(("xfs",), 0x81, NUMBER64, 8, _xfs_generation),
    Layout((), 0x4D, NUMBER64, 16, _any_generation),  # btrfs; between them the subvolume
)
"""Generation 0 is any for ``ext4_nfs_get_inode``, ``f2fs_nfs_get_inode`` and ``btrfs_get_dentry``."""


@dataclass(frozen=True, slots=True)
class SourceHandles:
    """Makes handles of one file system of the source."""

    mount_fd: int
    example: bytes
    """The handle of the directory that ``mount_fd`` refers to."""
    layout: Layout | None
    is_whole: bool
    """Whether everything on the file system is below the source."""

    def compose(self, ino: int) -> bytes:
        """Make the handle of an inode number. Waits for the source. Raises StaleError, OSError."""
        if self.layout is None:
            raise StaleError
        number = self.layout.generation(self.mount_fd, ino)
        return self.layout.compose(self.example, ino, number)


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Holds what is remembered of an inode."""

    device: int
    handle: bytes
    parent: int
    """Node id of the directory where it was found last; 0 for none."""
    name: bytes


@dataclass(frozen=True, slots=True)
class Decoded:
    """Holds what a handle of the source leads to."""

    fd: int
    stat: os.stat_result
    handle: bytes


class Export:
    """Finds inodes by handles (see the module), on the main thread. Threads wait for the source."""

    def __init__(self, services: Services, inodes: InodeTable, tree: Tree) -> None:
        """Start with nothing forgotten."""
        self._services = services
        self._inodes = inodes
        self._tree = tree
        self._handles: dict[int, SourceHandles] = {}  # by device
        self._forgotten: dict[int, Forgotten] = {}  # by node, the latest last
        inodes.on_drop(self._remember)

    async def find(self, node: int, depth: int = 0) -> tuple[Inode, os.stat_result]:
        """Find the inode of a node id, with one more kernel reference. Raises StaleError, OSError."""
        inode = self._inodes.get(node)
        if inode is not None:
            return await self._refer_to(inode)
        known = self._forgotten.get(node)
        device, ino = (known.device, 0) if known else self._inodes.decode(node)
        handles = self._handles_of(device)
        if handles is None:
            raise StaleError
        handle = known.handle if known else b""
        found = await self._tree.in_thread_with_retry(_open, handles, handle, ino)
        try:
            parent = await self._check_below_source(found, handles, known, depth)
        except BaseException:
            os.close(found.fd)
            raise
        inode = self._inodes.decoded(found.fd, found.stat, found.handle, node)
        if parent is not None and known is not None:
            self._inodes.moved(inode, parent, known.name)
        self._forgotten.pop(node, None)
        return inode, found.stat

    async def _refer_to(self, inode: Inode) -> tuple[Inode, os.stat_result]:
        """Take a kernel reference to an inode in the table. Raises StaleError, OSError."""
        async with Using(self._tree, inode):
            st = await self._tree.stat(inode)
            if not st.st_nlink:
                raise StaleError
            inode.nlookup += 1
            return inode, st

    async def _check_below_source(
        self, found: Decoded, handles: SourceHandles, known: Forgotten | None, depth: int
    ) -> Inode | None:
        """Raise StaleError unless an opened file is below the source; or OSError.

        Returns the file's parent if its remembered name proved it, otherwise None.
        """
        if stat_module.S_ISDIR(found.stat.st_mode):
            root = self._inodes.root.id
            if not await self._tree.in_thread_with_retry(_leads_to, found.fd, root):
                raise StaleError
            return None
        if handles.is_whole:
            return None
        if known is None:
            raise StaleError
        return await self._parent(known, found, depth)

    async def find_parent(self, node: int) -> tuple[Inode, os.stat_result]:
        """Find the parent of a directory. No reference is taken to the root."""
        root = self._inodes.root
        async with self._tree.using(node) as inode:
            if inode is root or not inode.is_dir:
                raise StaleError
            found = await self._tree.in_thread_with_retry(_open_parent, inode.fd, root.id)
        if (found.stat.st_dev, found.stat.st_ino) == root.id:
            os.close(found.fd)
            return root, found.stat
        return self._inodes.decoded(found.fd, found.stat, found.handle), found.stat

    async def _parent(self, known: Forgotten, found: Decoded, depth: int) -> Inode:
        """Find the parent in which a forgotten file still has its name. Raises StaleError, OSError."""
        if not known.parent or depth == MAX_DEPTH:
            raise StaleError
        parent, _ = await self.find(known.parent, depth + 1)
        try:
            async with Using(self._tree, parent):
                there = await self._tree.in_thread_with_retry(namespace.identify, parent.fd, known.name)
        except FileNotFoundError:
            raise StaleError from None
        finally:
            self._inodes.forget(parent.node, 1)
        if there != (found.stat.st_dev, found.stat.st_ino):
            raise StaleError
        return parent

    def _remember(self, inode: Inode) -> None:
        """Remember an inode that leaves the table."""
        handles = self._handles_of(inode.device)
        if handles is None or not inode.handle or self._services.space_retry.is_removed(inode.node):
            return
        composed = handles.layout is not None and (inode.is_dir or handles.is_whole)
        if composed and inode.node < DYNAMIC_BASE:
            return
        self._forgotten.pop(inode.node, None)
        if len(self._forgotten) == MAX_FORGOTTEN:
            del self._forgotten[next(iter(self._forgotten))]
        parent = 0 if inode.parent is None else inode.parent.node
        self._forgotten[inode.node] = Forgotten(inode.device, inode.handle, parent, inode.name)

    def _handles_of(self, device: int) -> SourceHandles | None:
        """Return the handles of a device; None if there are none now.

        This does not wait for the source, as the kernel encodes handles.
        """
        known = self._handles.get(device)
        mount_fd = self._inodes.mount_fd(device)
        if known is not None or mount_fd < 0 or not self._inodes.lasts(device):
            return known
        try:
            known = _handles_at(mount_fd, self._services.types[device])
        except OSError:  # no fd is left, or the source fails
            return None
        self._handles[device] = known
        return known


def _handles_at(mount_fd: int, fs_type: str) -> SourceHandles:
    example = syscalls.name_to_handle(mount_fd)
    layout = next((layout for layout in LAYOUTS if layout.fits(fs_type, example)), None)
    is_subvolume = fs_type == "btrfs" and os.fstat(mount_fd).st_ino == BTRFS_SUBVOLUME
    is_whole = is_subvolume or is_file_system_root(mount_fd)
    return SourceHandles(mount_fd, example, layout, is_whole)


def _open(handles: SourceHandles, handle: bytes, ino: int) -> Decoded:
    """Open a file by its handle, or else its inode number, in a thread. Raises StaleError, OSError."""
    try:
        handle = handle or handles.compose(ino)
        fd = syscalls.open_by_handle(handles.mount_fd, handle, os.O_PATH | os.O_NOFOLLOW)
    except OSError as exc:
        if exc.errno in NOT_FOUND:
            raise StaleError from exc
        raise
    return _decoded(fd, ino)


def _open_parent(fd: int, root: tuple[int, int]) -> Decoded:
    """Open the parent of a directory, if that is the root or below it, in a thread."""
    found = _decoded(os.open("..", PATH_FLAGS, dir_fd=fd))
    if not _leads_to(found.fd, root):
        os.close(found.fd)
        raise StaleError
    return found


def _decoded(fd: int, ino: int = 0) -> Decoded:
    """Identify an opened file, and take over ``fd``; ``ino`` is its inode number, if known."""
    try:
        found = Decoded(fd, os.fstat(fd), syscalls.name_to_handle(fd))
    except BaseException:
        os.close(fd)
        raise
    if not found.stat.st_nlink or ino not in (0, found.stat.st_ino):
        os.close(fd)
        raise StaleError
    return found


def _leads_to(fd: int, root: tuple[int, int]) -> bool:
    """Tell whether a directory is ``root`` (device, inode number) or below it; in a thread."""
    fd = os.dup(fd)
    try:
        here, st = (0, 0), os.fstat(fd)
        while here != root and here != (st.st_dev, st.st_ino):
            here = st.st_dev, st.st_ino
            above = os.open("..", PATH_FLAGS, dir_fd=fd)
            os.close(fd)
            fd, st = above, os.fstat(above)
        return here == root
    finally:
        os.close(fd)
