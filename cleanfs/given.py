"""What handlers give out, and taking it back if nobody takes it.

A program that was let go (``interrupts``) has not got the answer to what it asked: the handler goes
on, and only when its answer is refused do we learn that what it gave (a reference, an open file) is
nobody's.
"""

import os
import re
from collections.abc import Callable
from typing import Final

GIVING: Final = re.compile(r"fuse_(lookup|mknod|mkdir|symlink|link|open|create|opendir|readdirplus)\b")
"""Handlers whose answers give something out, as pyfuse3 names them when one is refused."""


class Given:
    """What the last handler gave out, and how to take that back if the kernel refuses the answer.

    Each of the GIVING ones says so as the last thing that it does, or that it gives nothing.
    """

    def __init__(self) -> None:
        """Nothing."""
        self._take_back: Callable[[], None] | None = None
        self._letter = -1
        self._written: dict[int, Callable[[], None]] = {}  # by where the answer is in the letter

    def hold(self, take_back: Callable[[], None] | None) -> None:
        """A handler is about to return; pyfuse3 sends its answer before anything else runs."""
        self._take_back = take_back
        if self._letter >= 0 and take_back is not None:
            self._written[os.lseek(self._letter, 0, os.SEEK_CUR)] = take_back

    def lent(self, letter: int) -> None:
        """Answers go into a file for now, -1 for no longer: whether they are refused is known later."""
        self._letter = letter
        self._written.clear()

    def refused(self, written_at: int | None = None) -> None:
        """The last answer was refused, or the one that begins there in the letter."""
        if written_at is None:
            take_back, self._take_back = self._take_back, None
        else:
            take_back = self._written.pop(written_at, None)
        if take_back is not None:
            take_back()
