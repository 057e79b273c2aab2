"""The kernel's directory of FUSE connections, its "control filesystem".

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
    """A descriptor of it; where nobody mounted it, of a mount that only we can see. Raises OSError."""
    if os.path.ismount(CONNECTIONS):
        return os.open(CONNECTIONS, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return syscalls.detached_mount("fusectl")


@dataclass(frozen=True, slots=True)
class Connection:
    """A connection, as another process finds it: numbers are given out again once a mount has gone."""

    number: int
    abort_inode: int
    """Inode number of its ``abort`` file: the connection that gets the number next has another."""


def connection_of(device: int, mountpoint: str) -> Connection | None:
    """The connection of a descriptor of the FUSE device; None if it cannot be known."""
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
    # Only a connection that has ended gives its number away: what was looked at was this one's.
    return Connection(number, abort.st_ino) if _is_connected(device) else None


def _number(device: int, mountpoint: str) -> int | None:
    """Before Linux 6.16 the kernel does not tell: it is that of whatever of ours is mounted there."""
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
