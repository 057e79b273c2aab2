"""Let one of pyfuse3's tasks at a time wait for a request."""

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import trio


class ReaderLock:
    """Lets one of pyfuse3's tasks at a time wait for a request; no checkpoint if it is free.

    It is unfair on purpose: a task that returns for the next request keeps the lock, without a run of
    the scheduler. The task that was woken for it runs when the first one has to sleep.
    """

    def __init__(self) -> None:
        """Start unlocked."""
        self._held = False
        self._parked: deque[trio.lowlevel.Task] = deque()
        self.woken = 0
        """Runnable tasks that will find the lock held."""

    async def __aenter__(self) -> None:
        """Acquire the lock."""
        while self._held:
            await self._park()
        self._held = True

    async def _park(self) -> None:
        task = trio.lowlevel.current_task()
        self._parked.append(task)

        def abort(_: Callable[[], Any]) -> trio.lowlevel.Abort:
            self._parked.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        self.woken -= 1

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the lock. One woken task is enough: if it finds the lock held, it parks again."""
        self._held = False
        if self._parked and not self.woken:
            self.woken += 1
            trio.lowlevel.reschedule(self._parked.popleft())
