"""An inode: one object of the source that the kernel knows, held by a descriptor or *parked*."""

import stat as stat_module
from typing import Final

from cleanfs.backends.ops import FileKey
from cleanfs.source.identity import Dentry
from cleanfs.vfs.kernel_view import KernelView
from cleanfs.vfs.node_ids import ROOT

MAX_DEPTH: Final = 64
"""How many names a path on the mount may have to be worth building."""


class Inode:
    """One file, directory or other object of the source that the kernel knows."""

    __slots__ = (
        "dentry", "device", "fd", "file_key", "generation", "handle", "ino", "kernel", "kind",
        "lost_capability", "name", "nlookup", "node", "open_fds", "parent", "pins",
        "suspect",
    )  # fmt: skip

    def __init__(self, device: int, ino: int, kind: int, node: int, generation: int) -> None:
        """Make a parked inode whose name is not known yet."""
        self.device = device
        self.ino = ino
        self.kind = kind
        """File type bits of the mode."""
        self.node = node
        self.suspect = False
        """Whether a call on ``fd`` failed with an error that another fd of the file may not meet."""
        self.generation = generation
        """Lets the kernel tell apart two inodes that had the same node id at different times."""
        self.fd = -1
        """O_PATH fd, or -1 if parked."""
        self.handle: bytes | None = None
        """File handle; None if never requested, empty if the file system has none."""
        self.dentry: Dentry | None = None
        """The place where it was seen last, if the file is identified by that."""
        self.parent: Inode | None = None
        self.name = b""
        self.nlookup = 0
        """The kernel's lookup count."""
        self.pins = 0
        """The number of requests that use ``fd``, which must then not be closed."""
        self.open_fds: tuple[int, ...] = ()
        """The fds of its open file handles."""
        self.file_key: FileKey | None = None
        self.kernel = KernelView()
        """What the kernel was told."""
        self.lost_capability = False
        """Whether the last request removed its capabilities, perhaps because a change follows."""

    @property
    def id(self) -> tuple[int, int]:
        """Return the (device, inode number) pair."""
        return self.device, self.ino

    @property
    def is_dir(self) -> bool:
        """Tell whether it is a directory."""
        return self.kind == stat_module.S_IFDIR

    @property
    def idle(self) -> bool:
        """Tell whether no request and no open file uses it."""
        return not self.pins and not self.open_fds

    def mount_path(self) -> bytes:
        """Return the path by which the kernel found it below the mount's root; empty if unknown.

        Renames in the source can leave a directory among its own parents.
        """
        names: list[bytes] = []
        inode = self
        while inode.parent is not None and len(names) < MAX_DEPTH:
            names.append(inode.name)
            inode = inode.parent
        return b"/".join(reversed(names)) if inode.node == ROOT else b""

    def path(self) -> str:
        """Return a path that stands for ``fd`` in calls that take no O_PATH fd."""
        return f"/proc/self/fd/{self.fd}"
