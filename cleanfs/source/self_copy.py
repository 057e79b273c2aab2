"""Refuse to empty a file for a program that is about to copy it onto itself.

``cp SOURCE/f MOUNT/f`` opens one file by its two paths: for reading in the source, with O_TRUNC on the
mount. ``cp`` compares device and inode number to detect that, but the mount has another device. So a
process that has the file open for reading in the source may not empty it through the mount.
"""

import errno
import os
from typing import Final

from cleanfs.linux import syscalls

MAX_DESCRIPTORS: Final = 256
"""A process with more open files is no copying tool. Looking at one takes 10 us."""


def open_to_read(pid: int, ino: int) -> list[str]:
    """List a process's descriptors, as paths, that are open for reading an inode of that number.

    The inode may be on any file system. The call waits for none of them: an open file may hang. The
    list is empty before Linux 5.14, and for processes whose descriptors the daemon may not see.
    """
    try:
        descriptors = os.listdir(f"/proc/{pid}/fdinfo") if pid else []
        if len(descriptors) > MAX_DESCRIPTORS:
            return []
        return [
            f"/proc/{pid}/fd/{fd}"
            for fd in descriptors
            if _is_to_read(f"/proc/{pid}/fdinfo/{fd}", b"\nino:\t%d\n" % ino)
        ]
    except OSError:
        return []


def _is_to_read(fdinfo: str, ino: bytes) -> bool:
    with open(fdinfo, "rb", buffering=0) as file:
        info = file.read(4096) or b""
    if ino not in info:
        return False
    flags = int(info.partition(b"flags:")[2].split()[0], 8)
    return flags & os.O_ACCMODE != os.O_WRONLY and not flags & os.O_PATH


def forbid_self_copy(descriptors: list[str], st: os.stat_result) -> None:
    """Raise OSError (EBUSY) if a descriptor is of the very file that ``st`` describes. May wait."""
    for path in descriptors:
        try:
            found = syscalls.known_id(path)
        except OSError:
            continue  # it has been closed
        if found == (st.st_dev, st.st_ino):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
