"""What only an answer of ours tells the kernel, and what is to be done if it refuses that answer.

A program that was let go (``interrupts``) has not got the answer to what it asked: the handler goes
on, and only when its answer is refused do we learn that what it gave (a reference, an open file) is
nobody's, and that the kernel does not know of what it changed.
"""

import os
import re
from collections.abc import Callable
from typing import Final

UNDOABLE: Final = re.compile(
    r"fuse_(lookup|open|opendir|readdirplus|getattr|getxattr"
    r"|mknod|mkdir|symlink|link|create|unlink|rmdir|rename|setattr|write|write_buf|setxattr|removexattr)\b"
)
"""Handlers whose answers give something out or are believed, as pyfuse3 names them when one is
refused. (Its setxattr asks getxattr first, and may answer by what that says.)"""


class RefusedReplies:
    """What the last handler gave out or changed, and what to do if the kernel refuses the reply.

    Each of the UNDOABLE ones says so as the last thing that it does, or that there is nothing.
    """

    def __init__(self) -> None:
        """Nothing."""
        self._rollback: Callable[[], None] | None = None
        self._file = -1
        self._written: dict[int, Callable[[], None]] = {}  # by where the answer is in the file

    def hold(self, rollback: Callable[[], None] | None) -> None:
        """A handler is about to return; pyfuse3 sends its answer before anything else runs."""
        self._rollback = rollback
        if self._file >= 0:
            position = os.lseek(self._file, 0, os.SEEK_CUR)
            self._written.pop(position, None)
            if rollback is not None:
                self._written[position] = rollback

    def write_to(self, fd: int) -> None:
        """Replies go into a file for now, -1 for no longer: a refusal is known later."""
        self._file = fd
        self._written.clear()

    def refused(self, written_at: int | None = None) -> None:
        """The last answer was refused, or the one that begins there in the file."""
        if written_at is None:
            rollback, self._rollback = self._rollback, None
        else:
            rollback = self._written.pop(written_at, None)
        if rollback is not None:
            rollback()
