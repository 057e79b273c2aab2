"""Measure how slow the machine is at the moment, and stretch the time limits of tests accordingly.

A limit is the longest time that a step takes on an idle machine. When it is over, the machine is
measured: one that is five times slower extends the limit five times. So a limit costs nothing while
no step is late, and a hang still ends. The limits that were extended are counted and reported at the
end of the run.
"""

import os
import time
from collections.abc import Callable

WORK = 200_000
WORK_SECONDS = 0.008
"""The time of ``_work`` on an idle machine (2 cores, Linux 6.18, Python 3.11)."""

MOST = 40.0
"""The largest factor of an extension, so that a run ends on any machine."""

ran_out: list[float] = []
"""The slowness of the machine at each extension."""

disturbed: list[str] = []
"""Tests that failed while another process dropped the kernel's caches, and ran again."""

more_time: list[Callable[[], None]] = []
"""Called when a test gets more time, to inform its watchdogs."""


def slowness() -> float:
    """Return how many times longer a step takes than on an idle machine, at least 1.

    The time of ``_work`` shows slow and stolen processors and the quota of a control group. The load
    also counts tasks that wait for a disk.
    """
    began = time.monotonic()
    _work()
    worked = (time.monotonic() - began) / WORK_SECONDS
    load = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    return min(max(1.0, worked, load), MOST)


class Deadline:
    """Measures a time limit that a slow machine extends."""

    def __init__(self, seconds: float) -> None:
        """Start a limit of ``seconds`` on an idle machine."""
        self._seconds = self._granted = seconds
        self._began = time.monotonic()

    def left(self) -> float:
        """Return the seconds that remain of the time granted so far, or 0."""
        return max(0.0, self._began + self._granted - time.monotonic())

    def over(self) -> bool:
        """Return whether the time is over at the present speed of the machine."""
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
    """Return how often ``drop_caches`` has dropped the kernel's pages, and its inodes and names."""
    with open("/proc/vmstat", encoding="ascii") as file:
        counters = dict(line.split() for line in file)
    return int(counters.get("drop_pagecache", 0)), int(counters.get("drop_slab", 0))


def _work() -> int:
    total = 0
    for number in range(WORK):
        total += number * number
    return total
