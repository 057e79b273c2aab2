"""The kernel's directory of FUSE connections, its "control filesystem".

Source: Linux, Documentation/filesystems/fuse, "Control filesystem".
"""

import contextlib
import os
import re
from typing import Final

from cleanfs import syscalls
from cleanfs.mounts import FS_TYPE, mounted_at

CONNECTIONS: Final = "/sys/fs/fuse/connections"


def open_connections() -> int:
    """A descriptor of it; where nobody mounted it, of a mount that only we can see. Raises OSError."""
    if os.path.ismount(CONNECTIONS):
        return os.open(CONNECTIONS, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return syscalls.detached_mount("fusectl")


def connection_of(device: int, mountpoint: str) -> int | None:
    """The number of a connection, by the descriptor of its FUSE device; None if it can not be known.

    Before Linux 6.16 the kernel does not tell, and it is that of whatever of ours is mounted there.
    """
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{device}", encoding="ascii") as file:
        if (found := re.search(r"^fuse_connection:\s*(\d+)$", file.read(), re.MULTILINE)) is not None:
            return int(found[1])
    point = mounted_at(mountpoint)
    if point is None or point.fs_type != FS_TYPE or os.major(point.device):
        return None
    return os.minor(point.device)
