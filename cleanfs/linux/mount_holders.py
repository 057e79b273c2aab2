"""Find the processes that keep a mount busy, without a request to the mount: it may not reply.

``/proc`` names a process's files by paths that the kernel makes from its own memory. Only mappings are
identified by device. Reading them takes a lock that a thread may hold while it waits for the mount, so
that search has a time limit of its own.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cleanfs.linux.forked_call import forked_call
from cleanfs.linux.mounts import MountPoint, mount_points

LOOK_SECONDS = 2.0

SHOWN = 3
"""Holders that a message names."""

LINKS = {"cwd": "working directory", "root": "root directory"}

Finder = Callable[[Path], str | None]
"""Says how the process of a ``/proc/PID`` uses the mount; None if it does not."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Describes a process that uses a mount."""

    pid: int
    name: str
    how: str

    def __str__(self) -> str:
        """Return the words for a message: ``bash (pid 123: working directory)``."""
        return f"{self.name} (pid {self.pid}: {self.how})"


def in_use_by(point: MountPoint) -> str:
    """Name what keeps a mount busy, as the end of a sentence."""
    below = point.path.rstrip("/") + "/"
    found = [f"the mount on {other.path}" for other in mount_points() if other.path.startswith(below)]
    found += [f"the loop device {name}" for name in _loop_devices(below)]
    found += [str(holder) for holder in holders(point)]
    if found:
        more = len(found) - SHOWN
        return ", ".join(found[:SHOWN]) + (f" and {more} more" if more > 0 else "")
    if os.geteuid():
        return "processes that only root can see"
    return "no process visible from here (another mount namespace?)"


def holders(point: MountPoint) -> list[Holder]:
    """Return the processes that use a mount, as far as this user may see them."""
    below = point.path.rstrip("/") + "/"
    device = f"{os.major(point.device):02x}:{os.minor(point.device):02x}"
    by_pid = {holder.pid: holder for holder in _find(lambda process: _mapped(process, device))}
    by_pid |= {holder.pid: holder for holder in _find(lambda process: _opened(process, below))}
    return [by_pid[pid] for pid in sorted(by_pid)]


def _find(finder: Finder) -> list[Holder]:
    """Apply a finder to each process; returns nothing if it does not finish in time."""
    us = os.getpid()

    def look() -> bytes:
        return json.dumps([
            (int(process.name), (process / "comm").read_text(errors="replace").strip(), how)
            for process in _processes(us)
            if (how := finder(process))
        ]).encode()  # fmt: skip

    try:
        return [Holder(*fields) for fields in json.loads(forked_call(look, "/proc", LOOK_SECONDS))]
    except OSError:
        return []


def _processes(but_not: int) -> Iterator[Path]:
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) not in (but_not, os.getpid()):
            yield process


def _opened(process: Path, below: str) -> str | None:
    """Say which link of a process leads into the mount. It may end meanwhile, or be another user's."""
    for name, how in LINKS.items():
        with suppress(OSError):
            if f"{os.readlink(process / name)}/".startswith(below):
                return how
    with suppress(OSError):
        for fd in os.scandir(process / "fd"):
            with suppress(OSError):
                if f"{os.readlink(fd.path)}/".startswith(below):
                    return "open file"
    return None


def _mapped(process: Path, device: str) -> str | None:
    """Say whether a process maps a file of a device, written as in ``/proc/PID/maps``."""
    with suppress(OSError), open(process / "maps", "rb") as lines:
        if any(line.split(None, 4)[3] == device.encode() for line in lines):
            return "mapped file"
    return None


def _loop_devices(below: str) -> list[str]:
    """Return the loop devices whose backing files are in the mount."""
    found = []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            if file.read_text(errors="surrogateescape").startswith(below):
                found.append(file.parts[3])
    return found
