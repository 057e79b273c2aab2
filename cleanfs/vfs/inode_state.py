"""The state of inodes that the FUSE channel reads, to reply with names and attributes without Python.

The classes here are for the Python engine. The native ones that replace them
(``native/inode_state.hpp``) have the same fields, and the channel's C++ code reads and writes these.
All are written on the main thread.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from cleanfs.cache.state import FileState, InlineState, KernelState, NowaitState, native

NOT_TOLD = -1
"""The access of an inode of which no mode and owners were told."""


class KernelViewState(KernelState):
    """The state of one inode as the kernel may see it, with all that replies with attributes change."""

    __slots__ = ("access", "access_ctime", "acl", "doubts", "doubts_settled", "size_doubt")

    def __init__(self) -> None:
        """Start with a kernel that was told nothing."""
        super().__init__()
        self.access = NOT_TOLD
        """The mode and owners that it was last told (``kernel_view.access_of``), and by which it checks
        access."""
        self.access_ctime = 0
        """The ctime at which those and the ACL were told, or last found unchanged."""
        self.acl = b""
        """The access ACL that it was last told; empty for none."""
        self.doubts = self.doubts_settled = 0
        """How often it was told attributes that differ from the last ones, and how many of these
        replies a notification followed."""
        self.size_doubt = 0
        """The last doubt about the size. Until it is settled, a read may use another size."""

    def tell(self, size: int, mtime_ns: int, ctime_ns: int, mode: int, uid: int, gid: int) -> None:
        """Record that a reply tells these attributes."""
        now = size, mtime_ns, ctime_ns
        if self.sent not in (None, now):
            self.doubts += 1
            if size != self.size:
                self.size_doubt = self.doubts
        self.sent, self.size = now, size
        self.access, self.access_ctime = mode | uid << 32 | gid << 64, ctime_ns


class InodeState:
    """The state of one inode: the base of ``Inode``."""

    __slots__ = (
        "current", "device", "fd", "generation", "ino", "kind", "local", "name", "nlookup", "node",
        "open_fds", "polled", "suspect", "used",
    )  # fmt: skip

    def __init__(
        self, device: int, ino: int, kind: int, node: int, generation: int, kernel: KernelViewState
    ) -> None:
        """Make the state of a parked inode whose name is not known yet."""
        self.device = device
        self.ino = ino
        self.kind = kind
        """File type bits of the mode."""
        self.node = node
        self.generation = generation
        """Lets the kernel tell apart two inodes that had the same node id at different times."""
        self.fd = -1
        """O_PATH fd, or -1 if parked."""
        self.nlookup = 0
        """The kernel's lookup count."""
        self.open_fds: tuple[int, ...] = ()
        """The fds of its open file handles."""
        self.polled = False
        """Whether it is polled for changes, as it is open or was lately."""
        self.local = False
        """Whether it is in this machine's memory once held: on a file system on which inode numbers
        last and fstat does not wait."""
        self.suspect = False
        """Whether a call on ``fd`` failed with an error that another fd of the file may not meet."""
        self.used = False
        """Whether the channel used ``fd`` since the inode was last made the youngest in the table."""
        self.current = False
        """Whether the source has it now under its device and number (``InodeIndex``)."""
        self.name = b""

    @property
    def opens(self) -> int:
        """Count its file handles."""
        return len(self.open_fds)

    def add_open_fd(self, fd: int) -> None:
        """Note that a file handle has this fd."""
        self.open_fds += (fd,)

    def remove_open_fd(self, fd: int) -> None:
        """Note that it has it no more."""
        self.open_fds = tuple(other for other in self.open_fds if other != fd)

    def set_place(self, parent: "InodeState | None", name: bytes) -> None:
        """Set the directory and the name by which the kernel last found it."""
        self.name = name

    def set_record(self, record: FileState | None) -> None:
        """Set the record of its file; None if it has none, or is not looked for."""


class InodeStates:
    """The inodes of one mount."""

    native = False
    """Whether the channel can read it."""

    def __init__(self) -> None:
        """Start without inodes."""
        self._nodes: set[int] = set()
        self.wants_handles = False
        """Whether new inodes are entered with their file handles."""
        self.timeout = 0.0
        """The timeout of attributes and names, in seconds."""
        self.unwatched_timeout = 0.0
        """That of inodes on file systems whose changes are not all announced."""
        self.caches_absence = False
        """Whether the kernel is told to remember that there is no such name."""
        self.control_name = b""
        """The name of the control directory in the root."""
        self.max_inodes = 0
        """With more inodes than this, the kernel is made to forget some."""
        self.writeback = False
        """Whether the kernel writes later, and needs each file opened for reading, too."""
        self.can_act = False
        """Whether what the daemon makes in the source is what a thread that acts for itself makes."""
        self.open_fds = 0
        """The fds of all file handles."""
        self.fd_budget = 0
        """Inodes that may be held, and half of the fds that file handles may have."""

    def __len__(self) -> int:
        """Count the inodes."""
        return len(self._nodes)

    def add(self, inode: InodeState) -> None:
        """Add an inode under its node id, in place of any other."""
        self._nodes.add(inode.node)

    def remove(self, inode: InodeState) -> None:
        """Remove an inode, unless another took its place."""
        self._nodes.discard(inode.node)

    def watch(self, device: int) -> None:
        """Note that all changes of a file system are announced, if it is local."""

    def set_invalidating(self, node: int, pending: bool) -> None:
        """Note whether an invalidation of an inode is queued or being sent."""

    def refuse(self, thread: int) -> None:
        """Note that a thread was refused a call by a stale name, and may come again."""

    def stop_refusing(self, thread: int) -> None:
        """Forget that."""

    def use_file_system(
        self,
        device: int,
        nowait: NowaitState,
        reads: InlineState,
        writes: InlineState,
        lookups: InlineState,
        names: InlineState,
        listings: InlineState,
    ) -> None:
        """Note which calls to a local file system of the source do not wait."""

    def use_table(self, calls: object, task_ready: Callable[[], bool]) -> None:
        """Have ``fuse.calls`` called. ``task_ready`` tells whether a task of trio can run."""


if native is not None and not TYPE_CHECKING:
    KernelViewState, InodeState = native.KernelViewState, native.InodeState
    InodeStates = native.InodeStates
