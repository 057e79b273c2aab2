"""Change and copy ranges of the source's files: fallocate and copy_file_range.

Plain functions over descriptors, run in worker threads. They touch no state of ours; what the caller
must know afterwards (attributes before and after) they return. All raise OSError.
"""

import os

from cleanfs.linux import syscalls
from cleanfs.source.attributes import without_set_id
from cleanfs.source.caller import Caller
from cleanfs.source.file import Written


def allocate(fd: int, mode: int, offset: int, length: int, caller: Caller) -> Written:
    """Call ``fallocate(2)`` for a process. Counts no bytes."""
    before = os.fstat(fd)
    syscalls.fallocate(fd, mode, offset, length)
    return Written(0, before, _changed_by(caller, fd))


def copy(
    source_fd: int, source_offset: int, fd: int, offset: int, count: int, caller: Caller
) -> Written:
    """Copy up to ``count`` bytes for a process, by reference if the file system can (``reflink``).

    Comes short at the end of the source, and if an error follows a copied part.
    """
    before = os.fstat(fd)
    copied = os.copy_file_range(source_fd, fd, count, source_offset, offset)
    return Written(copied, before, _changed_by(caller, fd))


def _changed_by(caller: Caller, fd: int) -> os.stat_result:
    """Clear set-id bits after an unprivileged process's change of the data. Returns the attributes.

    The kernel does not ask for that with these requests, and the source sees a change by the daemon.
    """
    after = os.fstat(fd)
    mode = None if caller.privileged else without_set_id(after, caller)
    if mode is None:
        return after
    os.fchmod(fd, mode)
    return os.fstat(fd)
