"""Find the fd that is readable when trio has something to do."""

from typing import cast

import trio


def scheduler_fd() -> int:
    """Return the running scheduler's epoll fd, or -1 if this trio hides it.

    It is readable when an fd that a task waits for is, when a thread has called back, and after a
    signal: trio's wake-up socket is in it. Deadlines it does not know.
    """
    context = getattr(getattr(trio, "_core", None), "_run", None)
    runner = getattr(getattr(context, "GLOBAL_RUN_CONTEXT", None), "runner", None)
    epoll = getattr(getattr(runner, "io_manager", None), "_epoll", None)
    return -1 if epoll is None else cast(int, epoll.fileno())
