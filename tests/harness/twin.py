"""Compare a mounted tree with a plain twin directory under random operations.

``TwinMachine`` does the same random operations in a directory below a mount and in a twin beside it.
The twin is the model: the results of the kernel's own file system are right, values and errnos alike.
Changes behind the mount's back are made in the source and in the twin.

The module is long because hypothesis collects the rules of a machine from one class.

The differences allowed for a while are those that cleanfs documents:

* A file changed in place in the source is *suspect*: its open handles may read old bytes until the
  next open through the mount, which is exact at once.
* Names and attributes changed in the source are visible after the attribute timeout. The machine waits
  for that before it compares (``_settle``).

The twin's inode numbers identify files.
"""

import errno
import mmap
import os
import random
import shutil
import stat as stat_module
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from cleanfs.cache.resident import PythonResident
from cleanfs.linux import syscalls
from tests.harness.mounting import MountedFs

CLOCK_MONOTONIC_COARSE = 6


def coarse_clock() -> float:
    """Return the clock of the kernel's attribute timeout, in seconds. It advances in ticks."""
    return time.clock_gettime(CLOCK_MONOTONIC_COARSE)


PAGE = 4096
MAX_SIZE = 40 * PAGE
MAX_HANDLES = 5
MAX_MAPPINGS = 3
LONG_AGO_NS = 1_000_000_000 * 10**9
"""Stamps before this (2001) were set by the machine; all others come from the clock."""

AT_FDCWD = -100

NAMES = (b"a", b"b", b"c\xff", b"d", b"e", b"d/a", b"d/b", b"d/e", b"e/a", b"d/e/a")
"""Names that every rule draws from, so that each is a file, a directory or nothing in turn."""

Target = bytes | int

XATTRS = (b"user.one", b"user.two")

names = st.sampled_from(NAMES)
indexes = st.integers(0, 7)
targets = st.one_of(indexes, indexes, names)
"""Mostly one of the existing files, by number; otherwise any name."""

in_source = st.sampled_from((False, False, False, True))
positions = st.builds(
    lambda page, delta: max(0, page * PAGE + delta),
    st.integers(0, 39),
    st.sampled_from((0, 0, -1, 1, 17, 2048)),
)
lengths = st.sampled_from((0, 1, 2, 100, 4095, 4096, 4097, 8192, 12293, 16384, 40000, 140000))
sizes = st.one_of(positions, st.sampled_from((0, 1, PAGE, MAX_SIZE)))
kinds = st.sampled_from(("text", "random", "same", "zero"))
open_flags = st.builds(
    lambda access, *more: access | sum(more),
    st.sampled_from((os.O_RDONLY, os.O_RDWR, os.O_RDWR, os.O_WRONLY)),
    st.sampled_from((0, os.O_CREAT, os.O_CREAT | os.O_EXCL)),
    st.sampled_from((0, 0, 0, os.O_TRUNC)),
    st.sampled_from((0, 0, os.O_APPEND)),
    st.sampled_from((0, 0, 0, os.O_DSYNC)),
    st.sampled_from((0, 0, 0, 0, os.O_NOFOLLOW)),
)
stamps = st.one_of(st.none(), st.integers(1, LONG_AGO_NS - 1))


@dataclass(frozen=True)
class Error:
    """Represents the error of a failed call."""

    number: int | None

    def __repr__(self) -> str:
        return errno.errorcode.get(self.number or 0, str(self.number))


def cache_size(pages: int, page_size: int) -> int:
    """Return a limit of the page cache for this many pages."""
    return pages * (page_size + PythonResident.overhead)


def least_pool(page_size: int) -> int:
    """Return the smallest pool limit."""
    return max(1 << 20, 4 * page_size)


def outcome(call: Callable[[], Any]) -> Any:  # noqa: ANN401  # the result of any call
    """Return the value of a call, or its error."""
    try:
        return call()
    except OSError as exc:
        return Error(exc.errno)


@dataclass(frozen=True)
class Site:
    """Holds a mount and the directory for the twins, on the source's file system."""

    fs: MountedFs
    twins: Path
    attr_timeout: float
    page_size: int = PAGE
    """The page size of the mount, in which the cache limits are counted."""
    noise: bool = False
    """Whether machines may run a thread that reads the mount meanwhile."""
    changes_source: bool = True
    """Whether machines change the source behind the mount's back."""
    writeback: bool = False
    """Whether the mount may have data not yet in the source, and its own ctimes."""


@dataclass
class Handle:
    """Holds a file opened in the same way on both sides."""

    mount: int
    twin: int
    flags: int
    ino: int

    @property
    def reads(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_WRONLY

    def may_refuse_to_map(self, exc: OSError) -> bool:
        """Return whether a mapping may fail with ENODEV, so that its writes are not appended."""
        appends = self.flags & (os.O_ACCMODE | os.O_APPEND) == os.O_RDWR | os.O_APPEND
        return appends and exc.errno == errno.ENODEV


@dataclass
class Mapping:
    """Holds a file mapped in the same way on both sides."""

    mount: mmap.mmap
    twin: mmap.mmap
    twin_fd: int
    ino: int


class TwinMachine(RuleBasedStateMachine):
    """Runs the comparison that the module describes. A subclass sets ``site``."""

    site: ClassVar[Site]
    _numbers = count()

    def __init__(self) -> None:
        """Make new directories; ``start`` fills them."""
        super().__init__()
        self.name = f"example{next(self._numbers)}"
        self.mount = os.fsencode(self.site.fs.path / self.name)
        self.source = os.fsencode(self.site.fs.source / self.name)
        self.twin = os.fsencode(self.site.twins / self.name)
        self.handles: list[Handle] = []
        self.directories: list[tuple[int, int]] = []
        self.mappings: list[Mapping] = []
        self.suspects: set[int] = set()
        self.salt = 0
        self.check_level = 0
        self.names_settle = self.attributes_settle = 0.0
        self.noise: threading.Thread | None = None
        self.quiet = threading.Event()
        os.mkdir(self.source, 0o755)
        os.mkdir(self.twin, 0o755)

    # -- start and end ------------------------------------------------------------------------

    @initialize(check_level=st.sampled_from((0, 0, 1, 2, 3)), noise=st.booleans(), size=sizes)
    def start(self, check_level: int, noise: bool, size: int) -> None:
        """Make some files. ``check_level``: how closely to compare after each step."""
        self.check_level = check_level
        self._both(False, lambda root: os.mkdir(root + b"/d"))
        for name in (b"a", b"d/a"):
            data = self._data("text", size)
            for root in (self.mount, self.twin):
                Path(os.fsdecode(root + b"/" + name)).write_bytes(data)
        if noise and self.site.noise:
            self.noise = threading.Thread(target=self._make_noise, daemon=True)
            self.noise.start()

    def teardown(self) -> None:
        """Compare everything once more, and remove all files."""
        try:
            if os.path.isdir(self.twin):
                self._compare(3)
        finally:
            self.quiet.set()
            if self.noise is not None:
                self.noise.join(20)
            for handle in self.handles:
                os.close(handle.mount)
                os.close(handle.twin)
            for mapping in self.mappings:
                self._unmap(mapping)
            for fds in self.directories:
                for fd in fds:
                    os.close(fd)
            for root in (self.source, self.twin):
                shutil.rmtree(root, ignore_errors=True)

    # -- files --------------------------------------------------------------------------------

    @rule(
        name=targets,
        flags=open_flags,
        direct=st.booleans(),
        mode=st.sampled_from((0o644, 0o600, 0o4755)),
    )
    def open(self, name: Target, flags: int, direct: bool, mode: int) -> None:
        """Open with any flags; O_DIRECT (only on the mount) makes each call reach the daemon."""
        name = self._name(name)
        if self._is_special(name):
            return
        self._settle(names=True)
        # No local file system supports O_DIRECT for a directory.
        extra = os.O_DIRECT if direct and not os.path.isdir(self.twin + b"/" + name) else 0
        mount = outcome(lambda: os.open(self.mount + b"/" + name, flags | extra, mode))
        twin = outcome(lambda: os.open(self.twin + b"/" + name, flags, mode))
        if isinstance(mount, Error) or isinstance(twin, Error):
            for fd in (mount, twin):
                if not isinstance(fd, Error):
                    os.close(fd)
            assert mount == twin, f"open returned {mount}, not {twin}"
            return
        opened = os.fstat(twin)
        if stat_module.S_ISDIR(opened.st_mode) or len(self.handles) == MAX_HANDLES:
            os.close(mount)
            os.close(twin)
            self.suspects.discard(opened.st_ino)
            return
        self.handles.append(Handle(mount, twin, flags, opened.st_ino))
        self.suspects.discard(opened.st_ino)

    @precondition(lambda self: self.handles)
    @rule(index=indexes)
    def open_again(self, index: int) -> None:
        """Open the file of a handle again, though its name may have been removed."""
        handle = self._handle(index)
        if len(self.handles) == MAX_HANDLES:
            return
        flags = handle.flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOFOLLOW)
        mount = os.open(f"/proc/self/fd/{handle.mount}", flags)
        self.handles.append(
            Handle(mount, os.open(f"/proc/self/fd/{handle.twin}", flags), flags, handle.ino)
        )
        self.suspects.discard(handle.ino)

    @precondition(lambda self: self.handles)
    @rule(index=indexes)
    def close(self, index: int) -> None:
        """Close one handle; this may delete its file."""
        handle = self.handles.pop(index % len(self.handles))
        os.close(handle.mount)
        os.close(handle.twin)

    @precondition(lambda self: self.handles)
    @rule(index=indexes, position=positions, length=lengths)
    def pread(self, index: int, position: int, length: int) -> None:
        """Read at any position."""
        handle = self._handle(index)
        mount = outcome(lambda: os.pread(handle.mount, length, position))
        if handle.ino not in self.suspects:
            _same(mount, outcome(lambda: os.pread(handle.twin, length, position)), position)

    @precondition(lambda self: self.handles)
    @rule(index=indexes, position=positions, length=lengths, kind=kinds)
    def pwrite(self, index: int, position: int, length: int, kind: str) -> None:
        """Write at any position, or at the end if the handle appends. This may leave holes."""
        handle = self._handle(index)
        if handle.flags & os.O_APPEND and os.fstat(handle.twin).st_size + length > 2 * MAX_SIZE:
            return
        data = self._data(kind, length)
        mount = outcome(lambda: os.pwrite(handle.mount, data, position))
        assert mount == outcome(lambda: os.pwrite(handle.twin, data, position))

    @precondition(lambda self: self.handles)
    @rule(index=indexes, position=positions, length=lengths, cut=st.booleans(), evict=st.booleans())
    def change_cached_pages(
        self, index: int, position: int, length: int, cut: bool, evict: bool
    ) -> None:
        """Write or truncate where cleanfs has cached pages, and read without the kernel's pages."""
        handle = self._handle(index)
        os.posix_fadvise(handle.mount, 0, 0, os.POSIX_FADV_DONTNEED)
        self.pread(index, max(0, position - PAGE), 3 * PAGE)
        if evict:
            self.drop("1")
        if cut:
            self.ftruncate(index, position)
            self.ftruncate(index, position + length)
        else:
            self.pwrite(index, position, length, "random")
        os.posix_fadvise(handle.mount, 0, 0, os.POSIX_FADV_DONTNEED)
        self.pread(index, max(0, position - PAGE), length + 3 * PAGE)

    @precondition(lambda self: self.handles)
    @rule(index=indexes, size=sizes)
    def ftruncate(self, index: int, size: int) -> None:
        """Truncate or extend by handle."""
        self._by_handle(index, lambda fd: os.ftruncate(fd, size))

    @precondition(lambda self: self.handles)
    @rule(index=indexes, data_only=st.booleans())
    def fsync(self, index: int, data_only: bool) -> None:
        """Make data durable."""
        self._by_handle(index, os.fdatasync if data_only else os.fsync)

    @precondition(lambda self: self.handles)
    @rule(index=indexes, mode=st.integers(0, 0o7777))
    def fchmod(self, index: int, mode: int) -> None:
        """Change the mode by handle. Open handles keep their access."""
        self._by_handle(index, lambda fd: os.fchmod(fd, mode))

    @precondition(lambda self: self.handles)
    @rule(index=indexes, mtime=stamps)
    def futimens(self, index: int, mtime: int | None) -> None:
        """Set times by handle, to now or to a time long ago."""
        self._by_handle(index, lambda fd: _set_times(fd, mtime))

    @precondition(lambda self: self.handles)
    @rule(index=indexes, name=st.sampled_from(XATTRS), length=st.sampled_from((0, 5, 300)))
    def fsetxattr(self, index: int, name: bytes, length: int) -> None:
        """Set an extended attribute by handle."""
        value = self._data("text", length)
        self._by_handle(index, lambda fd: os.setxattr(fd, name, value))

    @precondition(lambda self: self.handles)
    @rule(index=indexes, to=indexes, start=positions, position=positions, length=lengths)
    def copy_range(self, index: int, to: int, start: int, position: int, length: int) -> None:
        """Copy from one handle to another within the kernel."""
        source, target = self._handle(index), self._handle(to)
        if source.ino == target.ino or {source.ino, target.ino} & self.suspects:
            return
        if position + length > MAX_SIZE:
            return
        mount = outcome(lambda: _copy_range(source.mount, target.mount, length, start, position))
        twin = outcome(lambda: _copy_range(source.twin, target.twin, length, start, position))
        assert mount == twin, f"copy_file_range returned {mount}, not {twin}"

    # -- mappings -------------------------------------------------------------------------------

    @precondition(lambda self: self.handles and len(self.mappings) < MAX_MAPPINGS)
    @rule(index=indexes, shared=st.booleans())
    def map_to_read(self, index: int, shared: bool) -> None:
        """Map a file and keep the mapping, even after the handle is closed and the name removed."""
        handle = self._handle(index)
        size = os.fstat(handle.twin).st_size
        if not handle.reads or not size or handle.ino in self.suspects:
            return
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        try:
            mount = mmap.mmap(handle.mount, size, flags, mmap.PROT_READ)
        except OSError as exc:
            if not handle.may_refuse_to_map(exc):
                raise
            return
        twin = mmap.mmap(handle.twin, size, flags, mmap.PROT_READ)
        self.mappings.append(Mapping(mount, twin, os.dup(handle.twin), handle.ino))

    @precondition(lambda self: self.mappings)
    @rule(index=indexes)
    def read_mapping(self, index: int) -> None:
        """Compare a mapping with the present content of the file."""
        self._compare_mapping(self.mappings[index % len(self.mappings)])

    @precondition(lambda self: self.mappings)
    @rule(index=indexes)
    def unmap(self, index: int) -> None:
        """Unmap a mapping."""
        self._unmap(self.mappings.pop(index % len(self.mappings)))

    @precondition(lambda self: self.handles)
    @rule(index=indexes, position=positions, length=lengths, kind=kinds)
    def write_mapped(self, index: int, position: int, length: int, kind: str) -> None:
        """Write through a shared mapping and sync it."""
        handle = self._handle(index)
        size = os.fstat(handle.twin).st_size
        if handle.flags & os.O_ACCMODE != os.O_RDWR or handle.ino in self.suspects:
            return
        if position >= size:
            return
        data = self._data(kind, min(length, size - position))
        for fd in (handle.mount, handle.twin):
            try:
                mapping = mmap.mmap(fd, size, mmap.MAP_SHARED)
            except OSError as exc:
                if fd != handle.mount or not handle.may_refuse_to_map(exc):
                    raise
                return
            with mapping:
                mapping[position : position + len(data)] = data
                mapping.flush()

    # -- names, through the mount or in the source ------------------------------------------------

    @rule(name=targets, direct=in_source)
    def unlink(self, name: Target, direct: bool) -> None:
        """Remove a name, also of an open file."""
        name = self._name(name)
        self._both(direct, lambda root: os.unlink(root + b"/" + name))

    @rule(old=targets, new=targets, flags=st.sampled_from((0, 0, 1, 2)), direct=in_source)
    def rename(self, old: Target, new: Target, flags: int, direct: bool) -> None:
        """Rename, with replacement, without it, or in exchange."""
        new = self._name(new)
        old = self._name(old)
        self._both(
            direct,
            lambda root: syscalls.renameat2(
                AT_FDCWD, root + b"/" + old, AT_FDCWD, root + b"/" + new, flags
            ),
        )

    @rule(old=targets, new=names, direct=in_source)
    def link(self, old: Target, new: bytes, direct: bool) -> None:
        """Add a hard link."""
        old = self._name(old)
        self._both(
            direct,
            lambda root: os.link(root + b"/" + old, root + b"/" + new, follow_symlinks=False),
        )

    @rule(to=names, name=names, direct=in_source)
    def symlink(self, to: bytes, name: bytes, direct: bool) -> None:
        """Make a symbolic link, perhaps a dangling one."""
        self._both(direct, lambda root: os.symlink(to, root + b"/" + name))

    @rule(name=names, mode=st.sampled_from((0o755, 0o700, 0o2775, 0o1777)), direct=in_source)
    def mkdir(self, name: bytes, mode: int, direct: bool) -> None:
        """Make a directory."""
        self._both(direct, lambda root: os.mkdir(root + b"/" + name, mode))

    @rule(name=names, direct=in_source)
    def rmdir(self, name: bytes, direct: bool) -> None:
        """Remove a directory."""
        self._both(direct, lambda root: os.rmdir(root + b"/" + name))

    @rule(name=names, direct=in_source)
    def mkfifo(self, name: bytes, direct: bool) -> None:
        """Make a fifo."""
        self._both(direct, lambda root: os.mkfifo(root + b"/" + name))

    @rule(name=targets, size=sizes, kind=kinds, direct=in_source)
    def replace(self, name: Target, size: int, kind: str, direct: bool) -> None:
        """Replace a file as editors do: write a new one and rename it over the old one."""
        name = self._name(name)
        data = self._data(kind, size)

        def run(root: bytes) -> None:
            new = root + b"/new"
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                os.write(fd, data)
            finally:
                os.close(fd)
            try:
                os.rename(new, root + b"/" + name)
            except OSError:
                os.unlink(new)
                raise

        self._both(direct, run)

    @rule(name=names)
    def open_directory(self, name: bytes) -> None:
        """Open a directory and keep it open."""
        if len(self.directories) == 2:
            for fd in self.directories.pop(0):
                os.close(fd)
        self._settle(names=True)
        flags = os.O_RDONLY | os.O_DIRECTORY
        mount = outcome(lambda: os.open(self.mount + b"/" + name, flags))
        twin = outcome(lambda: os.open(self.twin + b"/" + name, flags))
        if isinstance(mount, Error) or isinstance(twin, Error):
            assert mount == twin
        else:
            self.directories.append((mount, twin))

    @precondition(lambda self: self.directories)
    @rule(
        index=indexes,
        name=st.sampled_from((b"a", b"b")),
        action=st.sampled_from(("list", "create", "mkdir", "unlink")),
    )
    def in_directory(self, index: int, name: bytes, action: str) -> None:
        """Work in an open directory, even if it was moved or removed."""
        fds = self.directories[index % len(self.directories)]
        self._settle(names=True)

        def run(fd: int) -> object:
            if action == "list":
                return sorted(os.listdir(fd))
            if action == "create":
                os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, dir_fd=fd))
            elif action == "mkdir":
                os.mkdir(name, dir_fd=fd)
            else:
                os.unlink(name, dir_fd=fd)
            return None

        mount, twin = outcome(lambda: run(fds[0])), outcome(lambda: run(fds[1]))
        assert mount == twin, f"{action} returned {mount}, not {twin}"

    # -- attributes, through the mount or in the source -------------------------------------------

    @rule(name=targets, mode=st.integers(0, 0o7777), direct=in_source)
    def chmod(self, name: Target, mode: int, direct: bool) -> None:
        """Change the mode by name."""
        name = self._name(name)
        self._both(direct, lambda root: os.chmod(root + b"/" + name, mode))

    @rule(
        name=targets,
        uid=st.sampled_from((-1, 0, 1234)),
        gid=st.sampled_from((-1, 0, 77)),
        direct=in_source,
    )
    def chown(self, name: Target, uid: int, gid: int, direct: bool) -> None:
        """Change the owner by name, also of a symbolic link."""
        name = self._name(name)
        self._both(direct, lambda root: os.chown(root + b"/" + name, uid, gid, follow_symlinks=False))

    @rule(name=targets, mtime=stamps, follow=st.booleans(), direct=in_source)
    def utimes(self, name: Target, mtime: int | None, follow: bool, direct: bool) -> None:
        """Set times by name, to now or to a time long ago."""
        name = self._name(name)
        self._both(direct, lambda root: _set_times(root + b"/" + name, mtime, follow))

    @rule(
        name=targets,
        xattr=st.sampled_from(XATTRS),
        flags=st.sampled_from((0, os.XATTR_CREATE, os.XATTR_REPLACE)),
        length=st.sampled_from((None, 0, 5, 300)),
        direct=in_source,
    )
    def xattr(self, name: Target, xattr: bytes, flags: int, length: int | None, direct: bool) -> None:
        """Set or remove an extended attribute by name."""
        name = self._name(name)
        if length is None:
            self._both(direct, lambda root: os.removexattr(root + b"/" + name, xattr))
        else:
            value = self._data("text", length)
            self._both(direct, lambda root: os.setxattr(root + b"/" + name, xattr, value, flags))

    @rule(name=targets, size=sizes, direct=in_source)
    def truncate(self, name: Target, size: int, direct: bool) -> None:
        """Truncate or extend by name."""
        name = self._name(name)
        if not self._is_special(name):
            self._both(direct, lambda root: os.truncate(root + b"/" + name, size), in_place=name)

    # -- contents, in the source --------------------------------------------------------------

    @precondition(lambda self: self.site.changes_source)
    @rule(name=targets, position=positions, length=lengths, kind=kinds, keep_mtime=st.booleans())
    def write_in_source(
        self, name: Target, position: int, length: int, kind: str, keep_mtime: bool
    ) -> None:
        """Write in place behind the mount's back, and perhaps restore the mtime, as rsync does."""
        name = self._name(name)
        if self._is_special(name):
            return
        data = self._data(kind, length)

        def run(root: bytes) -> None:
            fd = os.open(root + b"/" + name, os.O_WRONLY)
            try:
                before = os.fstat(fd)
                os.pwrite(fd, data, position)
                if keep_mtime:
                    os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))
            finally:
                os.close(fd)

        self._both(True, run, in_place=name)

    @precondition(lambda self: self.site.changes_source)
    @rule(name=targets, length=lengths, kind=kinds, reset=st.booleans())
    def append_in_source(self, name: Target, length: int, kind: str, reset: bool) -> None:
        """Append to a file, or write it anew, behind the mount's back."""
        name = self._name(name)
        if self._is_special(name) or self._twin_size(name) + length > 2 * MAX_SIZE:
            return
        data = self._data(kind, length)

        def run(root: bytes) -> None:
            flags = os.O_TRUNC if reset else os.O_APPEND
            fd = os.open(root + b"/" + name, os.O_WRONLY | flags)
            try:
                os.write(fd, data)
            finally:
                os.close(fd)

        self._both(True, run, in_place=name)

    @precondition(lambda self: self.site.changes_source)
    @rule(name=targets, position=positions, length=lengths)
    def write_in_source_twice(self, name: Target, position: int, length: int) -> None:
        """Write twice. The mount sees the first write, and both may have the same stamps."""
        name = self._name(name)
        self._settle(names=True)
        for kind in ("text", "random"):
            self.write_in_source(name, position, length, kind, keep_mtime=False)
            self._compare_by_open(name)

    # -- caches -------------------------------------------------------------------------------

    @rule(caches=st.sampled_from("123"))
    def drop(self, caches: str) -> None:
        """Drop the caches of cleanfs."""
        self._control("drop", caches)

    @precondition(lambda self: self.handles)
    @rule(index=indexes)
    def drop_kernel(self, index: int) -> None:
        """Drop the kernel's pages of a file."""
        handle = self._handle(index)
        os.posix_fadvise(handle.mount, 0, 0, os.POSIX_FADV_DONTNEED)

    @rule(pages=st.sampled_from((0, 1, 2, 3, 5, 50)))
    def resize_page_cache(self, pages: int) -> None:
        """Change the limit of the page cache."""
        self._control("page_cache", f"{cache_size(pages, self.site.page_size)}")

    @rule(times=st.sampled_from((1, 2)))
    def resize_pool(self, times: int) -> None:
        """Change the pool limit."""
        self._control("pool_limit", f"{least_pool(self.site.page_size) * times}")

    @rule()
    def replace_backend(self) -> None:
        """Unregister the backend and register a new one."""
        self._control("backend", "none")
        self._control("backend", "zcache")

    @rule()
    def let_time_pass(self) -> None:
        """Wait until a fingerprint is no longer racy."""
        time.sleep(0.11)

    # -- comparing ----------------------------------------------------------------------------

    @rule(name=targets)
    def read_whole(self, name: Target) -> None:
        """Open, read to the end and close. The data is exact at once after any change in the source."""
        name = self._name(name)
        self._compare_by_open(name)

    @rule()
    def compare_all(self) -> None:
        """Compare everything now."""
        self._compare(3)

    @invariant()
    def nothing_differs(self) -> None:
        """Compare source, twin and mount as closely as the check level asks."""
        self._compare(self.check_level)

    def _compare(self, level: int) -> None:
        listing = _listing(self.twin)
        assert _listing(self.source) == listing
        if self.site.writeback:
            if level < 3:
                self._compare_without_writing_back(listing, level)
                return
            self._write_back(listing)
        for name in listing:
            source, twin = self._attributes(self.source, name), self._attributes(self.twin, name)
            assert _logical(source) == _logical(twin), name
            _same_mtime(source["mtime"], twin["mtime"])
            if stat_module.S_ISREG(twin["mode"]):
                _same(_contents(self.source, name), _contents(self.twin, name), 0)
        if level > 1:
            for handle in self.handles:
                self._compare_handle(handle)
            for mapping in self.mappings:
                self._compare_mapping(mapping)
        if level > 0:
            self._settle(names=True, attributes=True)
            assert _listing(self.mount) == listing
            for name in listing:
                mount, source = self._attributes(self.mount, name), self._attributes(self.source, name)
                if (
                    self.site.writeback
                ):  # the kernel uses its own clock, and its own rules for refreshes
                    del mount["ctime"], source["ctime"]
                    _same_mtime(mount.pop("mtime"), source.pop("mtime"))
                assert mount == source, name
        if level > 2:
            for name in listing:
                self._compare_by_open(name)

    def _compare_without_writing_back(self, listing: list[bytes], level: int) -> None:
        """Compare without an open and close, which would write the file back."""
        assert _listing(self.mount) == listing
        for name in listing:
            mount, twin = self._attributes(self.mount, name), self._attributes(self.twin, name)
            assert _logical(mount) == _logical(twin), name
        if level > 1:
            for handle in self.handles:
                self._compare_handle(handle)

    def _write_back(self, listing: list[bytes]) -> None:
        for handle in self.handles:
            os.fsync(handle.mount)
        for name in listing:
            if stat_module.S_ISREG(os.lstat(self.mount + b"/" + name).st_mode):
                fd = os.open(self.mount + b"/" + name, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)

    def _compare_by_open(self, name: bytes) -> None:
        if self._is_special(name):
            return
        self._settle(names=True)
        mount = outcome(lambda: _contents(self.mount, name))
        twin = outcome(lambda: _contents(self.twin, name))
        if not isinstance(twin, Error):
            self.suspects.discard(os.stat(self.twin + b"/" + name).st_ino)
        _same(mount, twin, 0)

    def _compare_handle(self, handle: Handle) -> None:
        self._settle(attributes=True)
        mount, twin = os.fstat(handle.mount), os.fstat(handle.twin)
        for field in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size"):
            assert getattr(mount, field) == getattr(twin, field), field
        _same_mtime(mount.st_mtime_ns, twin.st_mtime_ns)
        if handle.reads and handle.ino not in self.suspects:
            size = twin.st_size + 1
            _same(os.pread(handle.mount, size, 0), os.pread(handle.twin, size, 0), 0)

    def _compare_mapping(self, mapping: Mapping) -> None:
        if mapping.ino in self.suspects:
            return
        size = min(os.fstat(mapping.twin_fd).st_size, len(mapping.twin))  # access beyond raises SIGBUS
        _same(mapping.mount[:size], mapping.twin[:size], 0)

    def _attributes(self, root: bytes, name: bytes) -> dict[str, Any]:
        path = root + b"/" + name
        status = os.lstat(path)
        is_dir = stat_module.S_ISDIR(status.st_mode)
        xattrs = outcome(lambda: sorted(os.listxattr(path, follow_symlinks=False)))
        return {
            "mode": status.st_mode,
            "nlink": status.st_nlink,
            "uid": status.st_uid,
            "gid": status.st_gid,
            "size": None
            if is_dir
            else status.st_size,  # the size of a directory depends on its history
            "mtime": status.st_mtime_ns,
            "ctime": status.st_ctime_ns,
            "target": os.readlink(path) if stat_module.S_ISLNK(status.st_mode) else None,
            "xattrs": xattrs
            if isinstance(xattrs, Error)
            else {xattr: os.getxattr(path, xattr, follow_symlinks=False) for xattr in xattrs},
        }

    # -- the same on both sides ----------------------------------------------------------------

    def _both(
        self, direct: bool, call: Callable[[bytes], object], in_place: bytes | None = None
    ) -> None:
        """Make a call in the twin and below the mount, or in the source if ``direct``, and compare.

        ``in_place`` is the name of a file that the call changes in place.
        """
        direct = direct and self.site.changes_source
        if not direct:
            self._settle(names=True)
        side = self.source if direct else self.mount
        changed = (
            os.stat(self.twin + b"/" + in_place).st_ino
            if in_place and direct and self._twin_has(in_place)
            else None
        )
        mount, twin = outcome(lambda: call(side)), outcome(lambda: call(self.twin))
        if direct:
            if changed is not None:
                self.suspects.add(changed)
                self.attributes_settle = coarse_clock() + self.site.attr_timeout
            else:
                self._source_names_changed()
        assert mount == twin, f"the mount returned {mount}, not {twin}"

    def _by_handle(self, index: int, call: Callable[[int], object]) -> None:
        handle = self._handle(index)
        mount, twin = outcome(lambda: call(handle.mount)), outcome(lambda: call(handle.twin))
        assert mount == twin, f"the mount returned {mount}, not {twin}"

    def _source_names_changed(self) -> None:
        self.names_settle = self.attributes_settle = coarse_clock() + self.site.attr_timeout

    def _settle(self, *, names: bool = False, attributes: bool = False) -> None:
        """Wait until the mount must show the changes in the source."""
        until = max(self.names_settle if names else 0.0, self.attributes_settle if attributes else 0.0)
        # The kernel counts in ticks of up to 10 ms and rounds up.
        while self.site.attr_timeout and (wait := until + 0.012 - coarse_clock()) > 0:
            time.sleep(wait)

    def _handle(self, index: int) -> Handle:
        return self.handles[index % len(self.handles)]

    def _name(self, target: Target) -> bytes:
        """Return the name of a target."""
        if isinstance(target, bytes):
            return target
        files = [name for name in _listing(self.twin) if os.path.isfile(self.twin + b"/" + name)]
        return files[target % len(files)] if files else NAMES[target]

    def _unmap(self, mapping: Mapping) -> None:
        mapping.mount.close()
        mapping.twin.close()
        os.close(mapping.twin_fd)

    def _control(self, name: str, text: str) -> None:
        self.site.fs.control(name).write_text(text)

    def _twin_has(self, name: bytes) -> bool:
        return os.path.exists(self.twin + b"/" + name)

    def _twin_size(self, name: bytes) -> int:
        return os.stat(self.twin + b"/" + name).st_size if self._twin_has(name) else 0

    def _is_special(self, name: bytes) -> bool:
        """Return whether an open would wait for the other end of a fifo."""
        return self._twin_has(name) and stat_module.S_ISFIFO(os.stat(self.twin + b"/" + name).st_mode)

    def _data(self, kind: str, length: int) -> bytes:
        """Make bytes unlike any before, some with short periods or same-filled pages."""
        self.salt += 1
        if kind == "zero":
            return bytes(length)
        if kind == "same":
            return bytes([self.salt % 255 + 1]) * length
        if kind == "random":
            return random.Random(self.salt).randbytes(length)
        word = b"%d:" % self.salt
        return (word * (length // len(word) + 1))[:length]

    def _make_noise(self) -> None:
        """Read the mount at random, as other processes do. The results are not compared."""
        choose = random.Random(self.name)
        while not self.quiet.is_set():
            path = self.mount + b"/" + choose.choice(NAMES)
            with suppress(OSError):
                if not stat_module.S_ISREG(os.lstat(path).st_mode):
                    os.listdir(path)
                    continue
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | choose.choice((0, os.O_DIRECT))
                fd = os.open(path, flags)
                try:
                    for _ in range(4):
                        os.pread(fd, choose.choice((1, PAGE, 32 * PAGE)), choose.randrange(MAX_SIZE))
                    if choose.random() < 0.3:
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(fd)


def _set_times(file: bytes | int, mtime: int | None, follow: bool = True) -> None:
    if mtime is None:
        os.utime(file, follow_symlinks=follow)
    else:
        os.utime(file, ns=(mtime, mtime), follow_symlinks=follow)


def _copy_range(source: int, target: int, length: int, start: int, position: int) -> int:
    done = 0
    while done < length:
        copied = os.copy_file_range(source, target, length - done, start + done, position + done)
        if not copied:
            break
        done += copied
    return done


def _listing(root: bytes) -> list[bytes]:
    """Return all names below a directory, with ``.``."""
    found = [b"."]
    with os.scandir(root) as entries:
        for entry in entries:
            found.append(entry.name)
            if entry.is_dir(follow_symlinks=False):
                below = _listing(entry.path)
                found += [entry.name + b"/" + name for name in below if name != b"."]
    return sorted(found)


def _contents(root: bytes, name: bytes) -> bytes:
    fd = os.open(root + b"/" + name, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        data = b"".join(iter(lambda: os.read(fd, 64 * PAGE), b""))
        assert os.fstat(fd).st_size == len(data), "the size differs from the bytes read"
        return data
    finally:
        os.close(fd)


def _logical(attributes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if key not in ("mtime", "ctime")}


def _same_mtime(one_ns: int, other_ns: int) -> None:
    """Compare stamps that were set; others come from the clock on either side."""
    if one_ns < LONG_AGO_NS or other_ns < LONG_AGO_NS:
        assert one_ns == other_ns, "mtime"


def _same(mount: object, twin: object, offset: int) -> None:
    """Compare data read from ``offset`` on. The error names the first difference only."""
    if mount == twin:
        return
    assert isinstance(mount, bytes), f"the mount returned {mount!r:.80}, not {twin!r:.80}"
    assert isinstance(twin, bytes), f"the mount returned {mount!r:.80}, not {twin!r:.80}"
    assert len(mount) == len(twin), f"{len(mount)} bytes, not {len(twin)}"
    first = next(i for i, (a, b) in enumerate(zip(mount, twin, strict=True)) if a != b)
    different = sum(a != b for a, b in zip(mount, twin, strict=True))
    raise AssertionError(
        f"{different} bytes differ from {offset + first} on: {mount[first : first + 16]!r}, "
        f"not {twin[first : first + 16]!r}"
    )
