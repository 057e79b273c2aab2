"""Names of the source: look them up, open, create, remove and rename.

Plain functions over descriptors, run in worker threads. They touch no state of ours; what the
caller must know afterwards (attributes before and after, what became of a replaced file) they
return. All raise OSError.
"""

import errno
import os
import stat as stat_module
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Self

from cleanfs.backends.ops import FileKey
from cleanfs.linux import credentials, syscalls
from cleanfs.source import file_handles
from cleanfs.source.attributes import has_default_acl
from cleanfs.source.errors import HalfDoneError, StaleError

PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

SPECIAL_BITS = stat_module.S_ISUID | stat_module.S_ISGID | stat_module.S_ISVTX


@dataclass(frozen=True, slots=True)
class Opened:
    """A new descriptor and what it refers to."""

    fd: int
    stat: os.stat_result


@dataclass(frozen=True, slots=True)
class OpenedFile(Opened):
    """A regular file, opened for I/O, with the key of its cached pages."""

    key: FileKey
    direct: bool = False
    """Whether the kernel must not cache what is written to it (FOPEN_DIRECT_IO)."""


@dataclass(frozen=True, slots=True)
class Changed:
    """A file, or directory, whose attributes an operation changed: right before and right after."""

    key: FileKey
    before: os.stat_result
    after: os.stat_result | None
    """None if the stat after the operation failed; the operation is done nevertheless."""

    @property
    def gone(self) -> bool:
        """Tell whether its last name is gone."""
        return self.after is not None and self.after.st_nlink == 0


def file_key(fd: int, st: os.stat_result) -> FileKey:
    """Make the key of the file that ``fd`` (O_PATH too) refers to."""
    return FileKey(st.st_dev, st.st_ino, file_handles.name_to_handle(fd))


def lookup(parent_fd: int, name: bytes) -> Opened:
    """Open a name O_PATH, not following a symbolic link."""
    fd = os.open(name, PATH_FLAGS, dir_fd=parent_fd)
    try:
        return Opened(fd, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise


def identify(parent_fd: int, name: bytes) -> tuple[int, int]:
    """Return device and inode number of what a name leads to. Raises OSError.

    A file system mounted there gets no request, except for NFS (``d_weak_revalidate`` of Linux).
    """
    return syscalls.known_id_of_name(parent_fd, name)


def lookup_here(parent_fd: int, name: bytes) -> Opened:
    """Do a ``lookup`` that stays on this file system. Raises OSError: EXDEV at a mount point."""
    if not syscalls.can_open_here():
        return lookup(parent_fd, name)
    fd = syscalls.openat_here(parent_fd, name, PATH_FLAGS)
    try:
        return Opened(fd, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise


def lookup_cached(parent_fd: int, name: bytes) -> Opened | None:
    """Do a ``lookup`` without waiting; None if the dentry cache does not have the name.

    Call it only for a directory of a local file system: on others the fstat may wait even if the open
    did not. None is also returned at a mount point, and when descriptors are short.
    """
    try:
        fd = syscalls.openat_cached(parent_fd, name, PATH_FLAGS)
    except OSError as exc:
        if exc.errno in (errno.EAGAIN, errno.EXDEV, errno.EMFILE, errno.ENFILE):
            return None
        raise
    return Opened(fd, os.fstat(fd))


def open_advised(path: str, flags: int) -> int:
    """Open the object of an O_PATH descriptor by its /proc path.

    O_NOATIME is only advice, and only the owner may give it: the program may be that, and the daemon
    not. A file with the append-only attribute can only be opened with O_APPEND.
    """
    try:
        return os.open(path, flags & ~os.O_APPEND | os.O_CLOEXEC)
    except PermissionError:
        if not flags & (os.O_NOATIME | os.O_APPEND):
            raise
        return os.open(path, flags & ~os.O_NOATIME | os.O_CLOEXEC)


def open_file(path: str, flags: int, key: FileKey | None = None) -> OpenedFile:
    """Open a file for I/O (``open_advised``); ``key`` is its own, if known."""
    fd = open_advised(path, flags)
    try:
        st = os.fstat(fd)
        return OpenedFile(fd, st, file_key(fd, st) if key is None else key)
    except BaseException:
        os.close(fd)
        raise


def open_for_writeback(path: str, flags: int, key: FileKey | None = None) -> OpenedFile:
    """Do an ``open_file`` for a kernel with write-back: it writes whole pages, and reads partial ones.

    So what a program opens for writing alone is opened for reading, too. A file that may not be read,
    or only be appended to, is marked ``direct``: its pages can neither be completed nor written back.
    """
    writes = flags & os.O_ACCMODE != os.O_RDONLY
    both = flags & ~os.O_ACCMODE | os.O_RDWR if writes else flags
    try:
        return open_file(path, both & ~os.O_APPEND, key)
    except PermissionError:
        if not writes:
            raise
    return replace(open_file(path, flags, key), direct=True)


@dataclass(frozen=True, slots=True)
class Actor:
    """The requester of a change of names: what is made becomes its own, not the daemon's."""

    uid: int
    gid: int
    umask: int = 0
    local: bool = False
    """The source is a local file system: it checks only the thread's ids and capabilities. A server
    would also check the requester's groups, which the thread does not have."""

    def mode(self, mode: int, parent_fd: int) -> int:
        """Compute the permissions of a new object: the umask applies if the parent has no default ACL.

        The kernel leaves that to the file system (FUSE_DONT_MASK, see ``init_flags``). Where it has
        applied the umask itself, doing so again changes nothing.
        """
        if mode & self.umask & 0o777 and not has_default_acl(parent_fd):
            mode &= ~self.umask
        return mode

    def acts(self) -> bool:
        """Tell whether a thread can take the actor's ids for a change."""
        return self.local and credentials.can_act()

    def is_daemon(self) -> bool:
        """Tell whether these are the daemon's own ids, so that a thread need not change its own."""
        return (self.uid, self.gid) == (os.geteuid(), os.getegid())

    def acting(self) -> AbstractContextManager[None]:
        """Run a block with the actor's ids; where that cannot be, with the daemon's."""
        return credentials.acting_as(self.uid, self.gid) if self.acts() else nullcontext()

    def take(self, fd: int, st: os.stat_result, parent_fd: int) -> None:
        """Give the actor what the daemon made (``fd``, O_PATH too); a set-gid parent sets its group."""
        inherits = os.fstat(parent_fd).st_mode & stat_module.S_ISGID
        gid = st.st_gid if inherits else self.gid
        if (st.st_uid, st.st_gid) != (self.uid, gid):
            os.chown(f"/proc/self/fd/{fd}", self.uid, gid)


def create_file(parent_fd: int, name: bytes, mode: int, flags: int, actor: Actor) -> OpenedFile:
    """Create and open a file.

    Raises StaleError if the name exists by now and ``flags`` lack O_EXCL: the kernel then looks the
    file up and checks whether it may be opened, which it does not do for a new one.
    """
    flags = flags & ~os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC  # each write says whether it appends
    mode = actor.mode(mode, parent_fd)
    acts = actor.acts()
    first = mode if acts else mode & ~SPECIAL_BITS
    try:
        with actor.acting():
            fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, first, dir_fd=parent_fd)
    except FileExistsError as exc:
        if flags & os.O_EXCL:
            raise
        raise StaleError from exc
    try:
        if not acts:
            _give(fd, mode, parent_fd, actor)
        st = os.fstat(fd)
        return OpenedFile(fd, st, file_key(fd, st))
    except BaseException:
        os.close(fd)
        with actor.acting():
            _undo(os.unlink, name, parent_fd)
        raise


def create_nameless(parent_fd: int, mode: int, flags: int, actor: Actor) -> tuple[OpenedFile, int]:
    """Create and open a file without a name (O_TMPFILE). Returns an O_PATH fd of it, too."""
    flags = flags & ~os.O_APPEND | os.O_TMPFILE | os.O_CLOEXEC  # each write says whether it appends
    mode = stat_module.S_IMODE(actor.mode(mode, parent_fd))
    acts = actor.acts()
    with actor.acting():
        fd = os.open(f"/proc/self/fd/{parent_fd}", flags, mode if acts else mode & ~SPECIAL_BITS)
    try:
        if not acts:
            _give(fd, mode, parent_fd, actor)
        st = os.fstat(fd)
        path_fd = os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC)
        return OpenedFile(fd, st, file_key(fd, st)), path_fd
    except BaseException:
        os.close(fd)
        raise


def _give(fd: int, mode: int, parent_fd: int, actor: Actor) -> None:
    """Give the actor a file that the daemon made, and set its special bits, which chown clears."""
    actor.take(fd, os.fstat(fd), parent_fd)
    if mode & SPECIAL_BITS:
        os.fchmod(fd, stat_module.S_IMODE(os.fstat(fd).st_mode) | mode & SPECIAL_BITS)


def make_node(parent_fd: int, name: bytes, mode: int, rdev: int, target: bytes, actor: Actor) -> Opened:
    """Make a directory, symbolic link (to ``target``) or special file, by the type in ``mode``."""
    kind = stat_module.S_IFMT(mode)
    acts = actor.acts()
    mode = stat_module.S_IMODE(actor.mode(mode, parent_fd))
    first = mode if acts else mode & ~SPECIAL_BITS
    undo = os.rmdir if kind == stat_module.S_IFDIR else os.unlink
    with actor.acting():
        if kind == stat_module.S_IFDIR:
            os.mkdir(name, first, dir_fd=parent_fd)
        elif kind == stat_module.S_IFLNK:
            os.symlink(target, name, dir_fd=parent_fd)
        else:
            os.mknod(name, kind | first, rdev, dir_fd=parent_fd)
        try:
            made = lookup(parent_fd, name)
        except BaseException:
            _undo(undo, name, parent_fd)
            raise
    if acts:
        return made  # another object may have the name by now: it is only looked at
    try:
        actor.take(made.fd, made.stat, parent_fd)
        special = mode & SPECIAL_BITS
        if special and kind != stat_module.S_IFLNK:
            # What an ACL left, and an inherited bit.
            got = stat_module.S_IMODE(os.fstat(made.fd).st_mode)
            os.chmod(f"/proc/self/fd/{made.fd}", got | special)
        return Opened(made.fd, os.fstat(made.fd))
    except BaseException:
        os.close(made.fd)
        _undo(undo, name, parent_fd)
        raise


def _undo(remove: Callable[..., None], name: bytes, parent_fd: int) -> None:
    try:
        remove(name, dir_fd=parent_fd)
    except OSError as exc:
        raise HalfDoneError(exc) from exc


def link(fd: int, parent_fd: int, name: bytes) -> Changed:
    """Give the object of ``fd`` one more name."""
    before = os.fstat(fd)
    syscalls.linkat_fd(fd, parent_fd, name)
    return Changed(file_key(fd, before), before, _stat_after(fd))


def unlink(parent_fd: int, name: bytes, actor: Actor) -> Changed:
    """Remove a name that is not a directory's."""
    with _Holding(parent_fd, name) as held:
        with actor.acting():
            os.unlink(name, dir_fd=parent_fd)
        return held.changed()


def rmdir(parent_fd: int, name: bytes, actor: Actor) -> Changed:
    """Remove a directory."""
    with _Holding(parent_fd, name) as held:
        with actor.acting():
            os.rmdir(name, dir_fd=parent_fd)
        return held.changed()


@dataclass(frozen=True, slots=True)
class Renamed:
    """Says what a rename did to the object that was moved, and to the replaced one, if any."""

    moved: Changed
    replaced: Changed | None


def rename(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int, actor: Actor) -> Renamed:
    """Rename (``renameat2``). A whiteout that it leaves (RENAME_WHITEOUT) becomes the actor's."""
    with _Holding(old_dir, old) as moved:
        try:
            target = _Holding(new_dir, new)
        except FileNotFoundError:
            with actor.acting():
                syscalls.renameat2(old_dir, old, new_dir, new, flags)
            renamed = Renamed(moved.changed(), None)
        else:
            with target:
                with actor.acting():
                    syscalls.renameat2(old_dir, old, new_dir, new, flags)
                renamed = Renamed(moved.changed(), target.changed())
    if flags & syscalls.RENAME_WHITEOUT and not actor.acts():
        try:
            _take_whiteout(old_dir, old, actor)
        except OSError as exc:  # once more, and the whiteout would replace what was moved
            raise HalfDoneError(exc) from exc
    return renamed


def _take_whiteout(directory: int, name: bytes, actor: Actor) -> None:
    whiteout = lookup(directory, name)
    try:
        actor.take(whiteout.fd, whiteout.stat, directory)
    finally:
        os.close(whiteout.fd)


class _Holding:
    """Hold what a name refers to, to see what becomes of it. A mount point cannot be changed: EBUSY."""

    def __init__(self, parent_fd: int, name: bytes) -> None:
        try:
            opened = lookup_here(parent_fd, name)
        except OSError as exc:
            if exc.errno == errno.EXDEV:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY)) from exc
            raise
        self._fd, self._before = opened.fd, opened.stat

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def changed(self) -> Changed:
        return Changed(file_key(self._fd, self._before), self._before, _stat_after(self._fd))


def _stat_after(fd: int) -> os.stat_result | None:
    try:
        return os.fstat(fd)
    except OSError:
        return None


def sync(fd: int, data_only: bool) -> None:
    """Call ``fsync`` or ``fdatasync``."""
    (os.fdatasync if data_only else os.fsync)(fd)


def flush(fd: int) -> None:
    """Raise what a close would report now (a full disk, a lost server), without closing ``fd``."""
    os.close(os.dup(fd))


def read_link(fd: int) -> bytes:
    """Read the target of the symbolic link that ``fd`` (O_PATH) refers to."""
    return os.readlink(b"", dir_fd=fd)


def forbid_slash(name: bytes) -> None:
    """Raise OSError (EINVAL) unless a name is a single path component that leads to a child."""
    if name in (b"", b".", b"..") or b"/" in name:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
