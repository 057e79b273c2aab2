"""Tell whether trio has something to do, so that the channel may sleep in its place."""

import select
from typing import cast

import trio


class Scheduler(trio.abc.Instrument):
    """Watches the running scheduler.

    ``trio.lowlevel.current_statistics`` does not count tasks that the scheduler has taken out of its
    queue, and is about to run. A task that slept then would starve them.
    """

    def __init__(self) -> None:
        """Begin to watch. Tasks that are runnable now are not known until they have run."""
        self._runnable: set[trio.lowlevel.Task] = set()
        self.fd = _epoll_fd()
        """An fd that is readable when an fd that a task waits for is, when a thread has called back,
        and after a signal: trio's wake-up socket is in it. -1 if this trio hides its epoll."""
        self._events = select.poll()
        if self.fd >= 0:
            self._events.register(self.fd, select.POLLIN)
        self.ran()
        trio.lowlevel.add_instrument(self)

    def close(self) -> None:
        """End the watch."""
        trio.lowlevel.remove_instrument(self)

    @property
    def runnable(self) -> int:
        """Count the tasks that can run, without the present one."""
        return len(self._runnable)

    def ran(self) -> None:
        """Note that tasks have run, which alone sets deadlines. trio's statistics take some time."""
        seconds = trio.lowlevel.current_statistics().seconds_to_next_deadline
        self._deadline = trio.current_time() + seconds

    @property
    def seconds_to_next_deadline(self) -> float:
        """Return when the scheduler must run whatever happens; negative if that is past."""
        return self._deadline - trio.current_time()

    @property
    def has_events(self) -> bool:
        """Tell whether an event or a deadline may have come that the scheduler has not seen."""
        return self.fd < 0 or self.seconds_to_next_deadline <= 0 or bool(self._events.poll(0))

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        """Note that a task can run (trio calls this)."""
        self._runnable.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Note that a task runs (trio calls this)."""
        self._runnable.discard(task)


def _epoll_fd() -> int:
    context = getattr(getattr(trio, "_core", None), "_run", None)
    runner = getattr(getattr(context, "GLOBAL_RUN_CONTEXT", None), "runner", None)
    epoll = getattr(getattr(runner, "io_manager", None), "_epoll", None)
    return -1 if epoll is None else cast(int, epoll.fileno())
