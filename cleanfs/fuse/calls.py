"""Name the calls into Python by requests that need it for a part of their work only."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from cleanfs.cache.state import FileState, Stamps


@dataclass(frozen=True, slots=True)
class Calls:
    """Holds what is called while requests are served without Python."""

    drop_unused: Callable[[list[int]], None]
    """Called with nodes to which the kernel refers no more."""
    hold_parked: Callable[[int, int], bool]
    """Called with a parked node and its new fd, with the right number. Returns whether it took that."""
    enter_opened: Callable[[int, os.stat_result, int, bytes, bytes | None], int]
    """Called with an fd that was opened by a name, and its stat; with the directory's node and the
    name; and with the file handle, if wanted. Makes an inode that takes over the fd, and returns its
    node. Returns 0 if it did nothing."""
    enter_listed: Callable[[int, list[tuple[os.stat_result, bytes, bytes | None]]], list[int] | None]
    """Called with a directory's node, and with stat, name and handle of files that were listed. Makes
    the inodes of those that have none, and moves the others. Returns their nodes, or None if it did
    nothing."""
    ask_to_forget: Callable[[], None]
    """Called when there are more inodes than there should be."""
    poll_open: Callable[[int], None]
    """Called with the node of a file that was opened, unless that is polled."""
    open_directory: Callable[[int, int], int]
    """Called with the node of a directory, and an fd to list it by. Makes a handle that takes over the
    fd, and returns its number. Returns 0 if it did nothing."""
    close_directory: Callable[[int], bool]
    """Called with the number of an open directory. Returns whether it closed that: it is not in use."""
    begin_writing: Callable[[int, FileState], None]
    """Called with the node and record of a file that was opened for writing."""
    end_writing: Callable[[int, FileState], None]
    """Called with them when it is closed."""
    change_refused: Callable[[int, int, int, int], None]
    """Called with a node, and what the kernel was told of it before (``kernel_view.Told``), if it
    refused a reply that told new attributes."""
    created: Callable[[int, bytes, int, int, bool], int]
    """Called with a directory's node, the name of a file that was created there, two fds of it, for
    data and for its path, and whether it may be written to. Takes over the second. Returns its node."""
    create_refused: Callable[[int], None]
    """Called with its node if the kernel refused the reply."""
    unlinked: Callable[[int, bytes, int, int, Stamps, Stamps | None, bool], None]
    """Called with a directory's node and the name that was removed there; with the file's node and an
    fd of it; with its stamps before and after, None if those are not known; and whether it is gone."""
    unlink_refused: Callable[[int, bytes, int], None]
    """Called with the first three of them if the kernel refused the reply."""
