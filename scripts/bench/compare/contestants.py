"""Say what is compared, and how each is mounted.

A contestant mounts a source inside a control group and gives the path to read from.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.harness.uring import UnavailableError, enabled

from .cgroups import Group
from .disks import unmount
from .machine import MIB, SkippedError, call, need

Mount = Callable[[Group, Path, Path], AbstractContextManager[Path]]
CLEANFS = (sys.executable, "-P", "-m", "cleanfs")

SPARE = 116
"""MiB of equal RAM that are not for cleanfs's pool: daemon, page caches, workload."""


@contextmanager
def nothing(_: Group, source: Path, mountpoint: Path) -> Iterator[Path]:
    """Mount nothing: measure the source itself."""
    yield source


def cleanfs_of(checkout: Path) -> tuple[str, ...]:
    """Return another checkout's command. Raises SkippedError if it would run other code."""
    python = ("env", f"PYTHONPATH={checkout}", str(checkout / ".venv/bin/python"), "-P")
    found = call(*python, "-c", "import cleanfs; print(cleanfs.__file__)").strip()
    if not Path(found).is_relative_to(checkout):
        raise SkippedError(f"{checkout}: its Python imports {found}")
    return (*python, "-m", "cleanfs")


def cleanfs(*options: str, command: tuple[str, ...] = CLEANFS) -> Mount:
    """Mount cleanfs with these options."""

    @contextmanager
    def mount(group: Group, source: Path, mountpoint: Path) -> Iterator[Path]:
        mountpoint.mkdir(parents=True, exist_ok=True)
        try:
            call(*group.inside(*command, "mount", *options, source, mountpoint))
            yield mountpoint
        finally:
            unmount(mountpoint)

    return mount


def uring(*options: str) -> Mount:
    """A cleanfs mount whose requests come by FUSE over io_uring."""
    plain = cleanfs("--transport", "uring", *options)

    @contextmanager
    def mount(group: Group, source: Path, mountpoint: Path) -> Iterator[Path]:
        with ExitStack() as stack:
            try:
                with enabled():
                    made = stack.enter_context(plain(group, source, mountpoint))
            except UnavailableError as exc:
                raise SkippedError(str(exc)) from exc
            yield made

    return mount


def cleanfs_within(memory: int, *options: str, spare: int = SPARE) -> Mount:
    """Choose the largest pool that leaves so many MiB for process, page caches, workload and kernel."""
    pool = memory // MIB - spare
    return cleanfs("--pool-limit", f"{pool}M", "--page-cache", "8M", *options)


def mergerfs(files: str) -> Mount:
    """Mount mergerfs; ``files`` is its cache.files."""

    @contextmanager
    def mount(group: Group, source: Path, mountpoint: Path) -> Iterator[Path]:
        need("mergerfs")
        mountpoint.mkdir(parents=True, exist_ok=True)
        options = f"cache.files={files},minfreespace=0"
        try:
            call(*group.inside("mergerfs", "-o", options, source, mountpoint))
            yield mountpoint
        finally:
            unmount(mountpoint)

    return mount


@contextmanager
def bindfs(group: Group, source: Path, mountpoint: Path) -> Iterator[Path]:
    """Mount bindfs."""
    need("bindfs")
    mountpoint.mkdir(parents=True, exist_ok=True)
    try:
        call(*group.inside("bindfs", "--multithreaded", source, mountpoint))
        yield mountpoint
    finally:
        unmount(mountpoint)


@contextmanager
def rclone(group: Group, source: Path, mountpoint: Path) -> Iterator[Path]:
    """Mount rclone with its cache of whole files, on the source's disk: there is no other."""
    need("rclone")
    mountpoint.mkdir(parents=True, exist_ok=True)
    cache = source.parent / "rclone-cache"
    try:
        call(*group.inside(
            "rclone", "mount", source, mountpoint, "--daemon", "--vfs-cache-mode", "full",
            "--cache-dir", cache, "--config", source.parent / "rclone.conf", "--no-modtime",
        ))  # fmt: skip
        yield mountpoint
    finally:
        unmount(mountpoint)
        shutil.rmtree(cache, ignore_errors=True)


@dataclass(frozen=True)
class Contestant:
    """Holds a name, the disk that it reads, and its mount."""

    name: str
    disk: str
    mount: Mount


DENSE = "cleanfs, zstd:3+dict"
OWN = "cleanfs, own evictions"
NATIVE = "page cache alone (ext4)"
BTRFS_ZSTD = "btrfs, zstd"
BTRFS_LZO = "btrfs, lzo"
WITHOUT = "cleanfs, no backend"
MERGERFS = "mergerfs"
RCLONE = "rclone, VFS cache"
ZRAM = "ext4 on zram (ceiling)"


def equal_ram(memory: int, spare: int = SPARE) -> list[Contestant]:
    """Return those that get the same RAM; ``spare``: MiB of it that are not for cleanfs's pool."""
    return [
        Contestant(NATIVE, "ext4", nothing),
        Contestant("cleanfs", "ext4", cleanfs_within(memory, spare=spare)),
        Contestant(OWN, "ext4", cleanfs_within(memory, "--evictions", "own", spare=spare)),
        Contestant(DENSE, "ext4", cleanfs_within(memory, "--compression", "zstd:3+dict", spare=spare)),
        Contestant(BTRFS_ZSTD, "btrfs-zstd", nothing),
        Contestant(BTRFS_LZO, "btrfs-lzo", nothing),
        Contestant(WITHOUT, "ext4", cleanfs_within(memory, "--backend", "none", spare=spare)),
        Contestant(MERGERFS, "ext4", mergerfs("auto-full")),
        Contestant(RCLONE, "ext4", rclone),
        Contestant(ZRAM, "zram", nothing),
    ]
