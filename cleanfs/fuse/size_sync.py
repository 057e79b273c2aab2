"""What the kernel believes of a file of the mount, and having it believe what is so.

A notification makes the kernel ask for attributes again, when somebody wants them. But it drops the
answer to a question that it asked before another notification, or before a write (the counter is
``attr_version`` in ``fs/fuse``), and who asked goes by what the inode had: a read by the old size. So
whoever must not be wronged has the question asked in time, and looks whether the answer took effect.

Both go by a descriptor of the file on the mount, opened by its handle: no name is looked up, and no
lock taken that a program may hold while it waits for us. That takes CAP_DAC_READ_SEARCH; without it
nothing is asked, and nothing promised.

Everything here waits for our own answers, so it runs in threads.
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
"""Seconds before each question. While a write that makes the file larger is under way the kernel takes
no size (FUSE_I_SIZE_UNSTABLE), and that write may hang."""


@dataclass(frozen=True, slots=True)
class MountedAt:
    """Where the kernel has the mount."""

    path: str
    device: int


def can_refresh() -> bool:
    """Whether this process has the privilege that it takes."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        effective = next(line for line in status if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> CAP_DAC_READ_SEARCH & 1)


def file_handle(node: int, generation: int) -> bytes:
    """The handle by which the kernel opens a node that it has in memory, for ``open_by_handle``."""
    words = (FILEID_INO64_GEN, node >> 32, node & 0xFFFFFFFF, generation & 0xFFFFFFFF)
    return b"".join(word.to_bytes(4, "little") for word in words)


def refresh_kernel_size(where: MountedAt, node: int, generation: int) -> bool:
    """Have the kernel ask for a file's attributes until it believes the size that it is told.

    False if it was not seen to: no privilege, the mount is elsewhere, the kernel has forgotten the
    file, the source gives no attributes, or others change the size all the time.
    """
    try:
        fd = _open(where, node, generation)
    except OSError:
        return False
    try:
        for pause in PAUSES:
            time.sleep(pause)
            told = os.fstat(fd).st_size  # of the answer, whether it took effect or not
            if (where.device, told) == syscalls.known_size(fd):
                return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def _open(where: MountedAt, node: int, generation: int) -> int:
    """Raises OSError."""
    root = os.open(where.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return syscalls.open_by_handle(root, file_handle(node, generation), os.O_PATH)
    finally:
        os.close(root)
