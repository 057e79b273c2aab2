"""The kernel's directory of FUSE connections, its "control filesystem".

Source: Linux, Documentation/filesystems/fuse, "Control filesystem".
"""

import os
from typing import Final

from cleanfs import syscalls

CONNECTIONS: Final = "/sys/fs/fuse/connections"


def open_connections() -> int:
    """A descriptor of it; where nobody mounted it, of a mount that only we can see. Raises OSError."""
    if os.path.ismount(CONNECTIONS):
        return os.open(CONNECTIONS, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return syscalls.detached_mount("fusectl")
