"""The control directory: ``MOUNT/.cleancache``, reachable by name, not listed in the root.

An open gives the state at that moment, a further read from the start gives it anew, a write is one
command. The kernel caches no attributes of it, and never serves read(2) from its cache (direct I/O).

Sizes are right, unlike those in /proc. sendfile and splice, and with them ``shutil.copyfile``, use the
kernel's page cache even if a file is opened for direct I/O. They end at the size that the kernel knows;
with a size of 0 they copy nothing, without an error (Linux 6.18). So a lookup makes a file's text, and
the open that follows reads that text. The size belongs to the inode, not to the handle, and a write
moves it. So while one thread has looked a file up or has it open, other threads find another inode.
"""

import errno
import json
import os
import stat as stat_module
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from pyfuse3 import FUSEError

from cleanfs import backends
from cleanfs.cache.cleancache import BackendBusyError
from cleanfs.cache.in_flight import Buffer
from cleanfs.fs.stats import MountStats
from cleanfs.sizes import parse_size
from cleanfs.source.attributes import NewAttributes
from cleanfs.source.errors import StaleError
from cleanfs.vfs.handles import Handle
from cleanfs.vfs.node_ids import CONTROL_BASE, CONTROL_END

CONTROL_NAME = b".cleancache"

DROP_PAGE_CACHE = 1
DROP_CLEANCACHE = 2
"""Bits of what is written to ``drop``, as in ``/proc/sys/vm/drop_caches``."""

MAX_COMMAND = 4096
"""Bytes of a write, as in sysfs. The kernel would split a much longer one into several requests."""

LOOK_NS = 1_000_000_000
"""How many nanoseconds after a thread's lookup the text and inode are reserved for its open. A later
open (O_PATH) makes the text anew."""

MAX_TWINS = 64
"""The most nodes of a name. Beyond that, threads share those that are not open."""

PASS_NS = 100_000_000
"""How many nanoseconds a reader has for one pass over a text. A reader that begins anew after that, or
after an empty read, gets a new text. tail(1) reads the last block of a file, and then all of it."""

NO_BACKEND = "none"

Read = Callable[[], str]
Write = Callable[[str], None]


class Operator(Protocol):
    """Reads and does what control files can. Wrong values raise ValueError, and change nothing."""

    def stats(self) -> MountStats:
        """Return all statistics."""

    def set_backend(self, name: str) -> None:
        """Register a backend, or take it out of service (``none``)."""

    def set_pool_limit(self, limit: int) -> None:
        """Set how many bytes the backend may use."""

    def set_page_cache(self, limit: int) -> None:
        """Set how many bytes the page cache may use."""

    def set_log_level(self, level: str) -> None:
        """Set the least severe level that is logged."""

    def drop(self, what: int) -> None:
        """Drop the page cache (bit 1), cleancache (bit 2) or both."""

    @property
    def pool_limit(self) -> int:
        """Return the configured limit of the backend in bytes, also while there is none."""

    @property
    def page_cache(self) -> int:
        """Return the configured limit of the page cache in bytes."""

    @property
    def log_level(self) -> str:
        """Return the least severe level that is logged."""

    def options(self) -> Mapping[str, object]:
        """Return the current options of the mount, by name."""


class Node:
    """Represents a control file or directory."""

    def __init__(
        self,
        number: int,
        mode: int,
        read: Read | None = None,
        write: Write | None = None,
        list_children: Callable[[], Iterator[tuple[bytes, "Node"]]] | None = None,
    ) -> None:
        """Make a node. ``number`` is its node id; ``mode`` has type and permission bits."""
        self.number = number
        self.mode = mode
        self.write = write
        self.twins: list[Node] = []
        """Nodes of the same name, for threads that open it while others have it open."""
        self.users = 0
        """The number of open handles. While there are several, ``text`` does not change."""
        self.text = b""
        """The text whose size the kernel was told."""
        self.made_ns = time.time_ns()
        """The time when ``text`` was made."""
        self.seen_by = 0
        """The thread whose lookup made ``text``; 0 for none."""
        self._read = read
        self._list_children = list_children

    @property
    def readable(self) -> bool:
        """Tell whether there is anything to read."""
        return self._read is not None

    def is_free(self, thread: int, since_ns: int) -> bool:
        """Tell whether it is not open, and no other thread has looked it up since then."""
        return not self.users and (self.seen_by in (0, thread) or self.made_ns < since_ns)

    def make_text(self) -> bytes:
        """Return the state at this moment."""
        return b"" if self._read is None else os.fsencode(self._read())

    def renew(self) -> None:
        """Set ``text`` to the state at this moment."""
        if self.readable:
            self.text, self.made_ns = self.make_text(), time.time_ns()

    def twin(self, number: int) -> "Node":
        """Make one more node of this name."""
        self.twins.append(made := Node(number, self.mode, self._read, self.write))
        return made

    @property
    def is_dir(self) -> bool:
        """Tell whether it is a directory."""
        return self._list_children is not None

    @property
    def children(self) -> list[tuple[bytes, "Node"]]:
        """Return the names and nodes in a directory. Raises NotADirectoryError."""
        if self._list_children is None:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return list(self._list_children())


class Control:
    """The tree of control files of one mount."""

    def __init__(self, operator: Operator) -> None:
        """Make the tree, whose files read from and write to ``operator``."""
        self._operator = operator
        self._nodes: dict[int, Node] = {}
        self._counters: dict[str, Node] = {}
        stats = operator.stats
        self.root = self._dir(self._top)
        self._files = {
            b"succ_gets": self._file(lambda: f"{stats().cleancache.succ_gets}\n"),
            b"failed_gets": self._file(lambda: f"{stats().cleancache.failed_gets}\n"),
            b"puts": self._file(lambda: f"{stats().cleancache.puts}\n"),
            b"flushes": self._file(lambda: f"{stats().cleancache.flushes}\n"),
            b"stats": self._file(lambda: stats().as_text()),
            b"stats.json": self._file(lambda: stats().as_json()),
            b"metrics": self._file(lambda: stats().as_prometheus()),
            b"backend": self._file(lambda: f"{stats().backend}\n", operator.set_backend),
            b"pool_limit": self._file(
                lambda: f"{operator.pool_limit}\n",
                lambda text: operator.set_pool_limit(parse_size(text)),
            ),
            b"page_cache": self._file(
                lambda: f"{operator.page_cache}\n",
                lambda text: operator.set_page_cache(parse_size(text)),
            ),
            b"log_level": self._file(lambda: f"{operator.log_level}\n", operator.set_log_level),
            b"options.json": self._file(lambda: json.dumps(operator.options(), indent=2) + "\n"),
            b"drop": self._file(None, self._drop),
        }
        self._backend_dir = self._dir(self._backend_counters)
        self._unlisted: dict[bytes, Node] = {}

    @property
    def open_files(self) -> int:
        """Count the open handles of control files."""
        return sum(node.users for node in self._nodes.values())

    def node(self, number: int) -> Node | None:
        """Return a node by its id; None if the id is no control file's. Raises StaleError."""
        if not CONTROL_BASE <= number < CONTROL_END:
            return None
        try:
            return self._nodes[number]
        except KeyError:  # from a file handle
            raise StaleError from None

    @contextmanager
    def unlisted_file(self, name: bytes, text: str) -> Iterator[None]:
        """Have a file in the root until the end of the block, for use by the daemon itself."""
        node = self._unlisted[name] = self._file(lambda: text)
        node.mode &= ~0o077
        try:
            yield
        finally:
            del self._unlisted[name]

    def lookup(self, directory: Node, name: bytes, thread: int) -> Node:
        """Find a child by name, to be shown to the kernel. Raises FileNotFoundError."""
        unlisted = self._unlisted.items() if directory is self.root else ()
        for child_name, child in (*directory.children, *unlisted):
            if child_name == name:
                found = self.show(child, thread)
                found.seen_by = thread
                return found
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def show(self, node: Node, thread: int = 0) -> Node:
        """Return a node of this name that no other thread uses, with a new text, for a reply."""
        if node.is_dir:
            return node
        since_ns = time.time_ns() - LOOK_NS
        every = (node, *node.twins)
        shown = next((twin for twin in every if twin.is_free(thread, since_ns)), None)
        if shown is None and len(every) >= MAX_TWINS:
            closed = [twin for twin in every if not twin.users]
            shown = min(closed, key=lambda twin: twin.made_ns, default=None)
        if shown is None:
            shown = self._add(node.twin(self._next()))
        shown.renew()
        return shown

    def refresh(self, node: Node) -> None:
        """Renew the text before its attributes are read, but not between a lookup and its open."""
        if not node.users and time.time_ns() - node.made_ns > PASS_NS:
            node.renew()

    def open(self, node: Node, flags: int) -> Handle:
        """Open a file. The kernel checks permissions, by mode and owner."""
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        reads = flags & os.O_ACCMODE != os.O_WRONLY
        if (writes and node.write is None) or (reads and not node.readable):
            raise FUSEError(errno.EACCES)
        if not node.users and time.time_ns() - node.made_ns > LOOK_NS:
            node.renew()
        return _ControlHandle(node)

    def truncate_only(self, node: Node, new: NewAttributes) -> None:
        """Allow only truncation, as ``> file`` truncates before it writes. Raises FUSEError."""
        if (new.mode, new.uid, new.gid) != (None, None, None) or node.write is None:
            raise FUSEError(errno.EPERM)

    def _drop(self, text: str) -> None:
        if text not in ("1", "2", "3"):
            raise ValueError(text)
        self._operator.drop(int(text))

    def _top(self) -> Iterator[tuple[bytes, Node]]:
        yield from self._files.items()
        name = self._operator.stats().backend
        if name != NO_BACKEND:
            yield name.encode(), self._backend_dir

    def _backend_counters(self) -> Iterator[tuple[bytes, Node]]:
        for name in self._operator.stats().counters:
            if name not in self._counters:
                self._counters[name] = self._file(partial(self._counter, name))
            yield name.encode(), self._counters[name]

    def _counter(self, name: str) -> str:
        return f"{self._operator.stats().counters.get(name, 0)}\n"

    def _file(self, read: Read | None, write: Write | None = None) -> Node:
        bits = (0o444 if read else 0) | (0o200 if write else 0)
        return self._add(Node(self._next(), stat_module.S_IFREG | bits, read, write))

    def _dir(self, children: Callable[[], Iterator[tuple[bytes, Node]]]) -> Node:
        return self._add(Node(self._next(), stat_module.S_IFDIR | 0o555, list_children=children))

    def _next(self) -> int:
        return CONTROL_BASE + len(self._nodes)

    def _add(self, node: Node) -> Node:
        self._nodes[node.number] = node
        return node


class _ControlHandle:
    """An open control file. A reader that begins anew gets a new text, which is never torn."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._text = node.text
        self._made_ns = node.made_ns
        self._begun = self._outdated = False
        node.users += 1

    async def read(self, offset: int, size: int) -> Buffer:
        node = self._node
        if not node.readable:
            raise FUSEError(errno.EBADF)
        if offset == 0:
            if self._outdated or (self._begun and time.time_ns() - self._made_ns > PASS_NS):
                self._renew()
            self._begun = True
        data = self._text[offset : offset + size]
        self._outdated = self._outdated or not data
        return data

    def _renew(self) -> None:
        """Take a new text. The inode's size follows it, unless there are other handles of the inode."""
        node = self._node
        if node.users == 1:
            node.renew()
        self._text = node.text if node.users == 1 else node.make_text()
        self._made_ns, self._outdated = time.time_ns(), False

    async def write(self, offset: int, data: bytes) -> tuple[int, None]:
        if self._node.write is None:
            raise FUSEError(errno.EBADF)
        if len(data) > MAX_COMMAND:
            raise FUSEError(errno.EINVAL)
        self._outdated = True
        try:
            self._node.write(data.strip().decode())
        except BackendBusyError as exc:
            raise FUSEError(errno.EBUSY) from exc
        except (ValueError, backends.UnknownBackendError) as exc:
            raise FUSEError(errno.EINVAL) from exc
        return len(data), None

    async def flush(self) -> None:
        pass

    async def release(self) -> None:
        node = self._node
        node.users -= 1
        if not node.users:
            node.text, node.made_ns, node.seen_by = b"", 0, 0

    async def sync(self, data_only: bool) -> None:
        pass
