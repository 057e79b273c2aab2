"""Undo actions for replies that the kernel refuses because the requesting process is gone.

A process that was released (``interrupts``) never gets the reply to its request, but the handler goes
on. When the kernel refuses that reply, nobody owns the reference or open file in it, and the kernel has
not learned of the change.
"""

import os
import re
from collections.abc import Callable
from typing import Final

UNDOABLE: Final = re.compile(
    r"fuse_(lookup|open|opendir|readdirplus|getattr|getxattr"
    r"|mknod|mkdir|symlink|link|create|unlink|rmdir|rename|setattr|write|write_buf|setxattr|removexattr)\b"
)
"""Handlers whose replies carry references or attributes, by the name that pyfuse3 logs upon a refusal.
(Its setxattr calls getxattr first, and may reply with that result.)"""


class RefusedReplies:
    """Holds the rollback of the last handler's reply.

    Each of the UNDOABLE handlers sets it, or None, as its last action.
    """

    def __init__(self) -> None:
        """Start without a rollback."""
        self._rollback: Callable[[], None] | None = None
        self._file = -1
        self._written: dict[int, Callable[[], None]] = {}  # by the reply's offset in the file

    def hold(self, rollback: Callable[[], None] | None) -> None:
        """Set the rollback of a handler that is about to return.

        pyfuse3 sends its reply before any other code runs.
        """
        self._rollback = rollback
        if self._file >= 0:
            position = os.lseek(self._file, 0, os.SEEK_CUR)
            self._written.pop(position, None)
            if rollback is not None:
                self._written[position] = rollback

    def write_to(self, fd: int) -> None:
        """Expect replies in a file, whose refusal is known later; -1 ends that."""
        self._file = fd
        self._written.clear()

    def refused(self, written_at: int | None = None) -> None:
        """Roll back the last reply, or the one at that offset in the file."""
        if written_at is None:
            rollback, self._rollback = self._rollback, None
        else:
            rollback = self._written.pop(written_at, None)
        if rollback is not None:
            rollback()
