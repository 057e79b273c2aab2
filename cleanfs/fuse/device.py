"""Find the FUSE device of this process."""

import contextlib
import os
import stat as stat_module
from typing import Final

FUSE_DEVICE: Final = os.makedev(10, 229)
"""The number of /dev/fuse (Documentation/admin-guide/devices.txt)."""


def find_device() -> int:
    """Return the fd of this process that is open on /dev/fuse; -1 if there is not exactly one."""
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # that of the list is closed by now
            st = os.fstat(fd)
            if stat_module.S_ISCHR(st.st_mode) and st.st_rdev == FUSE_DEVICE:
                found.append(fd)
    return found[0] if len(found) == 1 else -1
