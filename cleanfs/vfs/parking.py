"""Open a parked inode again, by an open file of it, its file handle, or its place.

If another file is found, ESTALE makes the kernel look the name up again.
"""

import errno
import os
import stat as stat_module

from cleanfs.linux import syscalls
from cleanfs.source import file_handles
from cleanfs.source.errors import StaleError
from cleanfs.source.namespace import PATH_FLAGS
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.kernel_view import stamps_of


def is_parked(parked: Inode, fd: int, st: os.stat_result) -> bool:
    """Tell whether ``fd`` refers to the very file that a parked inode stands for."""
    if (st.st_dev, stat_module.S_IFMT(st.st_mode)) != (parked.device, parked.kind):
        return False
    if parked.dentry is not None and looks_like(parked, st):
        return True
    if st.st_ino != parked.ino:
        return False
    return not parked.handle or file_handles.name_to_handle(fd) == parked.handle


def looks_like(inode: Inode, st: os.stat_result) -> bool:
    """Tell whether the object found at the place of a parked inode may pass for it.

    The fingerprint of its pages is checked apart from this. Nothing is cached of a directory.
    """
    return inode.is_dir or inode.kernel.sent in (None, stamps_of(st))


def open_parked(inode: Inode, mount_fd: int, parent_fd: int) -> tuple[int, int]:
    """Open a parked inode: return an O_PATH fd, and the inode number that the source gives it now.

    This waits for the source: call it in a thread. It tries an open file of the inode, its file handle
    below ``mount_fd``, and its name below ``parent_fd``; either fd may be -1. Raises StaleError if the
    inode is not where it was, OSError if the source fails.
    """
    fd = _open_somehow(inode, mount_fd, parent_fd)
    st = os.fstat(fd)
    # An open file may have been closed and its number used again while we looked.
    if not is_parked(inode, fd, st):
        os.close(fd)
        raise StaleError
    return fd, st.st_ino


def _open_somehow(inode: Inode, mount_fd: int, parent_fd: int) -> int:
    for open_fd in inode.open_fds[-1:]:
        return os.open(f"/proc/self/fd/{open_fd}", os.O_PATH | os.O_CLOEXEC)
    if inode.dentry is not None and inode.dentry.place is None:
        raise StaleError  # its name leads to another
    if inode.handle and mount_fd >= 0 and inode.dentry is None:
        try:
            return syscalls.open_by_handle(mount_fd, inode.handle, os.O_PATH | os.O_NOFOLLOW)
        except PermissionError:
            pass  # needs CAP_DAC_READ_SEARCH; try the place
        except OSError as exc:
            if exc.errno == errno.ESTALE:
                raise StaleError from exc
            raise
    if parent_fd < 0:
        raise StaleError
    try:
        return os.open(inode.name, PATH_FLAGS, dir_fd=parent_fd)
    except FileNotFoundError as exc:
        raise StaleError from exc
