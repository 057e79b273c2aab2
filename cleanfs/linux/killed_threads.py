"""Find threads that were killed and cannot end yet, in /proc."""

import contextlib
import os
from typing import Final

SIGKILL_PENDING: Final = 1 << 8
"""The bit of SIGKILL in the masks of /proc/PID/status."""


def killed_threads() -> set[int]:
    """Return the visible threads with SIGKILL pending that are in an uninterruptible wait.

    Threads that wait for our reply are among them. Most other such waits are short.
    """
    found: set[int] = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            found.update(
                int(task)
                for task in os.listdir(f"/proc/{pid}/task")
                if _is_killed(f"/proc/{pid}/task/{task}/status")
            )
    return found


def _is_killed(status: str) -> bool:
    uninterruptible = False
    with contextlib.suppress(OSError), open(status, "rb") as lines:
        for line in lines:
            if line.startswith(b"State:"):
                uninterruptible = line.split()[1] == b"D"
            elif line.startswith(b"SigPnd:"):
                return uninterruptible and bool(int(line.split()[1], 16) & SIGKILL_PENDING)
    return False
