"""How slow this machine is just now, and the time limits of tests on it.

A limit is what something takes at most on a machine with nothing else to do. When it is over, the
machine is measured, and one that is five times slower gives five times as long. So a limit costs
nothing while nothing is late, and a hang ends. What ran out and was given more time is counted, and
told at the end of the run.
"""

import os
import time
from collections.abc import Callable

WORK = 200_000
WORK_SECONDS = 0.008
"""What ``_work`` takes on a quiet machine (2 cores, Linux 6.18, Python 3.11): slices of a processor."""

MOST = 40.0
"""No limit becomes longer by more than this: a run ends on any machine."""

ran_out: list[float] = []
"""How slow the machine was, each time that it was given more time."""

disturbed: list[str] = []
"""Tests that failed while somebody dropped the kernel's caches, and ran again."""

more_time: list[Callable[[], None]] = []
"""Called when a test may go on, so that what watches it from outside knows."""


def slowness() -> float:
    """How much longer than on a quiet machine something takes, 1 at least.

    By a piece of work, which sees slow and stolen processors and a control group's quota; and by the
    load, which counts those that wait for a disk.
    """
    began = time.monotonic()
    _work()
    worked = (time.monotonic() - began) / WORK_SECONDS
    load = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    return min(max(1.0, worked, load), MOST)


class Deadline:
    """A time limit."""

    def __init__(self, seconds: float) -> None:
        """It begins now; ``seconds`` of a quiet machine."""
        self._seconds = self._granted = seconds
        self._began = time.monotonic()

    def left(self) -> float:
        """Seconds that remain, as far as was granted; 0 if none."""
        return max(0.0, self._began + self._granted - time.monotonic())

    def over(self) -> bool:
        """Whether the time is over, on this machine as it is now."""
        if self.left():
            return False
        factor = slowness()
        if self._seconds * factor <= self._granted:
            return True
        if self._granted == self._seconds:
            ran_out.append(factor)
        self._granted = self._seconds * factor
        return not self.left()


def cache_drops() -> tuple[int, int]:
    """How often the kernel's pages, and its inodes and names, were dropped (``drop_caches``) so far."""
    with open("/proc/vmstat", encoding="ascii") as file:
        counters = dict(line.split() for line in file)
    return int(counters.get("drop_pagecache", 0)), int(counters.get("drop_slab", 0))


def _work() -> int:
    total = 0
    for number in range(WORK):
        total += number * number
    return total
