"""Tell whether a thread was killed and cannot end yet, from /proc."""

from typing import Final

SIGKILL_PENDING: Final = 1 << 8
"""The bit of SIGKILL in the masks of /proc/PID/status."""


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
