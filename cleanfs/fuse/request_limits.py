"""How large, and how many at a time, the kernel makes the requests that it sends to a mount.

Both are limits of the kernel's that only root may move: the read-ahead window, which is what sequential
reads ask for at a time, and the number of requests that nobody waits for yet (read-ahead, write-back).
"""

import contextlib
import logging
import os
from dataclasses import dataclass
from typing import Final

from cleanfs.linux.fusectl import open_connections

log = logging.getLogger(__name__)

BDI: Final = "/sys/class/bdi"

MAX_BACKGROUND: Final = 256
"""More than may wait for the source at one time: read-ahead of a file that hangs keeps its places, and
read-ahead of all others must find some. The kernel's own limit is 12."""

CONGESTED: Final = 48
"""Where the kernel is to hold back what is optional: three quarters of what we wait for at a time."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What the kernel keeps to; -1 where it cannot be known."""

    read_ahead_kb: int = -1
    max_background: int = -1


def set_limits(device: int, read_ahead: int) -> RequestLimits:
    """Set the limits of a FUSE mount that answers, where permitted, and say what they are.

    ``device`` is its ``st_dev``, ``read_ahead`` in bytes. The kernel sets its own when it gets the
    answer to the first request: ours must come later. No request to the mount is made.
    """
    bdi = f"{BDI}/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    read_ahead_kb = _set(bdi, read_ahead >> 10)
    max_background = _set_max_background(os.minor(device))
    limits = RequestLimits(read_ahead_kb, max_background)
    log.info("%s", limits)
    return limits


def _set_max_background(connection: int) -> int:
    try:
        connections = open_connections()
    except OSError:
        return -1
    try:
        directory = f"/proc/self/fd/{connections}/{connection}"
        _set(f"{directory}/congestion_threshold", CONGESTED)
        return _set(f"{directory}/max_background", MAX_BACKGROUND)
    finally:
        os.close(connections)


def _set(path: str, value: int) -> int:
    """Write a number if we may; the number that is there then, -1 if it cannot be read."""
    with contextlib.suppress(OSError), open(path, "w", encoding="ascii") as file:
        file.write(f"{value}\n")
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return -1
