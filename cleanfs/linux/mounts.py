"""What is mounted on this machine (``/proc/self/mountinfo``)."""

import os
import re
from dataclasses import dataclass

from cleanfs.linux import syscalls

FS_TYPE = "fuse.cleanfs"

MOUNTINFO = "/proc/self/mountinfo"

LOCAL_FILE_SYSTEMS = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "f2fs", "zfs", "bcachefs", "overlay"}
)
"""Types whose inodes, once held, are in this machine's memory, and whose stamps are of its clock."""

MAGIC = {
    0xEF53: "ext4",  # and ext2, ext3
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x01021994: "tmpfs",
    0xF2F52010: "f2fs",
    0x2FC12FC1: "zfs",
    0xCA451A4E: "bcachefs",
    0x794C7630: "overlay",
    0x65735546: "fuse",
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "cifs",  # SMB 2 and later
    0x00C36400: "ceph",
    0x01021997: "9p",
}
"""Types by ``f_type`` of statfs(2), which lists them."""


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of mountinfo."""

    device: int
    path: str
    fs_type: str
    source: str
    options: str
    """Of this mount, with commas between; they are flags."""
    super_options: str
    """Of the file system."""

    @property
    def owner(self) -> int:
        """The user who mounted it, where the file system says so (FUSE does), else root."""
        found = re.search(r"(?:^|,)user_id=([0-9]+)(?:,|$)", self.super_options)
        return int(found[1]) if found else 0


def mount_points() -> list[MountPoint]:
    """All mounts that this process sees, in mount order."""
    with open(MOUNTINFO, "rb") as file:
        return parse_mountinfo(file.read())


def parse_mountinfo(content: bytes) -> list[MountPoint]:
    """The lines of mountinfo, as proc_pid_mountinfo(5) has them.

    A newline ends a line and nothing else does: a path may hold a carriage return as it is.
    """
    points = []
    for line in os.fsdecode(content).split("\n")[:-1]:
        before, after = line.split(" - ", 1)
        fields, (fs_type, source, super_options, *_) = before.split(" "), [*after.split(" "), ""]
        major, minor = map(int, fields[2].split(":"))
        points.append(
            MountPoint(
                os.makedev(major, minor),
                _unescape(fields[4]),
                fs_type,
                _unescape(source),
                fields[5],
                _unescape(super_options),
            )
        )
    return points


def mounted_at(path: str) -> MountPoint | None:
    """The mount whose mount point is exactly ``path`` (absolute), the topmost if several."""
    found = [point for point in mount_points() if point.path == path]
    return found[-1] if found else None


def all_local(directory: str) -> bool:
    """Whether a directory (absolute, resolved) and all that is mounted below it is local."""
    below = directory.rstrip("/") + "/"
    names = {point.fs_type for point in mount_points() if point.path.startswith(below)}
    types = FileSystemTypes()
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        device = os.fstat(fd).st_dev
        types.learn(device, syscalls.file_system_magic(fd))
        names.add(types[device])
    finally:
        os.close(fd)
    return names <= LOCAL_FILE_SYSTEMS


def is_file_system_root(fd: int) -> bool:
    """Whether an open directory is the root of its file system, and of the mount it was opened in."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
        mount_id = info.read().partition("mnt_id:")[2].split()[0]
    with open(MOUNTINFO, "rb") as file:
        lines = [line.split(" ") for line in os.fsdecode(file.read()).split("\n")]
    path = os.readlink(f"/proc/self/fd/{fd}")
    return any(line[0] == mount_id and (line[3], _unescape(line[4])) == ("/", path) for line in lines)


class FileSystemTypes:
    """File system type by ``st_dev``; empty where neither mountinfo nor ``learn`` has one.

    mountinfo lacks the subvolumes of btrfs, each of which is a device of its own, and whatever is
    mounted outside of a chroot: also the file system of its root, if that is no mount point.

    Ask for file systems that are held, and remembered are only those that were asked for: of one that
    is unmounted the next may get the number.
    """

    def __init__(self) -> None:
        """Read when first asked."""
        self._types: dict[int, str] = {}

    def __getitem__(self, device: int) -> str:
        """The type of the file system of that device."""
        fs_type = self._types.get(device)
        if fs_type is None:
            found = [point.fs_type for point in mount_points() if point.device == device]
            fs_type = self._types[device] = found[-1] if found else ""
        return fs_type

    def learn(self, device: int, magic: int) -> None:
        """Take what a file system says itself (``file_system_magic``) where mountinfo says nothing."""
        if not self[device]:
            self._types[device] = MAGIC.get(magic, "")


def _unescape(field: str) -> str:
    """Undo mountinfo's octal escapes of space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
