"""Hold what a run shares: its directory, its disks, its sizes, its clock, its results."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

from scripts.lib.content import write_compressible

from . import data
from .cgroups import Group, group
from .contestants import Contestant
from .disks import CLOUD_DISK, HARD_DISK, UNTHROTTLED, Disk, DiskClass, loop_disk, unmount, zram_disk
from .machine import MIB, SkippedError
from .results import Results

Item = TypeVar("Item")


@dataclass(frozen=True)
class Plan:
    """Says how much is measured."""

    rounds: int = 3
    ram: int = 680
    """MiB around program and daemon."""
    oversize: float = 1024 / 680
    """Working set over RAM."""
    hot: float = 0.4
    """Hot set over RAM."""
    sweep: tuple[float, ...] = (0.5, 1, 1.5, 2, 3)
    sweep_all: bool = True
    classes: tuple[DiskClass, ...] = (UNTHROTTLED, CLOUD_DISK, HARD_DISK)
    only: tuple[str, ...] = ()
    """Contestants at equal RAM; empty: all."""
    tree: str = "part"
    tree_ram: int = 620
    tree_spare: int = 260
    """MiB that cleanfs leaves for its tables of files, and the kernel's."""
    compile: bool = True
    tree_limit: float = 120
    seconds: float = 3
    reread_limit: float = 15
    scan: bool = True
    stream: int = 1024
    """MiB of each stream."""
    hot_file: int = 256
    """MiB for round trips."""
    small_files: int = 4000
    files: int = 60_000
    """In the tree of small files."""
    transactions: int = 100
    job_file: int = 64
    """MiB of each small job's file."""
    write: int = 256
    """MiB written in one go."""


FULL = Plan()
QUICK = replace(
    FULL,
    rounds=1,
    ram=400,
    oversize=1.3,
    sweep=(0.5, 1.3),
    sweep_all=False,
    classes=(CLOUD_DISK, HARD_DISK),
    only=("page cache alone (ext4)", "cleanfs", "btrfs, zstd", "ext4 on zram (ceiling)"),
    tree="small",
    tree_ram=320,
    tree_spare=116,
    compile=False,
    tree_limit=20,
    seconds=1,
    reread_limit=6,
    scan=False,
    stream=256,
    hot_file=64,
    small_files=500,
    files=3000,
    transactions=30,
    job_file=8,
    write=64,
)


class Clock:
    """Gives each part its minutes; a part that has used them measures no further rounds."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + minutes * 60

    @property
    def up(self) -> bool:
        """Tell whether the time is used."""
        return time.monotonic() > self._end


class Lab:
    """Is one run."""

    def __init__(
        self, scratch: Path, stack: ExitStack, plan: Plan, console: Console, progress: Progress
    ) -> None:
        self.scratch = scratch
        self.plan = plan
        self.progress = progress
        self.results = Results()
        self._stack = stack
        self._console = console
        self._disks: dict[str, Disk | str] = {}
        self.data_ram: dict[str, float] = {}
        """RAM that zram needs for a byte of a file."""
        self._mounts = 0

    def skip(self, what: str, why: object) -> None:
        """Say what is not measured, and why; once."""
        line = f"{what}: {why}: skipped"
        if line not in self.results.skipped:
            self.results.skipped.append(line)
            self._console.print(line, markup=False, highlight=False)

    def say(self, line: str) -> None:
        """Report something worth knowing."""
        self._console.print(line, markup=False, highlight=False)

    def rounds(self, items: Sequence[Item], count: int, clock: Clock, what: str) -> Iterator[Item]:
        """Take each once in each round, each round starting with another one."""
        task = self.progress.add_task(what, total=count * len(items))
        for turn in range(count):
            for place in range(len(items)):
                if turn and not place and clock.up:
                    self.say(f"{what}: the time is used after {turn} of {count} rounds")
                    self.progress.remove_task(task)
                    return
                yield items[(place + turn) % len(items)]
                self.progress.advance(task)
        self.progress.remove_task(task)

    # -- disks -----------------------------------------------------------------------------------

    def disk(self, name: str) -> Disk:
        """Return a disk with its data sets below data/; it is made when it is first asked for."""
        if name not in self._disks:
            task = self.progress.add_task(f"making the disk {name}", total=None)
            try:
                self._disks[name] = MAKERS[name](self)
            except SkippedError as exc:
                self._disks[name] = str(exc)
            finally:
                self.progress.remove_task(task)
        found = self._disks[name]
        if isinstance(found, str):
            raise SkippedError(found)
        return found

    def own(self, kind: str, mib: int, options: str = "") -> Disk:
        """Make a loop disk for the whole run."""
        image = self.scratch / f"{len(self._disks)}-{kind}.img"
        return self._stack.enter_context(loop_disk(image, mib * MIB, kind, options))

    def own_zram(self, mib: int) -> Disk:
        """Make a zram disk for the whole run."""
        return self._stack.enter_context(zram_disk(mib * MIB))

    def fill(self, disk: Disk, tree: bool) -> None:
        """Put the working sets, and the kernel's tree, on a new disk."""
        plan = self.plan
        mount = self.scratch / "fill"
        with disk.mounted(mount):
            target = mount / "data"
            target.mkdir()
            write_compressible(target / "text", int(max(*plan.sweep, plan.oversize) * plan.ram) * MIB)
            write_compressible(target / "hot", int(plan.hot * plan.ram) * MIB)
            if tree:
                try:
                    data.unpack_tree(target / "tree", plan.tree)
                except SkippedError as exc:
                    self.skip("kernel tree", exc)

    # -- sessions --------------------------------------------------------------------------------

    @contextmanager
    def session(self, contestant: Contestant, memory: int) -> Iterator["Session"]:
        """Mount a disk and a contestant afresh, in a control group with so much memory (bytes)."""
        disk = self.disk(contestant.disk)
        self._mounts += 1
        base = self.scratch / f"session-{self._mounts}"
        try:
            with (
                group(memory) as made,
                disk.mounted(base / "source") as source,
                contestant.mount(made, source / "data", base / "mount") as path,
            ):
                yield Session(made, disk, path)
        finally:
            for directory in (base / "mount", base / "source", base):
                if directory.exists():
                    directory.rmdir()

    @contextmanager
    def mounted(
        self, contestant: Contestant, source: Path, memory: int | None = None
    ) -> Iterator["Mounted"]:
        """Mount a contestant on a directory."""
        self._mounts += 1
        mountpoint = self.scratch / f"mount-{self._mounts}"
        try:
            with group(memory) as made, contestant.mount(made, source, mountpoint) as path:
                yield Mounted(made, source, path)
        finally:
            if mountpoint.exists():
                unmount(mountpoint)
                mountpoint.rmdir()


@dataclass
class Mounted:
    """Holds a contestant in its group."""

    group: Group
    source: Path
    path: Path


@dataclass
class Session:
    """Holds a contestant in its group, on its disk."""

    group: Group
    disk: Disk
    path: Path

    def throttle(self, disk_class: DiskClass) -> None:
        """Make the disk one of that class."""
        if not self.disk.ram_bytes:
            self.group.throttle(self.disk.number, disk_class.iops, disk_class.bytes_per_second)


def _ext4(lab: Lab) -> Disk:
    disk = lab.own("ext4", _text_mib(lab) * 2 + 3000)
    lab.fill(disk, tree=True)
    return disk


def _btrfs(kind: str, tree: bool) -> Callable[[Lab], Disk]:
    def make(lab: Lab) -> Disk:
        disk = lab.own("btrfs", _text_mib(lab) + 3500, f"compress={kind}")
        lab.fill(disk, tree and lab.plan.tree != "small")
        return disk

    return make


def _zram(lab: Lab) -> Disk:
    disk = lab.own_zram(_text_mib(lab) + 500)
    lab.fill(disk, tree=False)
    lab.data_ram["zram"] = disk.ram_bytes / (_text_mib(lab) * MIB)
    return disk


def _text_mib(lab: Lab) -> int:
    plan = lab.plan
    return int((max(*plan.sweep, plan.oversize) + plan.hot) * plan.ram)


MAKERS: dict[str, Callable[[Lab], Disk]] = {
    "ext4": _ext4,
    "btrfs-zstd": _btrfs("zstd", tree=True),
    "btrfs-lzo": _btrfs("lzo", tree=False),
    "zram": _zram,
}
