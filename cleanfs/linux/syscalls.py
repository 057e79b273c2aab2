"""Wrap the system calls that Python lacks.

Each is a thin function over libc that takes fds and bytes and raises OSError.
"""

import contextlib
import ctypes
import errno
import functools
import os
import struct
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)

AT_FDCWD: Final = -100
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_SYMLINK_FOLLOW: Final = 0x400
AT_EMPTY_PATH: Final = 0x1000
AT_HANDLE_FID: Final = 0x200
AT_NO_AUTOMOUNT: Final = 0x800
AT_STATX_DONT_SYNC: Final = 0x4000

STATX_INO: Final = 0x100
STATX_SIZE: Final = 0x200
STATX_BASIC_STATS: Final = 0x7FF
STATX_BTIME: Final = 0x800
STATX: Final = struct.Struct("=32xQQ88xII112x")
"""struct statx, 256 bytes: stx_ino, stx_size, stx_dev_major, stx_dev_minor."""

STATX_BIRTH: Final = struct.Struct("=I76xqI")
"""The beginning of the same: stx_mask, stx_btime in seconds and nanoseconds."""

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10

STATFS_BYTES: Final = 256
"""More than ``struct statfs`` takes on any architecture; ``f_type`` is its first member."""

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
RENAME_WHITEOUT: Final = 4

SYS_OPENAT2: Final = 437
"""The same on every architecture; glibc has no function for it."""

RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_CACHED: Final = 0x20

SYS_FSOPEN: Final = 430
SYS_FSCONFIG: Final = 431
SYS_FSMOUNT: Final = 432
"""The same on every architecture; glibc has functions for them since 2.36."""

FSOPEN_CLOEXEC: Final = 1
FSCONFIG_CMD_CREATE: Final = 6
FSMOUNT_CLOEXEC: Final = 1

MS_REMOUNT: Final = 32

UTIME_OMIT: Final = (1 << 30) - 2

RWF_DONTCACHE: Final = 0x80
"""preadv2: do not keep the data in the page cache (Linux 6.14)."""

CLONE_FILES: Final = 0x400

PR_SET_DUMPABLE: Final = 4

MAX_HANDLE_SZ: Final = 128

M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
M_ARENA_MAX: Final = -8


class _FileHandle(ctypes.Structure):
    """Mirror ``struct file_handle``."""

    _fields_ = [
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * MAX_HANDLE_SZ),
    ]


class _OpenHow(ctypes.Structure):
    """Mirror ``struct open_how``."""

    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


class _Timespec(ctypes.Structure):
    """Mirror ``struct timespec``."""

    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


class _Mallinfo(ctypes.Structure):
    """Mirror ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _timespec(ns: int | None) -> _Timespec:
    return _Timespec(0, UTIME_OMIT) if ns is None else _Timespec(*divmod(ns, 1_000_000_000))


def _raise(name: bytes = b"") -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), os.fsdecode(name))


def name_to_handle(fd: int, flags: int = AT_EMPTY_PATH, name: bytes = b"") -> bytes:
    """Return the NFS file handle of an open file (O_PATH too): type and body, as one opaque value.

    Without flags, ``fd`` is a directory and the handle is that of ``name`` in it.

    The handle is stable for the life of the file. It contains the generation, so no other file gets it.
    Empty if the file system has none. Raises OSError for other failures.
    """
    handle = _FileHandle(handle_bytes=MAX_HANDLE_SZ)
    mount_id = ctypes.c_int()
    if _libc.name_to_handle_at(fd, name, ctypes.byref(handle), ctypes.byref(mount_id), flags):
        if ctypes.get_errno() in (errno.EOPNOTSUPP, errno.EOVERFLOW, errno.ENOSYS, errno.EPERM):
            return b""
        _raise(name)
    kind: int = handle.handle_type
    body = ctypes.string_at(handle.f_handle, handle.handle_bytes)
    return kind.to_bytes(4, "little", signed=True) + body


def event_handle(fd: int) -> bytes:
    """Return the file handle that fanotify reports for an open file (O_PATH too); empty if none.

    It is the NFS file handle or, where there is none, one that cannot be opened (Linux 6.5).
    """
    with contextlib.suppress(OSError):
        return name_to_handle(fd) or name_to_handle(fd, AT_EMPTY_PATH | AT_HANDLE_FID)
    return b""


def open_by_handle(mount_fd: int, handle: bytes, flags: int) -> int:
    """Open the file that ``name_to_handle`` named, anywhere on the file system of ``mount_fd``.

    Raises OSError: ESTALE if the file is gone, EPERM without CAP_DAC_READ_SEARCH.

    The kernel returns ENOMEM while the inode number is being given to another file (ext4:
    ``iget_locked`` returns NULL for an inode in I_CREATING). That was seen in 3 of 100 tries while
    others created and removed files. It becomes ESTALE here, as allocations of that size do not fail.
    """
    body = handle[4:]
    named = _FileHandle(
        handle_bytes=len(body),
        handle_type=int.from_bytes(handle[:4], "little", signed=True),
        f_handle=(ctypes.c_ubyte * MAX_HANDLE_SZ)(*body),
    )
    fd: int = _libc.open_by_handle_at(mount_fd, ctypes.byref(named), flags | os.O_CLOEXEC)
    if fd < 0:
        if ctypes.get_errno() == errno.ENOMEM:
            ctypes.set_errno(errno.ESTALE)
        _raise()
    return fd


def known_size(fd: int) -> tuple[int, int]:
    """Return the kernel's cached device and size of an open file (O_PATH too). Raises OSError.

    No request goes to the file system.
    """
    device, _, size = _known(fd, b"", AT_EMPTY_PATH, STATX_SIZE)
    return device, size


def known_id(path: str) -> tuple[int, int]:
    """Return the kernel's cached device and inode number for a path. Raises OSError."""
    device, ino, _ = _known(AT_FDCWD, os.fsencode(path), 0, STATX_INO)
    return device, ino


def known_id_of_name(dir_fd: int, name: bytes) -> tuple[int, int]:
    """Return the same of a name in a directory, looked up and not followed. Raises OSError."""
    flags = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT
    device, ino, _ = _known(dir_fd, name, flags, STATX_INO)
    return device, ino


def _known(dir_fd: int, path: bytes, flags: int, mask: int) -> tuple[int, int, int]:
    """Call ``statx(2)`` without a request: device, and inode number and size if in ``mask``."""
    buffer = ctypes.create_string_buffer(STATX.size)
    if _libc.statx(dir_fd, path, flags | AT_STATX_DONT_SYNC, mask, buffer):
        _raise(path)
    ino, size, major, minor = STATX.unpack(buffer.raw)
    return os.makedev(major, minor), ino, size


def file_system_magic(fd: int) -> int:
    """Return ``f_type`` of ``fstatfs(2)`` for an open file (O_PATH too). Raises OSError."""
    buffer = ctypes.create_string_buffer(STATFS_BYTES)
    if _libc.fstatfs(fd, buffer):
        _raise()
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF  # a long; the numbers have 32 bits


def openat_cached(dir_fd: int, name: bytes, flags: int) -> int:
    """Call ``openat2(2)`` with RESOLVE_CACHED: never wait for the file system, and stay on it.

    Raises OSError: EAGAIN if it would have to wait or if the kernel lacks the call (before Linux 5.12),
    EXDEV if something is mounted on the name.
    """
    try:
        return _openat2(dir_fd, name, flags, RESOLVE_CACHED | RESOLVE_NO_XDEV)
    except OSError as exc:
        if exc.errno in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
        raise


def openat_here(dir_fd: int, name: bytes, flags: int) -> int:
    """Call ``openat2(2)`` such that it stays on the file system. Raises OSError: EXDEV at a mount."""
    return _openat2(dir_fd, name, flags, RESOLVE_NO_XDEV)


@functools.cache
def can_open_here() -> bool:
    """Return whether ``openat_here`` works: not before Linux 5.6, nor where a sandbox refuses it."""
    try:
        root = os.open("/", os.O_PATH | os.O_CLOEXEC)
        try:
            os.close(openat_here(root, b".", os.O_PATH))
        finally:
            os.close(root)
    except OSError:
        return False
    return True


def _openat2(dir_fd: int, name: bytes, flags: int, resolve: int) -> int:
    how = _OpenHow(flags=flags | os.O_CLOEXEC, mode=0, resolve=resolve)
    fd: int = _libc.syscall(SYS_OPENAT2, dir_fd, name, ctypes.byref(how), ctypes.sizeof(how))
    if fd < 0:
        _raise(name)
    return fd


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call ``fallocate(2)``. Raises OSError."""
    if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        _raise()


def birth_time(fd: int) -> int | None:
    """Return when a file (O_PATH too) was made, in ns; None if its file system does not know.

    Raises OSError.
    """
    buffer = ctypes.create_string_buffer(STATX.size)
    if _libc.statx(fd, b"", AT_EMPTY_PATH, STATX_BTIME, buffer):
        _raise()
    mask, seconds, nanoseconds = STATX_BIRTH.unpack_from(buffer)
    return seconds * 1_000_000_000 + nanoseconds if mask & STATX_BTIME else None


def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """Call ``renameat2(2)``. Raises OSError."""
    if _libc.renameat2(old_dir, old, new_dir, new, flags):
        _raise(old)


def linkat_fd(fd: int, new_dir: int, new: bytes) -> None:
    """Give an open file (O_PATH too) one more name. Raises OSError.

    It goes through /proc, which needs no privilege, unlike AT_EMPTY_PATH.
    """
    path = f"/proc/self/fd/{fd}".encode()
    if _libc.linkat(AT_FDCWD, path, new_dir, new, AT_SYMLINK_FOLLOW):
        _raise(new)


def utimens(path: str, atime_ns: int | None, mtime_ns: int | None) -> None:
    """Set the times of a file; None keeps one as it is, which os.utime cannot do. Raises OSError."""
    times = (_Timespec * 2)(*(_timespec(ns) for ns in (atime_ns, mtime_ns)))
    if _libc.utimensat(AT_FDCWD, os.fsencode(path), times, 0):
        _raise()


def sync_file_system(path: str) -> None:
    """Write back the dirty data of a directory's file system (``syncfs(2)``). Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd):
            _raise(os.fsencode(path))
    finally:
        os.close(fd)


def remount(path: str, flags: int) -> None:
    """Replace all flags of a mount (``mount(2)`` with MS_REMOUNT). Raises OSError."""
    if _libc.mount(None, os.fsencode(path), None, ctypes.c_ulong(MS_REMOUNT | flags), None):
        _raise(os.fsencode(path))


def detached_mount(fs_type: str) -> int:
    """Open the root of a new mount without a mount point; the mount ends when the fd is closed.

    Raises OSError: EPERM unless root, ENODEV, ENOSYS.
    """
    fs: int = _libc.syscall(SYS_FSOPEN, fs_type.encode(), FSOPEN_CLOEXEC)
    if fs < 0:
        _raise(fs_type.encode())
    try:
        if _libc.syscall(SYS_FSCONFIG, fs, FSCONFIG_CMD_CREATE, None, None, 0):
            _raise(fs_type.encode())
        root: int = _libc.syscall(SYS_FSMOUNT, fs, FSMOUNT_CLOEXEC, 0)
        if root < 0:
            _raise(fs_type.encode())
        return root
    finally:
        os.close(fs)


def unshare_descriptors() -> None:
    """Give this thread a private copy of the process's fd table. Raises OSError."""
    if _libc.unshare(CLONE_FILES):
        _raise()


def keep_memory_private() -> None:
    """Keep file data out of core dumps, and let only root look into this process.

    PR_SET_DUMPABLE prevents dumps, and ptrace and /proc/PID/mem by other processes of the same user.
    But the kernel resets it to fs.suid_dumpable whenever a thread takes another uid (``credentials``),
    and that may permit dumps. A coredump_filter of 0 persists and leaves only registers in a dump.
    RLIMIT_CORE is not enough: it does not apply to dumps that are piped to a program.
    """
    with (
        contextlib.suppress(OSError),  # a kernel without core dumps has no such file
        open("/proc/self/coredump_filter", "w", encoding="ascii") as file,
    ):
        file.write("0")
    _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def tune_malloc() -> None:
    """Make glibc return memory to the system: one arena, as only one thread keeps what it allocates.

    Otherwise each worker thread grows an arena of its own (64 MiB of address space, and fragments) for
    the read buffers that it hands to the main thread.
    """
    _libc.mallopt(M_ARENA_MAX, 1)
    _libc.mallopt(M_TRIM_THRESHOLD, 4 << 20)
    _libc.mallopt(M_MMAP_THRESHOLD, 4 << 20)


def malloc_free_bytes() -> int:
    """Return the bytes that malloc holds free, whether trimmed or not; 0 if it cannot say."""
    try:
        mallinfo2 = _libc.mallinfo2  # glibc 2.33
    except AttributeError:
        return 0
    mallinfo2.restype = _Mallinfo
    free: int = mallinfo2().fordblks
    return free


def trim_malloc() -> None:
    """Return malloc's free memory to the system."""
    _libc.malloc_trim(0)
