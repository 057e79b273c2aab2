"""Choose how requests come from the kernel: by reading the FUSE device, or by queues of io_uring."""

import errno
import os
from dataclasses import dataclass
from enum import Enum
from typing import Final


class Transport(Enum):
    """Says how requests come from the kernel."""

    AUTO = "auto"
    DEVICE = "device"
    """The main thread reads the device."""
    URING = "uring"
    """FUSE over io_uring (Linux 6.14): each processor has a queue, and a thread that serves hits."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Holds a choice that is made."""

    transport: Transport
    """DEVICE or URING."""
    reason: str


PARAMETER: Final = "/sys/module/fuse/parameters/enable_uring"
"""Whether the kernel offers queues to new mounts."""

DISABLED: Final = "/proc/sys/kernel/io_uring_disabled"


def obstacle() -> str | None:
    """Return why requests cannot come by queues, and what to do about it; None if they can."""
    try:
        with open(PARAMETER, encoding="ascii") as file:
            enabled = file.read().strip() == "Y"
    except FileNotFoundError:
        return "this kernel has no FUSE over io_uring: it takes Linux 6.14, with CONFIG_FUSE_IO_URING"
    except OSError as exc:
        return f"{PARAMETER}: {exc.strerror}"
    if not enabled:
        return f"the kernel offers no FUSE over io_uring: have root run echo Y > {PARAMETER}"
    return None


def why_no_ring(exc: OSError) -> str:
    """Return why the queues could not be made."""
    if exc.errno in (errno.EPERM, errno.EACCES) and os.path.exists(DISABLED):
        return f"io_uring is not permitted: see {DISABLED}, and the container's seccomp profile"
    return f"io_uring: {exc.strerror}"


def choose(wanted: Transport) -> Chosen:
    """Choose before mounting.

    ``auto`` takes the device: with queues names take up to twice the time (docs/benchmarks.md), and a
    killed daemon may leave a mount that hangs (docs/fast-path.md).
    """
    if wanted is Transport.AUTO:
        return Chosen(Transport.DEVICE, "faster for names; --transport uring for many readers")
    if wanted is Transport.URING and (why := obstacle()) is not None:
        return Chosen(Transport.DEVICE, why)
    return Chosen(wanted, "asked for")
