"""Adaptive busy polling: a short look at the FUSE device before going to sleep.

Most of a FUSE round trip is waking a process that sleeps. A program that reads in a loop sends its next
request some microseconds after our reply, so it pays to look for it that long before waiting in epoll.

How long is decided as KVM does it for a guest that halts (``Documentation/virt/kvm/halt-polling.rst``):
a wait that was short makes the window grow, up to the limit; a wait that was longer than the limit
closes it at once. So an idle mount sleeps, and the first request after a pause finds it asleep.

pyfuse3 waits through the module attribute ``trio`` of its own, which its asyncio mode replaces as well
(``pyfuse3.asyncio.enable``). What it takes from there are ``Lock``, ``lowlevel`` and
``ClosedResourceError``; ``install`` puts an object there that gives it trio, but for a lock and a wait
of ours. Why that is sound:

* What pyfuse3 needs to know of a wait is that the device may have a request, or is being closed, and it
  gets just that.
* A wait that finds a request at once is no checkpoint, and other tasks must not starve: before each
  look, and each return, the scheduler is asked whether another task could run (a thread has finished,
  a deadline has passed); if so, it does. At the latest it does after ``MAX_UNYIELDING_NS``.
* Each look gives up the GIL (``poll(2)``), so worker threads get on.
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
"""What sleeping adds to a wait that polling could have ended."""

MAX_UNYIELDING_NS = 100_000
"""The scheduler runs at least this often: it does not tell of tasks that it is about to run anyway."""


class Window:
    """How long to poll: pure, fed with how long each wait took."""

    def __init__(self, limit_ns: int) -> None:
        """Closed at first; never wider than ``limit_ns``, and always closed if that is 0."""
        self.limit_ns = limit_ns
        self.ns = 0

    def waited(self, ns: int) -> None:
        """A request came after ``ns``, in which polling, if any, had not found it."""
        if ns > self.limit_ns + WAKE_NS or self.ns == self.limit_ns:
            self.ns = 0
        else:
            self.ns = min(max(GROW * self.ns, GROW_START_NS), self.limit_ns)


@dataclass(frozen=True, slots=True)
class BusyPollStats:
    """A snapshot."""

    limit_us: float
    """The widest window; 0: no polling."""
    polled: int
    """Requests that polling found."""
    slept: int
    """Waits that went to sleep."""


class BusyPoll:
    """What stands for ``trio`` inside pyfuse3, and the wait in it."""

    def __init__(self, limit_us: float) -> None:
        """Poll for at most ``limit_us`` microseconds at a time."""
        self._window = Window(int(limit_us * 1000))
        self._poll: Callable[[int], list[tuple[int, int]]] | None = None
        self._closing = False
        self._yielded_ns = 0
        self._polled = self._slept = 0
        self._lock: ReaderLock | None = None

    def stats(self) -> BusyPollStats:
        """A snapshot."""
        return BusyPollStats(self._window.limit_ns / 1000, self._polled, self._slept)

    def install(self) -> bool:
        """Have pyfuse3 wait here, if only for the second look. False if it has no such place."""
        if getattr(pyfuse3, "trio", None) is not trio:
            log.warning("this pyfuse3 has no place to put another wait: busy polling is off")
            return False
        pyfuse3.trio = _Trio(self)  # type: ignore[attr-defined]  # an attribute of its C module
        return True

    def confirm(self) -> bool:
        """Requests have been served: warn, and give up, if pyfuse3 has not waited here for them."""
        if not self._window.limit_ns or (self._lock is not None and self._polled + self._slept):
            return True
        log.warning("this pyfuse3 does not wait as expected: busy polling is off")
        self.uninstall()
        return False

    def uninstall(self) -> None:
        """pyfuse3 waits by itself from the next session on."""
        self._window = Window(0)
        if isinstance(getattr(pyfuse3, "trio", None), _Trio):  # who stands in front of us may be busy
            pyfuse3.trio = trio  # type: ignore[attr-defined]  # see install

    def make_lock(self) -> "ReaderLock | trio.Lock":
        """pyfuse3's one lock. Another would be one that this module knows nothing of."""
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
        """Poll until the window closes. Whether there is something to read."""
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
        """Now: what woke us may be gone (a signal whose request was answered), and a read waits."""
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
        """``fd`` is about to be closed: also a wait that polls must end."""
        self._closing = True
        trio.lowlevel.notify_closing(fd)


class ReaderLock:
    """The lock under which pyfuse3's tasks wait for a request, without a checkpoint if it is free.

    Unfair on purpose: a task that comes back for the next request keeps the lock, and the scheduler is
    not needed. The task that was woken for it runs when the first one has to wait in earnest.
    """

    def __init__(self) -> None:
        """Free."""
        self._held = False
        self._parked: deque[trio.lowlevel.Task] = deque()
        self.woken = 0
        """Tasks that can run and will find that the lock is held."""

    async def __aenter__(self) -> None:
        """Take it."""
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
        """Free it. One woken task is enough: if it finds the lock held, it parks again."""
        self._held = False
        if self._parked and not self.woken:
            self.woken += 1
            trio.lowlevel.reschedule(self._parked.popleft())


class _Trio:
    """trio, but for what concerns waiting."""

    def __init__(self, busy_poll: BusyPoll) -> None:
        self.Lock = busy_poll.make_lock
        self.lowlevel = _Lowlevel(busy_poll)

    def __getattr__(self, name: str) -> object:
        return cast(object, getattr(trio, name))


class _Lowlevel:
    """trio.lowlevel, but for what concerns waiting."""

    def __init__(self, busy_poll: BusyPoll) -> None:
        self.wait_readable = busy_poll.wait_readable
        self.notify_closing = busy_poll.notify_closing

    def __getattr__(self, name: str) -> object:
        return cast(object, getattr(trio.lowlevel, name))
