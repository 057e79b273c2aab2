"""Set how large the kernel's requests to a mount are, and how many it sends at a time.

Only root may change these limits of the kernel: the read-ahead window, which is the size of sequential
reads, and the number of background requests (read-ahead, write-back).
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
"""More than may wait for the source at a time: read-ahead of a hung file occupies some, and that of
other files needs the rest. The kernel's default is 12."""

CONGESTED: Final = 48
"""Where the kernel delays optional requests: three quarters of those that may wait for the source."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Holds the kernel's limits; -1 where one cannot be read."""

    read_ahead_kb: int = -1
    max_background: int = -1


def set_limits(device: int, read_ahead: int) -> RequestLimits:
    """Set the limits of a FUSE mount, where permitted, and return the limits in force.

    ``device`` is its ``st_dev``, ``read_ahead`` in bytes. The kernel sets its own limits upon the reply
    to FUSE_INIT, so the mount must have replied before. This sends no request to the mount.
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
    """Write a number if permitted. Returns the number in force, -1 if it cannot be read."""
    with contextlib.suppress(OSError), open(path, "w", encoding="ascii") as file:
        file.write(f"{value}\n")
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return -1
