"""Read what is mounted on this machine (``/proc/self/mountinfo``)."""

import os
import re
from dataclasses import dataclass

from cleanfs.linux import syscalls

FS_TYPE = "fuse.cleanfs"

MOUNTINFO = "/proc/self/mountinfo"

LOCAL_FILE_SYSTEMS = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "f2fs", "zfs", "bcachefs", "overlay"}
)
"""Types whose inodes, once held, are in this machine's memory, with timestamps from its clock."""

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
"""File system types by ``f_type``; statfs(2) lists the numbers."""


@dataclass(frozen=True, slots=True)
class MountPoint:
    """Holds one line of mountinfo."""

    device: int
    path: str
    fs_type: str
    source: str
    options: str
    """This mount's flags, separated by commas."""
    super_options: str
    """The file system's options."""

    @property
    def owner(self) -> int:
        """Return the user who mounted it, if the file system says so (FUSE does), else root."""
        found = re.search(r"(?:^|,)user_id=([0-9]+)(?:,|$)", self.super_options)
        return int(found[1]) if found else 0


def mount_points() -> list[MountPoint]:
    """Return all mounts that this process sees, in mount order."""
    with open(MOUNTINFO, "rb") as file:
        return parse_mountinfo(file.read())


def parse_mountinfo(content: bytes) -> list[MountPoint]:
    """Parse the lines of mountinfo, as described in proc_pid_mountinfo(5).

    Only a newline ends a line: a path may contain an unescaped carriage return.
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
    """Return the mount at exactly ``path`` (absolute), the topmost if there are several."""
    found = [point for point in mount_points() if point.path == path]
    return found[-1] if found else None


def all_local(directory: str) -> bool:
    """Return whether a directory (absolute, resolved) and all mounts below it are local."""
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
    """Return whether an open directory is the root of its file system and of its mount."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
        mount_id = info.read().partition("mnt_id:")[2].split()[0]
    with open(MOUNTINFO, "rb") as file:
        lines = [line.split(" ") for line in os.fsdecode(file.read()).split("\n")]
    path = os.readlink(f"/proc/self/fd/{fd}")
    return any(line[0] == mount_id and (line[3], _unescape(line[4])) == ("/", path) for line in lines)


class FileSystemTypes:
    """Maps ``st_dev`` to the file system type; empty where neither mountinfo nor ``learn`` has one.

    mountinfo lacks the subvolumes of btrfs, each of which has its own device number. In a chroot it
    lacks all that is mounted outside, even the file system of the root, unless that is a mount point.

    Look up only file systems that are held open. The map remembers only those: once a file system is
    unmounted, another may get its device number.
    """

    def __init__(self) -> None:
        """Start empty: mountinfo is read at the first lookup."""
        self._types: dict[int, str] = {}

    def __getitem__(self, device: int) -> str:
        """Return the type of the file system with that device number."""
        fs_type = self._types.get(device)
        if fs_type is None:
            found = [point.fs_type for point in mount_points() if point.device == device]
            fs_type = self._types[device] = found[-1] if found else ""
        return fs_type

    def learn(self, device: int, magic: int) -> None:
        """Fall back on a file system's own ``file_system_magic`` where mountinfo lacks it."""
        if not self[device]:
            self._types[device] = MAGIC.get(magic, "")


def _unescape(field: str) -> str:
    """Undo mountinfo's octal escapes of space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
