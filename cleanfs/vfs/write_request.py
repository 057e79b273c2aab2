"""Read from the present request how it changes a file: a WRITE, or an OPEN that truncates.

Without the channel no request is known (``fuse.request``). Then the kernel itself clears set-id bits
at a write, and what is appended goes to the offset at which the kernel sees the end of the file.
"""

import os

from cleanfs.fuse.protocol import FUSE_OPEN_KILL_SUIDGID, FUSE_WRITE_CACHE, FUSE_WRITE_KILL_SUIDGID
from cleanfs.fuse.request import current
from cleanfs.source.caller import Caller


def appends() -> bool:
    """Tell whether a program appends: its file has O_APPEND now, and it is no write-back of pages."""
    request = current()
    return request is not None and not writes_back() and bool(request.file_flags & os.O_APPEND)


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


def truncation_clears_set_id(opener: Caller) -> bool:
    """Tell whether the present OPEN, if it truncates, must clear set-id bits.

    The kernel asks for it since Linux 5.11. Before that they go unless root opens the file.
    """
    request = current()
    asked = request is not None and bool(request.flags & FUSE_OPEN_KILL_SUIDGID)
    return asked or not opener.privileged
