"""Read from the present request how it changes a file: a WRITE, or an OPEN or SETATTR that truncates.

Also whether a READ or WRITE passes by the kernel's page cache.

Without the channel no request is known (``fuse.request``). Then the kernel itself clears set-id bits
at a write, and what is appended goes to the offset at which the kernel sees the end of the file.
"""

import os

from cleanfs.fuse.protocol import (
    FATTR_KILL_SUIDGID,
    FUSE_OPEN_KILL_SUIDGID,
    FUSE_SETATTR,
    FUSE_WRITE_CACHE,
    FUSE_WRITE_KILL_SUIDGID,
)
from cleanfs.fuse.request import current
from cleanfs.source.caller import Caller


def appends() -> bool:
    """Tell whether a program appends: its file has O_APPEND now, and it is no write-back of pages."""
    request = current()
    return request is not None and not writes_back() and bool(request.file_flags & os.O_APPEND)


def bypasses_cache() -> bool:
    """Tell whether a program reads or writes with O_DIRECT: past the kernel's pages."""
    request = current()
    return request is not None and bool(request.file_flags & os.O_DIRECT)


def writes_back() -> bool:
    """Tell whether the kernel writes pages back that a mapping, or ``--writeback``, made dirty."""
    request = current()
    return request is not None and bool(request.flags & FUSE_WRITE_CACHE)


def unprivileged_writer() -> Caller | None:
    """Return the process whose write must clear set-id bits, as it lacks CAP_FSETID; else None."""
    request = current()
    if request is None or not request.flags & FUSE_WRITE_KILL_SUIDGID:
        return None
    return Caller(request.uid, request.gid, request.pid)


def truncation_clears_set_id() -> bool:
    """Tell whether the kernel says that the present truncation must clear set-id bits.

    It does only with FUSE_HANDLE_KILLPRIV_V2.
    """
    request = current()
    if request is None:
        return False
    flag = FATTR_KILL_SUIDGID if request.opcode == FUSE_SETATTR else FUSE_OPEN_KILL_SUIDGID
    return bool(request.flags & flag)
