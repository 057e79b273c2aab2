"""Find FUSE connections in the kernel's "control filesystem".

Source: Linux, Documentation/filesystems/fuse, "Control filesystem".
"""

import contextlib
import os
import re
import select
from dataclasses import dataclass
from typing import Final

from cleanfs.linux import syscalls
from cleanfs.linux.mounts import FS_TYPE, mounted_at

CONNECTIONS: Final = "/sys/fs/fuse/connections"


def open_connections() -> int:
    """Open the directory of FUSE connections, from a private mount if there is none. Raises OSError."""
    if os.path.ismount(CONNECTIONS):
        return os.open(CONNECTIONS, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return syscalls.detached_mount("fusectl")


@dataclass(frozen=True, slots=True)
class Connection:
    """Identifies a connection to other processes: the kernel reuses numbers once a mount is gone."""

    number: int
    abort_inode: int
    """Inode number of its ``abort`` file. The next connection with the same number has another."""


def connection_of(device: int, mountpoint: str) -> Connection | None:
    """Return the connection of an fd of the FUSE device; None if it cannot be known."""
    number = _number(device, mountpoint)
    if number is None:
        return None
    try:
        connections = open_connections()
    except OSError:
        return None
    try:
        abort = os.stat(f"{number}/abort", dir_fd=connections)
    except OSError:
        return None
    finally:
        os.close(connections)
    # The kernel reuses the number of an ended connection only. Ours is alive, so this file is its own.
    return Connection(number, abort.st_ino) if _is_connected(device) else None


def _number(device: int, mountpoint: str) -> int | None:
    """Read the connection's number from fdinfo or, before Linux 6.16, from the mount at that place."""
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{device}", encoding="ascii") as file:
        if (found := re.search(r"^fuse_connection:\s*(\d+)$", file.read(), re.MULTILINE)) is not None:
            return int(found[1])
    point = mounted_at(mountpoint)
    if point is None or point.fs_type != FS_TYPE or os.major(point.device):
        return None
    return os.minor(point.device)


def _is_connected(device: int) -> bool:
    poll = select.poll()
    try:
        poll.register(device, select.POLLIN)
    except ValueError:  # the device was not found
        return False
    return not any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))
