"""Space that removed files still take.

A removed file gives up its space when nobody holds it any more, and the daemon does: until the kernel
forgets the inode. It says so after the removal was answered, and while a notification or its writeback
holds the inode, some ms after. Without us, who removes a file can use its space at once. So a call
that finds the source full is made again when something that was removed lately has been given up.
"""

import errno
import math
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar, TypeVarTuple

import trio

from cleanfs.linux.timeouts import wait_with_stall_grace
from cleanfs.source.errors import HalfDoneError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

FULL: Final = (errno.ENOSPC, errno.EDQUOT)

LATELY_SECONDS: Final = 0.5
"""How long after its removal, or its last close after that, an inode is waited for; and how long a call
waits altogether. Some programs keep files open that they removed: their space does not come."""


class SpaceRetry:
    """What was removed and has not been given up."""

    def __init__(self) -> None:
        """Nothing."""
        self._since: dict[int, float] = {}  # by node, the latest last
        self._given_up = 0
        self._news = trio.Event()

    def removed(self, node: int) -> None:
        """The last name of an inode is gone."""
        self._since.pop(node, None)
        self._since[node] = trio.current_time()

    def is_removed(self, node: int) -> bool:
        """Whether the last name of an inode was removed by us, and something of it is held."""
        return node in self._since

    def closing(self, node: int) -> None:
        """An open file of an inode is being closed; the kernel may forget it next."""
        if node in self._since:
            self.removed(node)

    def given_up(self, node: int) -> None:
        """Nothing of an inode is held any more."""
        if self._since.pop(node, None) is not None:
            self._given_up += 1
            self._news.set()
            self._news = trio.Event()

    async def retrying(self, call: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """Await a call that takes space. What it did before it failed (EDQUOT, ENOSPC) it may do again.

        Raises OSError; HalfDoneError at once.
        """
        until = math.inf
        while True:
            seen = self._given_up
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
        """Whether something was given up since there was ``seen``, after a wait for what may be."""
        if self._given_up == seen and self._since:
            latest = next(reversed(self._since.values()))
            seconds = min(until, latest + LATELY_SECONDS) - trio.current_time()

            async def news() -> None:
                while self._given_up == seen:
                    await self._news.wait()

            await wait_with_stall_grace(seconds, news)
        return self._given_up != seen
