"""Call what Python lacks on ranges of files."""

import ctypes
import os

KEEP_SIZE, PUNCH, ZERO = 1, 2, 16

_libc = ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Make the system call that Python lacks. Raises OSError."""
    if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def link_fd(fd: int, path: os.PathLike[str]) -> None:
    """Give an open file a name (linkat(2) of /proc/self/fd/N, AT_SYMLINK_FOLLOW). Raises OSError."""
    at_fdcwd, follow = -100, 0x400
    if _libc.linkat(at_fdcwd, b"/proc/self/fd/%d" % fd, at_fdcwd, os.fsencode(path), follow):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
