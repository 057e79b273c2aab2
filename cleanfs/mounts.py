"""What is mounted on this machine (``/proc/self/mountinfo``)."""

import os
import re
from dataclasses import dataclass

FS_TYPE = "fuse.cleanfs"

LOCAL_FILE_SYSTEMS = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "f2fs", "zfs", "bcachefs", "overlay"}
)
"""Types whose inodes, once held, are in this machine's memory, and whose stamps are of its clock."""


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of mountinfo."""

    device: int
    path: str
    fs_type: str
    source: str


def mount_points() -> list[MountPoint]:
    """All mounts that this process sees, in mount order."""
    points = []
    # Paths hold any bytes, and a carriage return, unlike a newline, is not escaped.
    with open(
        "/proc/self/mountinfo", newline="\n", encoding="utf-8", errors="surrogateescape"
    ) as lines:
        for line in lines:
            before, after = line.rstrip("\n").split(" - ", 1)
            fields, (fs_type, source, *_) = before.split(" "), after.split(" ")
            major, minor = map(int, fields[2].split(":"))
            points.append(
                MountPoint(os.makedev(major, minor), _unescape(fields[4]), fs_type, _unescape(source))
            )
    return points


def mounted_at(path: str) -> MountPoint | None:
    """The mount whose mount point is exactly ``path`` (absolute), the topmost if several."""
    found = [point for point in mount_points() if point.path == path]
    return found[-1] if found else None


def all_local(directory: str) -> bool:
    """Whether a directory (absolute, resolved) and all that is mounted below it is local."""
    below = directory.rstrip("/") + "/"
    types = {point.fs_type for point in mount_points() if point.path.startswith(below)}
    types.add(FileSystemTypes()[os.stat(directory).st_dev])
    return types <= LOCAL_FILE_SYSTEMS


class FileSystemTypes:
    """File system type by ``st_dev``; empty where mountinfo has none (a btrfs subvolume)."""

    def __init__(self) -> None:
        """Read when first asked."""
        self._types: dict[int, str] = {}

    def __getitem__(self, device: int) -> str:
        """The type of the file system of that device."""
        fs_type = self._types.get(device)
        if fs_type is None:
            self._types = {point.device: point.fs_type for point in mount_points()}
            fs_type = self._types.setdefault(device, "")
        return fs_type


def _unescape(field: str) -> str:
    """Undo mountinfo's octal escapes of space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
