"""Make system calls that Python has no name for, or refuses to make as they are."""

import ctypes
import os
import struct
from typing import Final

libc = ctypes.CDLL(None, use_errno=True)
libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
libc.telldir.restype = ctypes.c_long
libc.mmap.restype = ctypes.c_void_p

AT_FDCWD: Final = -100
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_EACCESS: Final = 0x200
AT_REMOVEDIR: Final = 0x200
AT_SYMLINK_FOLLOW: Final = 0x400
AT_EMPTY_PATH: Final = 0x1000

RENAME_FLAGS: Final = {"": 0, "noreplace": 1, "exchange": 2, "both": 3, "whiteout": 4, "unknown": 8}

UTIME_NOW: Final = (1 << 30) - 1
UTIME_OMIT: Final = (1 << 30) - 2

SYS_FACCESSAT2: Final = 439
SYS_FCHMODAT2: Final = 452
SYS_OPENAT2: Final = 437

Path = str | bytes


def check(result: int) -> int:
    """Return the result; raises OSError for -1."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def renameat2(old: Path, new: Path, flags: int) -> None:
    check(libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags))


def linkat(old_fd: int, old: Path, new: Path, flags: int) -> None:
    check(libc.linkat(old_fd, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags))


def unlinkat(path: Path, flags: int) -> None:
    check(libc.unlinkat(AT_FDCWD, os.fsencode(path), flags))


def utimensat(
    fd: int, path: Path | None, times: tuple[int, int, int, int] | None, flags: int = 0
) -> None:
    """``times`` are the seconds and nanoseconds of atime and mtime."""
    array = None if times is None else (ctypes.c_long * 4)(*times)
    check(libc.utimensat(fd, None if path is None else os.fsencode(path), array, flags))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    check(libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)))


def faccessat2(fd: int, path: Path, mode: int, flags: int) -> int:
    return check(libc.syscall(SYS_FACCESSAT2, fd, os.fsencode(path), mode, flags))


def fchmodat2(fd: int, path: Path, mode: int, flags: int) -> None:
    check(libc.syscall(SYS_FCHMODAT2, fd, os.fsencode(path), mode, flags))


def openat2(path: Path, flags: int, mode: int, resolve: int) -> int:
    how = struct.pack("QQQ", flags, mode, resolve)
    return check(libc.syscall(SYS_OPENAT2, AT_FDCWD, os.fsencode(path), how, len(how)))


def fchownat(fd: int, path: Path, uid: int, gid: int, flags: int) -> None:
    check(libc.fchownat(fd, os.fsencode(path), uid, gid, flags))


def getxattr(path: Path, name: bytes, size: int) -> int:
    """Return the size that the call returns for a buffer of ``size`` bytes."""
    buffer = ctypes.create_string_buffer(max(size, 1))
    return check(libc.getxattr(os.fsencode(path), name, buffer if size else None, size))


def listxattr(path: Path, size: int) -> int:
    buffer = ctypes.create_string_buffer(max(size, 1))
    return check(libc.listxattr(os.fsencode(path), buffer if size else None, size))


def setxattr(path: Path, name: bytes, value: bytes, flags: int) -> None:
    check(libc.setxattr(os.fsencode(path), name, value, len(value), flags))


def readlink(path: Path, size: int) -> str:
    """Read a link with a buffer of ``size`` bytes."""
    buffer = ctypes.create_string_buffer(max(size, 1))
    length = check(libc.readlink(os.fsencode(path), buffer, size))
    return os.fsdecode(buffer.raw[:length])


def ioctl(fd: int, request: int, value: int = 0) -> int:
    """Call ioctl with a pointer to an int, which is returned."""
    number = ctypes.c_long(value)
    check(libc.ioctl(fd, ctypes.c_ulong(request), ctypes.byref(number)))
    return number.value


def statx(path: Path, flags: int = 0, mask: int = 0xFFF, fd: int = AT_FDCWD) -> dict[str, int]:
    buffer = ctypes.create_string_buffer(256)
    check(libc.statx(fd, os.fsencode(path), flags, mask, buffer))
    names = ("mask", "blksize", "attributes", "nlink", "uid", "gid", "mode", "pad", "ino", "size",
             "blocks", "attributes_mask", "atime", "atime_ns", "pad", "btime", "btime_ns")  # fmt: skip
    return dict(zip(names, struct.unpack_from("IIQIIIHHQQQQqIiqI", buffer), strict=True))
