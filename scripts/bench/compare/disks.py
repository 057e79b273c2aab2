"""Make disks of our own: files as loop devices with ext4 or btrfs, and compressed RAM (zram)."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .machine import MIB, SkippedError, call, need


@dataclass(frozen=True)
class DiskClass:
    """Says what a throttled disk gives; 0: as much as there is."""

    name: str
    iops: int
    bytes_per_second: int


HARD_DISK = DiskClass("150 IOPS/150 MB/s disk", 150, 150_000_000)
CLOUD_DISK = DiskClass("3000 IOPS/125 MB/s disk", 3000, 125_000_000)
UNTHROTTLED = DiskClass("unthrottled disk", 0, 0)


@dataclass(frozen=True)
class Disk:
    """Is a block device with a file system on it."""

    device: Path
    options: str = ""

    @property
    def _sys(self) -> Path:
        return Path("/sys/block") / self.device.name

    @property
    def number(self) -> str:
        """Return MAJ:MIN."""
        return (self._sys / "dev").read_text().strip()

    @property
    def read_mib(self) -> float:
        """Return how much was read from it so far."""
        return int((self._sys / "stat").read_text().split()[2]) / 2048

    @property
    def ram_bytes(self) -> int:
        """Return the RAM that holds the data: zram only."""
        stat = self._sys / "mm_stat"
        return int(stat.read_text().split()[2]) if stat.exists() else 0

    @contextmanager
    def mounted(self, where: Path) -> Iterator[Path]:
        """Mount it; nothing of it is in RAM at the start."""
        where.mkdir(parents=True, exist_ok=True)
        options = ["-o", f"noatime,{self.options}".rstrip(",")]
        call("mount", *options, self.device, where)
        try:
            yield where
        finally:
            unmount(where)


def unmount(where: Path) -> None:
    """Unmount what we mounted, also when somebody is slow to let go of it."""
    for _ in range(40):
        if not os.path.ismount(where):
            return
        try:
            call("umount", where)
        except SkippedError:
            time.sleep(0.25)
    call("umount", "-l", where)


@contextmanager
def loop_disk(image: Path, size: int, kind: str, options: str = "") -> Iterator[Disk]:
    """Make a file system of that kind in an image file, read past the page cache of the image."""
    need(f"mkfs.{kind}", "losetup")
    if shutil.disk_usage(image.parent).free < size // 2:
        raise SkippedError(f"less than {size // 2 // MIB:,} MiB free in {image.parent}")
    with image.open("wb") as file:
        file.truncate(size)
    call("losetup", "--find")
    try:
        device = Path(call("losetup", "--direct-io=on", "--find", "--show", image).strip())
    except SkippedError:
        device = Path(call("losetup", "--find", "--show", image).strip())
    try:
        quiet = ["-q", "-i", "8192"] if kind == "ext4" else ["-q", "-m", "single"]
        call(f"mkfs.{kind}", *quiet, device)
        yield Disk(device, options)
    finally:
        call("losetup", "-d", device)
        image.unlink()


@contextmanager
def zram_disk(size: int) -> Iterator[Disk]:
    """Make an ext4 in compressed RAM."""
    try:
        number = int(Path("/sys/class/zram-control/hot_add").read_text())
    except OSError as exc:
        raise SkippedError(f"no zram here: {exc}") from exc
    disk = Disk(Path(f"/dev/zram{number}"))
    sys = Path(f"/sys/block/zram{number}")
    made = False
    try:
        (sys / "comp_algorithm").write_text("lz4")
        (sys / "disksize").write_text(str(size))
        if not disk.device.exists():
            major, minor = map(int, disk.number.split(":"))
            os.mknod(disk.device, 0o600 | 0o060000, os.makedev(major, minor))
            made = True
        call("mkfs.ext4", "-q", "-E", "nodiscard", disk.device)
        yield disk
    except OSError as exc:
        raise SkippedError(f"zram: {exc}") from exc
    finally:
        (sys / "reset").write_text("1")
        Path("/sys/class/zram-control/hot_remove").write_text(str(number))
        if made:
            disk.device.unlink(missing_ok=True)
