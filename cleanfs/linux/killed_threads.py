"""Who on this machine was killed and can not end yet: what /proc says of threads."""

import contextlib
import os
from typing import Final

SIGKILL_PENDING: Final = 1 << 8
"""In the masks of /proc/PID/status."""


def killed_threads() -> set[int]:
    """Threads that /proc shows us, and that were killed and wait for something that no signal ends.

    Each wait for us is one. Of the others most are short.
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
    waits = False
    with contextlib.suppress(OSError), open(status, "rb") as lines:
        for line in lines:
            if line.startswith(b"State:"):
                waits = line.split()[1] == b"D"
            elif line.startswith(b"SigPnd:"):
                return waits and bool(int(line.split()[1], 16) & SIGKILL_PENDING)
    return False
