"""An inode: one object of the source that the kernel knows, held by a descriptor or *parked*."""

import stat as stat_module

from cleanfs.backends.ops import FileKey
from cleanfs.source.caller import Caller
from cleanfs.source.identity import Dentry
from cleanfs.vfs.kernel_view import KernelView


class Inode:
    """One file, directory or other object of the source that the kernel knows."""

    __slots__ = (
        "asked_for", "dentry", "device", "fd", "file_key", "generation", "handle", "ino", "kernel",
        "kind", "lost_capability", "name", "nlookup", "node", "open_fds", "parent", "pins", "suspect",
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
        self.kernel = KernelView()
        """What the kernel was told."""
        self.asked_for: Caller | None = None
        """Whose write may come next: the requester for whom the kernel read the capabilities. It does
        that before it sends a program's write to a file with set-id bits, not before it sends the dirty
        pages of a mapping. None for nobody, and for root unless a user came before: no write need
        follow, and then it cannot be told whose the next one is."""
        self.lost_capability = False
        """The last request took its capabilities away, perhaps for a change that is to come."""

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

    def path(self) -> str:
        """A path that stands for ``fd`` in calls that take no O_PATH descriptor."""
        return f"/proc/self/fd/{self.fd}"
