"""Choose how long to poll the FUSE device before going to sleep.

Most of a FUSE round trip is waking a sleeping process. A program that reads in a loop sends its next
request some microseconds after our reply, so it pays to poll that long before waiting in epoll.

The window is chosen as KVM does for a halted guest (``Documentation/virt/kvm/halt-polling.rst``): a
short wait makes it grow, up to the limit; a wait longer than the limit closes it at once. So an idle
mount sleeps, and the first request after a pause has to wake it.
"""

from dataclasses import dataclass

GROW_START_NS = 10_000
"""The first window after a short wait (KVM's ``halt_poll_ns_grow_start``)."""

GROW = 2

WAKE_NS = 30_000
"""The latency that sleeping adds to a wait."""


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
