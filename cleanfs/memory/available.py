"""Measure the memory left under each limit that counts this process, and wait for pressure events.

Each measurement reads the machine (``/proc/meminfo``), and our memory cgroup and its ancestors that
have a limit, of version 1 or 2. A limit that cannot be read counts as none. In between, these events
wake us:

* PSI triggers (``/proc/pressure/memory``, ``memory.pressure`` of our version 2 cgroup);
* ``memory.events`` of version 2 cgroups;
* ``memory.pressure_level`` and thresholds of ``memory.usage_in_bytes`` of version 1 cgroups.

All of them are optional: a kernel may lack one, or refuse it to us.
"""

import os
import re
import select
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from cleanfs.memory.policy import Headroom

PSI_TRIGGERS = (b"some 50000 500000", b"some 200000 2000000")
"""Microseconds of stalls within a window of microseconds. The kernel refuses the first with EINVAL to a
process without CAP_SYS_RESOURCE, which includes root in many containers: its windows must be multiples
of two seconds (Linux 6.18)."""

THRESHOLDS = (3 / 4, 7 / 8, 15 / 16)
"""Fractions of a limit; version 1 reports when the usage crosses one."""

UNLIMITED = 1 << 60
"""Version 1 writes a number of at least this size for no limit."""

UNREADABLE = (OSError, ValueError, KeyError, IndexError)
"""Errors of a file that is missing, not readable, or not as expected."""


@dataclass(frozen=True, slots=True)
class Group:
    """Identifies a memory cgroup."""

    path: Path
    version: int

    def limit(self) -> int | None:
        """Return the limit in bytes; None if there is none, or none that we may read."""
        names = ("memory.limit_in_bytes",) if self.version == 1 else ("memory.max", "memory.high")
        limits = []
        for name in names:
            with suppress(*UNREADABLE):
                limits.append(int((self.path / name).read_text()))  # "max" raises ValueError
        limit = min(limits, default=UNLIMITED)
        return limit if limit < UNLIMITED else None

    def headroom(self, limit: int) -> Headroom:
        """Measure what is left below the limit. Raises one of UNREADABLE.

        The kernel reclaims file pages first, those of the source and of the mount, too. So all pages on
        the file lists count as available; shared memory and locked pages are not on them. Slab memory
        does not count: part of its inodes and dentries are in use by us.
        """
        usage = int((self.path / self._usage).read_text())
        stat = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        total = "total_" if self.version == 1 else ""
        files = int(stat[f"{total}inactive_file"]) + int(stat[f"{total}active_file"])
        return Headroom(str(self.path), limit, limit - (usage - min(files, usage)))

    @property
    def _usage(self) -> str:
        return "memory.usage_in_bytes" if self.version == 1 else "memory.current"


def machine() -> Headroom | None:
    """Measure the whole machine; None if the kernel does not say."""
    with suppress(*UNREADABLE):
        text = Path("/proc/meminfo").read_text()
        found = dict(re.findall(r"^(MemTotal|MemAvailable): +(\d+) kB$", text, re.MULTILINE))
        return Headroom("machine", int(found["MemTotal"]) << 10, int(found["MemAvailable"]) << 10)
    return None


def groups(membership: str, mountinfo: str) -> list[Group]:
    """Return our memory cgroup, then its ancestors as far as we can see them.

    ``membership`` is the text of ``/proc/self/cgroup``.
    """
    ours = _paths_by_type(membership)
    found = []
    for line in mountinfo.split("\n"):
        before, dash, after = line.partition(" - ")
        fs_type, _, options = [*after.split(" "), "", ""][:3]
        if (
            not dash
            or fs_type not in ours
            or (fs_type == "cgroup" and "memory" not in options.split(","))
        ):
            continue
        root, point = (Path(field) for field in before.split(" ")[3:5])
        own = Path(os.path.normpath(ours[fs_type]))
        # In a container, our own cgroup may be mounted as the root, whatever its name outside.
        below = own.relative_to(root) if own.is_relative_to(root) else Path()
        for directory in (below, *below.parents):
            group = Group(point / directory, 1 if fs_type == "cgroup" else 2)
            if group not in found:
                found.append(group)
    return found


def _paths_by_type(membership: str) -> dict[str, str]:
    """Return the path of our memory cgroup in each type of cgroup file system."""
    paths: dict[str, str] = {}
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    return paths


@dataclass(frozen=True, slots=True)
class Limit:
    """Limits the memory of this process."""

    size: int
    """Bytes."""
    of: str
    """What has the limit, in words for the user."""


def least_limit() -> Limit | None:
    """Return the lowest limit that counts this process; None if none can be read."""
    limits = []
    if (headroom := machine()) is not None:
        limits.append(Limit(headroom.limit, "this machine"))
    for group in groups(_text("/proc/self/cgroup"), _text("/proc/self/mountinfo")):
        if (size := group.limit()) is not None:
            limits.append(Limit(size, f"the control group {group.path}"))
    return min(limits, key=lambda limit: limit.size, default=None)


class MemoryWatch:
    """Measures headrooms, and waits for the kernel's pressure events."""

    def __init__(self) -> None:
        """Start empty: the first measurement finds the limits."""
        self.events = 0
        """How often the kernel woke us."""
        self._membership = ""
        self._groups: list[Group] = []
        self._limits: dict[Group, int] = {}
        self._epoll: select.epoll | None = None
        self._fds: dict[int, str] = {}
        """The fds that are waited for, and their kinds."""

    @property
    def watched(self) -> list[str]:
        """List what is measured and which events wake us, for the operator."""
        return [
            "meminfo",
            *(f"cgroup{group.version}:{group.path}" for group in self._limits),
            *sorted(set(self._fds.values())),
        ]

    def headrooms(self) -> list[Headroom]:
        """Measure the headroom below all present limits."""
        self._update_limits()
        found = [headroom] if (headroom := machine()) is not None else []
        for group, limit in self._limits.items():
            with suppress(*UNREADABLE):
                found.append(group.headroom(limit))
        return found

    async def wait(self, seconds: float) -> None:
        """Return at the next pressure event, or after that time."""
        if self._epoll is None:
            await trio.sleep(seconds)
            return
        with trio.move_on_after(seconds):
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            self.events += 1
            self._drain()

    def close(self) -> None:
        """Close all fds of events."""
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def _update_limits(self) -> None:
        """Find the limits again: we may be in another cgroup, and limits come, go and change."""
        membership = _text("/proc/self/cgroup")
        if membership != self._membership:
            self._membership = membership
            self._groups = groups(membership, _text("/proc/self/mountinfo"))
        limits = {group: limit for group in self._groups if (limit := group.limit()) is not None}
        if limits != self._limits or self._epoll is None:
            self._limits = limits
            self._subscribe()

    def _subscribe(self) -> None:
        self.close()
        self._epoll = select.epoll()
        with suppress(*UNREADABLE):
            self._add(_psi_trigger("/proc/pressure/memory"), "psi:machine")
        own = next((group for group in self._groups if group.version == 2), None)
        if own is not None:
            with suppress(*UNREADABLE):
                self._add(_psi_trigger(str(own.path / "memory.pressure")), "psi:cgroup2")
        for group, limit in self._limits.items():
            if group.version == 2:
                with suppress(*UNREADABLE):
                    self._add(
                        os.open(group.path / "memory.events", os.O_RDONLY | os.O_CLOEXEC), "events"
                    )
            else:
                self._subscribe_version_1(group, limit)

    def _subscribe_version_1(self, group: Group, limit: int) -> None:
        thresholds = [str(int(limit * part)) for part in THRESHOLDS]
        for file, arguments, what in (
            ("memory.pressure_level", ["low"], "pressure_level"),
            ("memory.usage_in_bytes", thresholds, "thresholds"),
        ):
            with suppress(*UNREADABLE):
                for fd in _version_1_events(group.path, file, arguments):
                    self._add(fd, what)

    def _add(self, fd: int, what: str) -> None:
        """Wait for an fd, too, and own it."""
        assert self._epoll is not None
        self._fds[fd] = what
        # An eventfd is readable, all others have an exceptional condition.
        self._epoll.register(fd, select.EPOLLIN if _is_eventfd(what) else select.EPOLLPRI)

    def _drain(self) -> None:
        """Reset the events that occurred. Polling alone resets a trigger."""
        assert self._epoll is not None
        for fd, _ in self._epoll.poll(0):
            what = self._fds[fd]
            with suppress(BlockingIOError):
                if _is_eventfd(what):
                    os.read(fd, 8)
                elif what == "events":
                    os.pread(fd, 4096, 0)


def _is_eventfd(what: str) -> bool:
    return what in ("pressure_level", "thresholds")


def _psi_trigger(path: str) -> int:
    """Open an fd that has an exceptional condition when there are stalls. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        for trigger in PSI_TRIGGERS[:-1]:
            with suppress(OSError):
                os.write(fd, trigger + b"\0")
                return fd
        os.write(fd, PSI_TRIGGERS[-1] + b"\0")
    except OSError:
        os.close(fd)
        raise
    return fd


def _version_1_events(group: Path, file: str, arguments: list[str]) -> Iterator[int]:
    """Create eventfds that count the events of a file of a version 1 cgroup. Raises OSError."""
    of = os.open(group / file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for argument in arguments:
            fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            try:
                (group / "cgroup.event_control").write_text(f"{fd} {of} {argument}")
            except OSError:
                os.close(fd)
                raise
            yield fd
    finally:
        os.close(of)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="surrogateescape")
    except OSError:
        return ""
