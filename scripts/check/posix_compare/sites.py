"""Make the sites of cases: a plain directory, and a mount of another one on the same file system."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.harness import mounting

DISK_MIB = 2048
LIFETIME_SECONDS = 7200.0
"""After which a daemon is killed, should we hang on its mount."""


@dataclass(frozen=True, slots=True)
class Site:
    """Holds a directory for cases, and where what they leave is looked at."""

    top: Path
    views: dict[str, Path]
    writeback: bool = False


@contextmanager
def sites(base: Path | None, options: tuple[str, ...]) -> Iterator[tuple[Site, Site]]:
    """Make the plain one, and the one on a mount with these options."""
    with ExitStack() as stack:
        scratch = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="posix-compare-", dir=base))
        )
        scratch.chmod(0o755)
        disk = stack.enter_context(_disk(scratch)) if base is None else scratch
        plain, source = disk / "plain", disk / "source"
        mountpoint = scratch / "mnt"
        for directory in (plain, source, mountpoint):
            directory.mkdir()
            directory.chmod(0o755)
        for site in (plain, source):
            (site / "second").mkdir()
            tmpfs = ("-t", "tmpfs", "-o", "size=16m", "posix-compare")
            stack.enter_context(_mount(site / "second", *tmpfs))
            (site / "second").chmod(0o777)
        options = ("--allow-other", "-o", "suid,dev", *options)
        mounting.LIFETIME = LIFETIME_SECONDS
        stack.enter_context(mounting.mounted(source, mountpoint, *options))
        writeback = "--writeback" in options
        yield (
            Site(plain, {"plain": plain}),
            Site(mountpoint, {"mount": mountpoint, "source": source}, writeback),
        )


@contextmanager
def _disk(scratch: Path) -> Iterator[Path]:
    """Make an ext4 of our own."""
    image, where = scratch / "image", scratch / "disk"
    with image.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    _call("mkfs.ext4", "-q", str(image))
    where.mkdir()
    with _mount(where, "-o", "loop", str(image)):
        yield where


@contextmanager
def _mount(where: Path, *args: str) -> Iterator[None]:
    _call("mount", *args, str(where))
    try:
        yield
    finally:
        if subprocess.run(
            ["umount", str(where)], check=False, timeout=60, stderr=subprocess.DEVNULL
        ).returncode:
            _call("umount", "-l", str(where))


def _call(*command: str) -> None:
    done = subprocess.run(command, check=False, timeout=120, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"posix-compare: {' '.join(command)}: {done.stderr.strip()}")
