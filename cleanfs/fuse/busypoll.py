"""Busy-poll the FUSE device adaptively: poll for a short time before going to sleep.

Most of a FUSE round trip is waking a sleeping process. A program that reads in a loop sends its next
request some microseconds after our reply, so it pays to poll that long before waiting in epoll.

The window is chosen as KVM does for a halted guest (``Documentation/virt/kvm/halt-polling.rst``): a
short wait makes it grow, up to the limit; a wait longer than the limit closes it at once. So an idle
mount sleeps, and the first request after a pause has to wake it.

pyfuse3 waits through its module global ``trio``, which its asyncio mode replaces, too
(``pyfuse3.asyncio.enable``). It uses ``Lock``, ``lowlevel`` and ``ClosedResourceError`` of it.
``install`` replaces the global by an object that is trio except for the lock and the wait. Why that is
sound:

* From a wait, pyfuse3 needs to know only that the device may have a request or is being closed.
* A wait that finds a request at once is no checkpoint, and other tasks must not starve. So before each
  poll and each return, the scheduler says whether another task could run (a thread has finished, a
  deadline has passed); if so, that task runs. At the latest it runs after ``MAX_UNYIELDING_NS``.
* Each poll releases the GIL (``poll(2)``), so worker threads make progress.
"""

import logging
import select
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import pyfuse3
import trio

log = logging.getLogger(__name__)

GROW_START_NS = 10_000
"""The first window after a short wait (KVM's ``halt_poll_ns_grow_start``)."""

GROW = 2

WAKE_NS = 30_000
"""The latency that sleeping adds to a wait."""

MAX_UNYIELDING_NS = 100_000
"""The scheduler runs at least this often: it does not report tasks that it is about to run anyway."""


class Window:
    """Decides how long to poll, from the lengths of past waits; no clock, no I/O."""

    def __init__(self, limit_ns: int) -> None:
        """Start closed. The window is never wider than ``limit_ns``, and stays closed if that is 0."""
        self.limit_ns = limit_ns
        self.ns = 0

    def waited(self, ns: int) -> None:
        """Adapt to a request that came after ``ns`` and that polling, if any, had not found."""
        if ns > self.limit_ns + WAKE_NS or self.ns == self.limit_ns:
            self.ns = 0
        else:
            self.ns = min(max(GROW * self.ns, GROW_START_NS), self.limit_ns)


@dataclass(frozen=True, slots=True)
class BusyPollStats:
    """Holds a snapshot."""

    limit_us: float
    """The widest window; 0 disables polling."""
    polled: int
    """Requests that polling found."""
    slept: int
    """Waits that went to sleep."""


class BusyPoll:
    """Replaces ``trio`` inside pyfuse3, with a wait that polls."""

    def __init__(self, limit_us: float) -> None:
        """Poll for at most ``limit_us`` microseconds at a time."""
        self._window = Window(int(limit_us * 1000))
        self._poll: Callable[[int], list[tuple[int, int]]] | None = None
        self._closing = False
        self._yielded_ns = 0
        self._polled = self._slept = 0
        self._lock: ReaderLock | None = None

    def stats(self) -> BusyPollStats:
        """Return a snapshot."""
        return BusyPollStats(self._window.limit_ns / 1000, self._polled, self._slept)

    def install(self) -> bool:
        """Make pyfuse3 wait here, even without polling. False if it has no global ``trio``.

        The wait also checks again whether what woke it is still there, which matters without polling,
        too.
        """
        if getattr(pyfuse3, "trio", None) is not trio:
            log.warning("this pyfuse3 has no wait that can be replaced: busy polling is off")
            return False
        pyfuse3.trio = _Trio(self)  # type: ignore[attr-defined]  # an attribute of its C module
        return True

    def confirm(self) -> bool:
        """Check, once requests were served, that pyfuse3 waited here; if not, warn and uninstall."""
        if not self._window.limit_ns or (self._lock is not None and self._polled + self._slept):
            return True
        log.warning("this pyfuse3 does not wait as expected: busy polling is off")
        self.uninstall()
        return False

    def uninstall(self) -> None:
        """Let pyfuse3 wait by itself from the next session on."""
        self._window = Window(0)
        if isinstance(getattr(pyfuse3, "trio", None), _Trio):  # else a hook before us is in use
            pyfuse3.trio = trio  # type: ignore[attr-defined]  # see install

    def make_lock(self) -> "ReaderLock | trio.Lock":
        """Make pyfuse3's reader lock, the first that it makes. Any further lock is trio's."""
        if self._lock is not None:
            return trio.Lock()
        self._lock = ReaderLock()
        return self._lock

    async def wait_readable(self, fd: int) -> None:
        """Return when ``fd`` can be read. Raises trio.ClosedResourceError once it is being closed."""
        began = time.perf_counter_ns()
        if self._window.ns and await self._look(fd, began):
            self._polled += 1
            return
        if self._closing:
            raise trio.ClosedResourceError
        self._slept += 1
        await trio.lowlevel.wait_readable(fd)
        while not self._readable(fd):
            await trio.lowlevel.wait_readable(fd)
        self._yielded_ns = time.perf_counter_ns()
        self._window.waited(self._yielded_ns - began)

    async def _look(self, fd: int, began: int) -> bool:
        """Poll until the window closes. Returns whether there is something to read."""
        readable, deadline = self._readable, began + self._window.ns
        now = began
        while now < deadline:
            if now > self._yielded_ns + MAX_UNYIELDING_NS or self._others_can_run():
                await trio.lowlevel.checkpoint()
                self._yielded_ns = time.perf_counter_ns()
                if self._closing:
                    return False
            if readable(fd):
                return True
            now = time.perf_counter_ns()
        return False

    def _readable(self, fd: int) -> bool:
        """Check again, because a read blocks: what woke us may be gone (an interrupt whose request
        ended).
        """
        if self._poll is None:
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            self._poll = poller.poll
        return bool(self._poll(0))

    def _others_can_run(self) -> bool:
        scheduler = trio.lowlevel.current_statistics()
        woken = self._lock.woken if self._lock is not None else 0
        return (
            scheduler.tasks_runnable > woken
            or scheduler.run_sync_soon_queue_size > 0
            or scheduler.seconds_to_next_deadline <= 0
        )

    def notify_closing(self, fd: int) -> None:
        """End waits because ``fd`` is about to be closed, also one that polls."""
        self._closing = True
        trio.lowlevel.notify_closing(fd)


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


class _Trio:
    """Is trio, except for the lock and ``lowlevel``."""

    def __init__(self, busy_poll: BusyPoll) -> None:
        self.Lock = busy_poll.make_lock
        self.lowlevel = _Lowlevel(busy_poll)

    def __getattr__(self, name: str) -> object:
        return cast(object, getattr(trio, name))


class _Lowlevel:
    """Is trio.lowlevel, except for the waits."""

    def __init__(self, busy_poll: BusyPoll) -> None:
        self.wait_readable = busy_poll.wait_readable
        self.notify_closing = busy_poll.notify_closing

    def __getattr__(self, name: str) -> object:
        return cast(object, getattr(trio.lowlevel, name))
