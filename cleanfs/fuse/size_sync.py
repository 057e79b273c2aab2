"""Force the kernel to refresh its size of a file of the mount.

After a notification the kernel sends a GETATTR when it next needs attributes. But it ignores the reply
to a GETATTR sent before another notification or before a write (the counter is ``attr_version`` in
``fs/fuse``). The requester then uses the old attributes: a read uses the old size. So before a reader
depends on the size, force a GETATTR and verify that the kernel applied the reply.

Both use an fd of the file on the mount. With CAP_DAC_READ_SEARCH it is opened by its handle. That
looks up no name and takes no lock that a program may hold while it waits for us. Without the
capability it is opened by its path, if the kernel has all names of that cached and valid. Only then
does that take no lock and send no LOOKUP. A file that a program has just opened mostly has such a path.

Everything here waits for our own replies, so it runs in threads.
"""

import os
import time
from dataclasses import dataclass
from typing import Final

from cleanfs.linux import syscalls
from cleanfs.linux.credentials import CAP_DAC_READ_SEARCH

FILEID_INO64_GEN: Final = 0x81
"""Kind of a FUSE file handle: node id (high half first) and generation, 32 bits each
(``fuse_encode_fh``)."""

PAUSES: Final = (0.0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
"""Seconds before each GETATTR. While a write extends the file, the kernel accepts no size
(FUSE_I_SIZE_UNSTABLE), and that write may hang."""


@dataclass(frozen=True, slots=True)
class MountedAt:
    """Holds the mount's path and device number."""

    path: str
    device: int


def can_open_handles() -> bool:
    """Return whether this process has the capability that opening a file by its handle needs."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        effective = next(line for line in status if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> CAP_DAC_READ_SEARCH & 1)


def file_handle(node: int, generation: int) -> bytes:
    """Make the handle for ``open_by_handle`` of a node in the kernel's memory."""
    words = (FILEID_INO64_GEN, node >> 32, node & 0xFFFFFFFF, generation & 0xFFFFFFFF)
    return b"".join(word.to_bytes(4, "little") for word in words)


def refresh_kernel_size(where: MountedAt, node: int, generation: int, path: bytes = b"") -> bool:
    """Force GETATTRs until the kernel has applied the size in a reply.

    ``path`` is the one by which the kernel found the file below the root of the mount; empty to open
    the file by its handle. False if the size was not seen to be applied. The file cannot be opened in
    that way, the mount is elsewhere, or the kernel has forgotten the file. Or the source returns no
    attributes, or other processes change the size all the time.
    """
    try:
        fd = _open(where, node, generation, path)
    except OSError:
        return False
    try:
        for pause in PAUSES:
            time.sleep(pause)
            st = os.fstat(fd)  # as in the reply, whether it was applied or not
            if st.st_ino != node:
                return False  # the path leads to another file by now
            if (where.device, st.st_size) == syscalls.known_size(fd):
                return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def _open(where: MountedAt, node: int, generation: int, path: bytes) -> int:
    """Open the file. Raises OSError."""
    root = os.open(where.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if path:
            return syscalls.openat_cached(root, path, os.O_PATH | os.O_NOFOLLOW)
        return syscalls.open_by_handle(root, file_handle(node, generation), os.O_PATH)
    finally:
        os.close(root)
