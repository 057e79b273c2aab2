"""Where memory has limits that count this process, how near they are, and what the kernel tells of it.

Read at every look: the machine (``/proc/meminfo``), and our memory control group and all above it that
have a limit, of version 1 or 2. A limit that nobody can read is none. Between the looks these wake us:

* PSI triggers (``/proc/pressure/memory``, ``memory.pressure`` of our group of version 2);
* ``memory.events`` of groups of version 2;
* ``memory.pressure_level`` and thresholds of ``memory.usage_in_bytes`` of groups of version 1.

Whatever of them the kernel or our rights do not give is done without.
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
"""Stalls of so many microseconds in so many. The kernel refuses the first with EINVAL to a process
without CAP_SYS_RESOURCE, root in many containers included: of those it takes only multiples of two
seconds (Linux 6.18)."""

THRESHOLDS = (3 / 4, 7 / 8, 15 / 16)
"""Parts of a limit; version 1 tells when the usage crosses them."""

UNLIMITED = 1 << 60
"""Version 1 has no word for no limit, but a number of this size."""

NOT_FOR_US = (OSError, ValueError, KeyError, IndexError)
"""What a file that is not there, not readable, or not as expected comes to."""


@dataclass(frozen=True, slots=True)
class Group:
    """A memory control group."""

    path: Path
    version: int

    def limit(self) -> int | None:
        """Bytes; None: it has none, or none that we may read."""
        names = ("memory.limit_in_bytes",) if self.version == 1 else ("memory.max", "memory.high")
        limits = []
        for name in names:
            with suppress(*NOT_FOR_US):
                limits.append(int((self.path / name).read_text()))  # "max" is no number
        limit = min(limits, default=UNLIMITED)
        return limit if limit < UNLIMITED else None

    def room(self, limit: int) -> Headroom:
        """How near the limit is. Raises one of NOT_FOR_US.

        File pages go first, those of the source and of the mount, too, so all on the file lists is
        available (shared memory and locked pages are not on them). Of the kernel's own memory nothing
        is: of what inodes and names take, we hold a part.
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
    """The whole machine; None if the kernel does not say."""
    with suppress(*NOT_FOR_US):
        text = Path("/proc/meminfo").read_text()
        found = dict(re.findall(r"^(MemTotal|MemAvailable): +(\d+) kB$", text, re.MULTILINE))
        return Headroom("machine", int(found["MemTotal"]) << 10, int(found["MemAvailable"]) << 10)
    return None


def groups(membership: str, mountinfo: str) -> list[Group]:
    """Our memory control groups, ours first, then what is above it, as far up as we can see.

    ``membership`` is the text of ``/proc/self/cgroup``.
    """
    ours: dict[str, str] = {}
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            ours["cgroup2"] = path
        elif "memory" in controllers.split(","):
            ours["cgroup"] = path
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
        # In a container what is mounted may be our own group, whatever it is called outside.
        below = own.relative_to(root) if own.is_relative_to(root) else Path()
        for directory in (below, *below.parents):
            group = Group(point / directory, 1 if fs_type == "cgroup" else 2)
            if group not in found:
                found.append(group)
    return found


@dataclass(frozen=True, slots=True)
class Limit:
    """Memory that this process can have at most."""

    size: int
    """Bytes."""
    of: str
    """What has the limit, for the user."""


def least_limit() -> Limit | None:
    """The lowest limit that counts this process; None if none can be read."""
    limits = []
    if (room := machine()) is not None:
        limits.append(Limit(room.limit, "this machine"))
    for group in groups(_text("/proc/self/cgroup"), _text("/proc/self/mountinfo")):
        if (size := group.limit()) is not None:
            limits.append(Limit(size, f"the control group {group.path}"))
    return min(limits, key=lambda limit: limit.size, default=None)


class MemoryWatch:
    """Looks, and waits for a reason to look again."""

    def __init__(self) -> None:
        """Everything is found out at the first look."""
        self.events = 0
        """Times that the kernel woke us."""
        self._membership = ""
        self._groups: list[Group] = []
        self._limits: dict[Group, int] = {}
        self._epoll: select.epoll | None = None
        self._fds: dict[int, str] = {}
        """Descriptors that are waited for, and what they are."""

    @property
    def watched(self) -> list[str]:
        """What is looked at, and what wakes us, for the operator."""
        return [
            "meminfo",
            *(f"cgroup{group.version}:{group.path}" for group in self._limits),
            *sorted(set(self._fds.values())),
        ]

    def rooms(self) -> list[Headroom]:
        """A look at all limits there are now."""
        self._notice_changes()
        found = [room] if (room := machine()) is not None else []
        for group, limit in self._limits.items():
            with suppress(*NOT_FOR_US):
                found.append(group.room(limit))
        return found

    async def wait(self, seconds: float) -> None:
        """Return when the kernel has something to tell, or after that time."""
        if self._epoll is None:
            await trio.sleep(seconds)
            return
        with trio.move_on_after(seconds):
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            self.events += 1
            self._drain()

    def close(self) -> None:
        """Wait for nothing any more."""
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def _notice_changes(self) -> None:
        """We may be moved to another group, and limits come, go and move."""
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
        with suppress(*NOT_FOR_US):
            self._add(_psi_trigger("/proc/pressure/memory"), "psi:machine")
        own = next((group for group in self._groups if group.version == 2), None)
        if own is not None:
            with suppress(*NOT_FOR_US):
                self._add(_psi_trigger(str(own.path / "memory.pressure")), "psi:cgroup2")
        for group, limit in self._limits.items():
            if group.version == 2:
                with suppress(*NOT_FOR_US):
                    self._add(
                        os.open(group.path / "memory.events", os.O_RDONLY | os.O_CLOEXEC), "events"
                    )
                continue
            for file, arguments, what in (
                ("memory.pressure_level", ["low"], "pressure_level"),
                (
                    "memory.usage_in_bytes",
                    [str(int(limit * part)) for part in THRESHOLDS],
                    "thresholds",
                ),
            ):
                with suppress(*NOT_FOR_US):
                    for fd in _version_1_events(group.path, file, arguments):
                        self._add(fd, what)

    def _add(self, fd: int, what: str) -> None:
        """Takes the descriptor."""
        assert self._epoll is not None
        self._fds[fd] = what
        # An eventfd is readable, all others have an exceptional condition.
        self._epoll.register(fd, select.EPOLLIN if _is_eventfd(what) else select.EPOLLPRI)

    def _drain(self) -> None:
        """Look at what has happened, so that it is over: triggers by the polling itself."""
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
    """A descriptor that has an exceptional condition when there are stalls. Raises OSError."""
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
    """Eventfds that count what happens with a file of a group of version 1. Raises OSError."""
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
