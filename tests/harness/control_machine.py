"""Write random commands to the control files of a mount and compare the results with a model."""

import errno
import os
import re
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cleanfs.cache.resident import PythonResident
from cleanfs.sizes import MAX_SIZE, parse_size
from tests.harness.fuzzing import SIZES
from tests.harness.mounting import MountedFs

PAGE = 4096
LEAST_POOL = 1 << 20
LEAST_PAGE_CACHE = PAGE + PythonResident.overhead
MAX_COMMAND = 4096

EDGES = st.sampled_from((
    0, 1, LEAST_PAGE_CACHE - 1, LEAST_PAGE_CACHE, LEAST_POOL - 1, LEAST_POOL, LEAST_POOL + 1, 3 << 20,
    1 << 30, 1 << 40, 1 << 51, MAX_SIZE, MAX_SIZE + 1, 1 << 63, 1 << 64,
)).map(str)  # fmt: skip

WORDS = st.sampled_from(("0", "1", "2", "3", "4", "12", "none", "zcache", "NONE", "zcache none",
                         "../zcache", "1M", "64M", "2.5M", "1E", "5E", ".cleancache", "\u0663",
                         "\uff13"))  # fmt: skip

COMMANDS = st.one_of(
    st.tuples(
        st.sampled_from((b"", b"", b"", b" ", b"\n", b"\t", b" " * 4000)),
        st.one_of(WORDS, WORDS, EDGES, SIZES).map(lambda text: text.encode(errors="surrogateescape")),
        st.sampled_from((b"", b"\n", b"\n", b"\r\n", b" \n ", b"\0", b"\n\n",
                         b" x", b" " * 4096)),
    ).map(b"".join),
    st.binary(max_size=40),
    st.sampled_from((b"\n", b" " * 5000, b"0" * 5000 + b"16777216", b"zcache" * 800,
                     b"1" * MAX_COMMAND)),
)  # fmt: skip


def at_once(fd: int, data: bytes) -> int:
    return os.write(fd, data)


def at_a_large_offset(fd: int, data: bytes) -> int:
    return os.pwrite(fd, data, 1 << 40)


def in_pieces(fd: int, data: bytes) -> int:
    return os.writev(fd, [data[:1], data[1:3], data[3:]])


def spliced(fd: int, data: bytes) -> int:
    reader, writer = os.pipe()
    try:
        os.write(writer, data)
        return os.splice(reader, fd, len(data))
    finally:
        os.close(reader)
        os.close(writer)


WAYS: tuple[tuple[int, Callable[[int, bytes], int]], ...] = (
    (os.O_WRONLY, at_once),
    (os.O_WRONLY | os.O_TRUNC, at_once),
    (os.O_WRONLY | os.O_APPEND, at_once),
    (os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_SYNC, at_once),
    (os.O_WRONLY | os.O_DIRECT, at_once),
    (os.O_WRONLY, at_a_large_offset),
    (os.O_WRONLY, in_pieces),
    (os.O_WRONLY, spliced),
)

REFUSALS = (errno.EPERM, errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.EINVAL,
            errno.ENOENT, errno.ENOTSUP, errno.ENAMETOOLONG, errno.EBUSY)  # fmt: skip
"""The errors of unsupported calls on control files: EIO must not occur."""

NAMES = ("pool_limit", "page_cache", "drop", "backend")


class ControlMachine(RuleBasedStateMachine):
    """Checks that a wrong write is refused, and that a right one has exactly its effect."""

    def __init__(self, fs: MountedFs) -> None:
        """Use a mount with 4096 byte pages. The machine leaves it with a backend."""
        super().__init__()
        self.fs = fs
        self.fds: list[tuple[str, int]] = []

    @initialize()
    def start(self) -> None:
        """Set a known state."""
        if self.fs.control("backend").read_text() == "none\n":
            self.fs.control("backend").write_text("zcache")
        self.fs.control("pool_limit").write_text("64M")
        self.fs.control("page_cache").write_text("1M")
        self.backend, self.pool_limit, self.page_cache = "zcache", 64 << 20, 1 << 20

    def teardown(self) -> None:
        """Close all files."""
        for _, fd in self.fds:
            os.close(fd)

    def expected(self, name: str, data: bytes) -> int:
        """Return the errno that a write must raise, or 0, and apply the write to the model."""
        if not data:
            return 0
        try:
            text = data.strip().decode()
        except UnicodeDecodeError:
            return errno.EINVAL
        if len(data) > MAX_COMMAND:
            return errno.EINVAL
        if name == "drop":
            return 0 if text in ("1", "2", "3") else errno.EINVAL
        if name == "backend":
            if text == "zcache" == self.backend:
                return errno.EBUSY
            if text not in ("zcache", "none"):
                return errno.EINVAL
            self.backend = text
            return 0
        try:
            size = parse_size(text)
        except ValueError:
            return errno.EINVAL
        if name == "pool_limit":
            if size < LEAST_POOL:
                return errno.EINVAL
            self.pool_limit = size
        else:
            if 0 < size < LEAST_PAGE_CACHE:
                return errno.EINVAL
            self.page_cache = size
        return 0

    @rule(name=st.sampled_from(NAMES), data=COMMANDS, way=st.sampled_from(WAYS))
    def write(self, name: str, data: bytes, way: tuple[int, Callable[[int, bytes], int]]) -> None:
        """Write one command."""
        flags, call = way
        if call is spliced:
            data = data[:4096]  # a pipe takes this much in one piece
        fd = os.open(self.fs.control(name), flags)
        try:
            self.run(name, data, lambda: call(fd, data))
        finally:
            os.close(fd)
        if name == "drop" and data.strip() in (b"1", b"3") and len(data) <= MAX_COMMAND:
            assert self.fs.stats()["pagecache_resident"] == 0

    def run(self, name: str, data: bytes, write: Callable[[], int]) -> None:
        """Make a write and compare its error with the model's."""
        raised = 0
        try:
            assert write() == len(data)
        except OSError as exc:
            raised = exc.errno or -1
        assert raised == self.expected(name, data), (name, data[:100])

    @precondition(lambda self: len(self.fds) < 3)
    @rule(name=st.sampled_from(NAMES))
    def open_one(self, name: str) -> None:
        """Open a control file and keep it open."""
        self.fds.append((name, os.open(self.fs.control(name), os.O_WRONLY)))

    @precondition(lambda self: self.fds)
    @rule(data=COMMANDS)
    def write_to_open(self, data: bytes) -> None:
        """Write to the oldest open file. Each write is one command at any file offset."""
        name, fd = self.fds[0]
        self.run(name, data, lambda: os.write(fd, data))

    @precondition(lambda self: self.fds)
    @rule()
    def close_one(self) -> None:
        """Close the oldest open file."""
        os.close(self.fds.pop(0)[1])

    @rule(
        name=st.sampled_from(("pool_limit", "page_cache", "backend")),
        offset=st.sampled_from((0, 1, 3, 7, 100, 1 << 40)),
        size=st.sampled_from((0, 1, 5, 4096, 1 << 20)),
        flags=st.sampled_from(
            (os.O_RDONLY, os.O_RDWR, os.O_RDONLY | os.O_DIRECT, os.O_RDONLY | os.O_NONBLOCK)
        ),
    )
    def read_anywhere(self, name: str, offset: int, size: int, flags: int) -> None:
        """Read a part of a file. It must match the whole content, even if it is read first."""
        fd = os.open(self.fs.control(name), flags)
        try:
            piece = os.pread(fd, size, offset)
        finally:
            os.close(fd)
        assert piece == self.fs.control(name).read_bytes()[offset : offset + size]

    @rule(name=st.sampled_from((*NAMES, "puts", "stats", "zcache", "")), call=st.sampled_from((
        lambda path: os.truncate(path, 5),
        lambda path: os.truncate(path, 1 << 62),
        lambda path: os.chmod(path, 0o777),
        lambda path: os.chown(path, 1, 1),
        os.utime,
        os.unlink,
        os.rmdir,
        lambda path: os.rename(path, f"{path}.x"),
        lambda path: os.link(path, f"{path}.x"),
        os.mkdir,
        lambda path: os.mkfifo(f"{path}.x"),
        lambda path: os.setxattr(path, "user.x", b"x"),
        os.listxattr,
        lambda path: os.open(f"{path}/x", os.O_CREAT | os.O_WRONLY),
        lambda path: os.open(path, os.O_TMPFILE | os.O_RDWR),
        os.readlink,
        lambda path: os.stat(f"{path}/{'x' * 300}"),
    )))  # fmt: skip
    def misuse(self, name: str, call: Callable[[str], Any]) -> None:
        """Make an unsupported call. It does nothing or is refused."""
        try:
            call(str(self.fs.control(name)))
        except OSError as exc:
            assert exc.errno in REFUSALS, errno.errorcode[exc.errno or 0]  # noqa: PT017  # the call may also succeed

    @invariant()
    def the_files_agree_with_the_model(self) -> None:
        """Compare files and statistics with the model. The log has no traceback."""
        stats = self.fs.stats()
        read = {
            name: self.fs.control(name).read_text() for name in ("pool_limit", "page_cache", "backend")
        }
        assert read == {
            "pool_limit": f"{self.pool_limit}\n",
            "page_cache": f"{self.page_cache}\n",
            "backend": f"{self.backend}\n",
        }
        assert (stats["backend"], stats["pagecache_limit"]) == (self.backend, self.page_cache)
        assert (stats["pool_id"] >= 0) == (self.backend == "zcache")
        assert stats["backend_counters"].get("pool_limit", self.pool_limit) == self.pool_limit
        assert not re.search("Traceback|ERROR", self.fs.log.read_text())

    @rule()
    def read_a_file(self) -> None:
        """Read a file: with any limits, it has the content of the source."""
        self.fs.drop_kernel()
        assert (self.fs.path / "f").read_bytes() == (self.fs.source / "f").read_bytes()
