"""Put a control group around one contestant: memory and disk limits, CPU time, who is in it.

Version 1 and version 2 hierarchies; the daemon and the workload are started inside.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .machine import Command, SkippedError, mounts

JOIN = 'while [ "$1" != -- ]; do echo $$ >"$1" || exit 99; shift; done; shift; exec "$@"'


def hierarchies() -> dict[str, Path]:
    """Return where each controller is; "unified" stands for version 2."""
    found: dict[str, Path] = {}
    for line in mounts():
        _, where, kind, options = line.split()[:4]
        if kind == "cgroup":
            for name in options.split(","):
                if name in {"memory", "blkio", "cpuacct"}:
                    found[name] = Path(where)
        elif kind == "cgroup2":
            controllers = (Path(where) / "cgroup.controllers").read_text().split()
            if {"memory", "io"} <= set(controllers):
                found["unified"] = Path(where)
    return found


class Group:
    """Is one group; ``group()`` makes it."""

    def __init__(self, memory: int | None) -> None:
        self.memory = memory
        """Bytes for all that runs inside; None: no limit."""
        found = hierarchies()
        name = f"cleanfs-bench-{os.getpid()}-{time.monotonic_ns()}"
        self._unified = found.get("unified")
        if self._unified is not None:
            control = self._unified / "cgroup.subtree_control"
            for controller in ("memory", "io"):
                try:
                    control.write_text(f"+{controller}")
                except OSError as exc:
                    raise SkippedError(f"control group controller {controller}: {exc}") from exc
            self._paths = {"unified": self._unified / name}
        elif {"memory", "blkio", "cpuacct"} <= set(found):
            self._paths = {controller: path / name for controller, path in found.items()}
        else:
            raise SkippedError("no control groups with memory, block I/O and CPU time")

    def create(self) -> None:
        """Make the directories and set the limit."""
        try:
            for path in self._paths.values():
                path.mkdir()
        except OSError as exc:
            raise SkippedError(f"control groups: {exc}") from exc
        if self.memory is None:
            return
        if self._unified is not None:
            self._set("unified", "memory.max", str(self.memory))
            self._set("unified", "memory.swap.max", "0")
        else:
            self._set("memory", "memory.limit_in_bytes", str(self.memory))
            self._set("memory", "memory.memsw.limit_in_bytes", str(self.memory))

    def _set(self, controller: str, name: str, text: str) -> None:
        file = self._paths[controller] / name
        if file.exists():
            file.write_text(text)

    def throttle(self, device: str, iops: int, bytes_per_second: int) -> None:
        """Limit reads of the device MAJ:MIN from inside; 0: no limit."""
        if self._unified is not None:
            self._set(
                "unified", "io.max",
                f"{device} riops={iops or 'max'} rbps={bytes_per_second or 'max'}",
            )  # fmt: skip
        else:
            self._set("blkio", "blkio.throttle.read_iops_device", f"{device} {iops}")
            self._set("blkio", "blkio.throttle.read_bps_device", f"{device} {bytes_per_second}")

    def inside(self, *command: str | Path | int) -> Command:
        """Return the command that runs ``command`` in this group."""
        joins = [path / "cgroup.procs" for path in self._paths.values()]
        return ["sh", "-c", JOIN, "sh", *joins, "--", *command]

    def cpu_seconds(self) -> float:
        """Return the CPU time of all that ever ran inside."""
        if self._unified is not None:
            lines = (self._paths["unified"] / "cpu.stat").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("usage_usec")) / 1e6
        return int((self._paths["cpuacct"] / "cpuacct.usage").read_text()) / 1e9

    def pids(self) -> list[int]:
        """Return the processes inside."""
        found: set[int] = set()
        for path in self._paths.values():
            found.update(map(int, (path / "cgroup.procs").read_text().split()))
        return sorted(found)

    def end(self) -> None:
        """End whatever is still inside."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def remove(self) -> None:
        """Take the directories away, and first the processes that are left."""
        deadline = time.monotonic() + 10
        for path in self._paths.values():
            while path.exists():
                try:
                    path.rmdir()
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    if time.monotonic() > deadline - 7:
                        self.end()
                    time.sleep(0.05)


@contextmanager
def group(memory: int | None = None) -> Iterator[Group]:
    """Yield a group of its own, which is gone afterwards."""
    made = Group(memory)
    try:
        made.create()
        yield made
    finally:
        made.remove()
