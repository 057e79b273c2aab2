"""Retry a call that finds the source full, once removed files have given up their space.

A removed file gives up its space when nothing holds it any more. The daemon holds it until the kernel
forgets the inode. The FORGET comes after the reply to the removal: some ms later, if a notification or
write-back holds the inode. On the source itself a program can use the space of a removed file at once.
So a call that fails for lack of space is retried when a recently removed inode is given up.
"""

import errno
import math
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar, TypeVarTuple

import trio

from cleanfs.eager import before_wait
from cleanfs.linux.timeouts import wait_with_stall_grace
from cleanfs.source.errors import HalfDoneError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

FULL: Final = (errno.ENOSPC, errno.EDQUOT)

LATELY_SECONDS: Final = 0.5
"""How long an inode is waited for, from its removal or from its last close after that; and how long a
call waits altogether. Some programs keep removed files open: that space does not come free."""


class SpaceRetry:
    """The inodes that were removed and are still held, and the retries that wait for them."""

    def __init__(self) -> None:
        """Start with none."""
        self._since: dict[int, float] = {}  # by node, the latest last
        self._released = 0
        self._news = trio.Event()

    def removed(self, node: int) -> None:
        """Note that the last name of an inode is gone."""
        self._since.pop(node, None)
        self._since[node] = trio.current_time()

    def is_removed(self, node: int) -> bool:
        """Tell whether an inode is held whose last name was removed through the mount."""
        return node in self._since

    def named(self, node: int) -> None:
        """Note that an inode without a name was given one (linkat(2) of an O_TMPFILE file)."""
        self._since.pop(node, None)

    def closing(self, node: int) -> None:
        """Note that an open file of an inode is being closed; the kernel may forget it next."""
        if node in self._since:
            self.removed(node)

    def released(self, node: int) -> None:
        """Note that nothing of an inode is held any more."""
        if self._since.pop(node, None) is not None:
            self._released += 1
            self._news.set()
            self._news = trio.Event()

    async def retrying(self, call: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """Await a call that takes space, again if it fails for lack of it (EDQUOT, ENOSPC).

        The call must be able to repeat what it did before it failed; if it cannot, it raises
        HalfDoneError, which is not retried. Raises OSError.
        """
        until = math.inf
        while True:
            seen = self._released
            try:
                return await call(*args)
            except OSError as exc:
                if exc.errno not in FULL or isinstance(exc, HalfDoneError):
                    raise
                now = trio.current_time()
                until = min(until, now + LATELY_SECONDS)
                if now >= until or not await self._more_since(seen, until):
                    raise

    async def _more_since(self, seen: int, until: float) -> bool:
        """Wait until an inode is given up after ``seen`` were. Returns whether one was."""
        if self._released == seen and self._since:
            latest = next(reversed(self._since.values()))
            seconds = min(until, latest + LATELY_SECONDS) - trio.current_time()

            async def news() -> None:
                while self._released == seen:
                    await self._news.wait()

            await before_wait()
            await wait_with_stall_grace(seconds, news)
        return self._released != seen
