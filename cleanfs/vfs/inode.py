"""An inode: one object of the source that the kernel knows, held by a descriptor or *parked*."""

import stat as stat_module
from typing import Final

from cleanfs.backends.ops import FileKey
from cleanfs.cache.files import CachedFile
from cleanfs.source.identity import Dentry
from cleanfs.vfs.inode_state import InodeState
from cleanfs.vfs.kernel_view import KernelView
from cleanfs.vfs.node_ids import ROOT

MAX_DEPTH: Final = 64
"""How many names a path on the mount may have to be worth building."""


class Inode(InodeState):
    """One file, directory or other object of the source that the kernel knows."""

    __slots__ = (
        "dentry", "file_key", "handle", "kernel", "lost_capability", "parent", "pins",
        "record",
    )  # fmt: skip

    def __init__(self, device: int, ino: int, kind: int, node: int, generation: int) -> None:
        """Make a parked inode whose name is not known yet."""
        self.kernel = KernelView()
        """What the kernel was told."""
        super().__init__(device, ino, kind, node, generation, self.kernel)
        self.handle: bytes | None = None
        """File handle; None if never requested, empty if the file system has none."""
        self.dentry: Dentry | None = None
        """The place where it was seen last, if the file is identified by that."""
        self.parent: Inode | None = None
        """The directory in which the kernel last found it (``move``)."""
        self.pins = 0
        """The number of requests that use ``fd``, which must then not be closed."""
        self.file_key: FileKey | None = None
        """Identifies its cached pages; None if none were ever looked for."""
        self.record: CachedFile | None = None
        """The record of that file, which may be forgotten by now (``set_file``)."""
        self.lost_capability = False
        """Whether the last request removed its capabilities, perhaps because a change follows."""

    def move(self, parent: "Inode | None", name: bytes) -> None:
        """Record the directory and the name by which the kernel finds it."""
        self.parent = parent
        self.set_place(parent, name)

    def set_file(self, key: FileKey | None, record: CachedFile | None) -> None:
        """Record which cached pages belong to it."""
        self.file_key, self.record = key, record
        self.set_record(record)

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
        return not self.pins and not self.opens

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
