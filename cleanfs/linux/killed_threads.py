"""Tell from /proc whether a thread or process was killed and cannot end yet."""

import contextlib
import os
from dataclasses import dataclass
from typing import Final

SIGKILL_PENDING: Final = 1 << 8
"""The bit of SIGKILL in the masks of /proc/PID/status."""

PF_EXITING: Final = 0x4
"""In the flags of /proc/PID/stat: the thread has begun to exit (linux/sched.h)."""


def is_killed(thread: int) -> bool:
    """Tell whether a thread has SIGKILL pending and is in an uninterruptible wait, as for our reply.

    False if it has ended, or is in a PID namespace that ours does not see.
    """
    uninterruptible = False
    try:
        with open(f"/proc/{thread}/status", "rb") as lines:
            for line in lines:
                if line.startswith(b"State:"):
                    uninterruptible = line.split()[1] == b"D"
                elif line.startswith(b"SigPnd:"):
                    return uninterruptible and bool(int(line.split()[1], 16) & SIGKILL_PENDING)
    except OSError:
        pass
    return False


def process_of(thread: int) -> int:
    """Return the id of the process that a thread belongs to; 0 if it has ended."""
    with contextlib.suppress(OSError), open(f"/proc/{thread}/status", "rb") as lines:
        for line in lines:
            if line.startswith(b"Tgid:"):
                return int(line.split()[1])
    return 0


def is_exiting(process: int) -> bool:
    """Tell whether a process exits, and one of its threads is in an uninterruptible wait meanwhile.

    So it waits for its asynchronous I/O (io_submit), of which it can never learn the outcome.
    """
    try:
        threads = [_Thread.of(process, int(thread)) for thread in os.listdir(f"/proc/{process}/task")]
    except OSError:
        return False  # it has ended, or one of its threads just has
    return all(thread.exiting for thread in threads) and any(thread.waits for thread in threads)


@dataclass(frozen=True, slots=True)
class _Thread:
    """Says what a thread does."""

    waits: bool
    """It waits uninterruptibly."""
    exiting: bool
    """It has begun to exit, or has ended."""

    @classmethod
    def of(cls, process: int, thread: int) -> "_Thread":
        """Read it. Raises OSError."""
        with open(f"/proc/{process}/task/{thread}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before may have any bytes
        state, flags = fields[0], int(fields[6])
        return cls(waits=state == b"D", exiting=bool(flags & PF_EXITING))
