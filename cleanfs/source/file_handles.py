"""NFS file handles of open files, which are asked for often: natively where native code was built."""

from typing import TYPE_CHECKING

from cleanfs.cache.state import native
from cleanfs.linux import syscalls


def name_to_handle(fd: int) -> bytes:
    """Return the file handle of an open file (``syscalls.name_to_handle``). Raises OSError."""
    return syscalls.name_to_handle(fd)


if native is not None and not TYPE_CHECKING:
    name_to_handle = native.name_to_handle
