"""Test the parser of mountinfo and the types of file systems."""

import os
from pathlib import Path

import pytest

from cleanfs.linux import mounts, syscalls
from cleanfs.linux.mounts import FileSystemTypes, MountPoint, mount_points

LINE = "36 35 98:0 / {path} rw,noatime shared:1 - ext4 /dev/{source} rw,errors=continue"


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("/mnt/a", "/mnt/a"),
        (r"/mnt/a\040b\011c\012d\134e\043f", "/mnt/a b\tc\nd\\e#f"),
        ("/mnt/a\rb", "/mnt/a\rb"),
        ("/mnt/a\x0b\x0c\x1c\x85\u2028b", "/mnt/a\x0b\x0c\x1c\x85\u2028b"),
        ("/mnt/\udcff", "/mnt/\udcff"),
    ],
)
def test_a_path_may_contain_any_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, path: str
) -> None:
    info = tmp_path / "mountinfo"
    lines = [LINE.format(path=written, source="x"), LINE.format(path="/next", source=written)]
    info.write_bytes("".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape"))
    monkeypatch.setattr(mounts, "MOUNTINFO", str(info))
    device = 98 << 8
    assert mount_points() == [
        MountPoint(device, path, "ext4", "/dev/x", "rw,noatime", "rw,errors=continue"),
        MountPoint(device, "/next", "ext4", "/dev/" + path, "rw,noatime", "rw,errors=continue"),
    ]


def test_a_reused_device_number_has_the_type_of_the_new_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "mountinfo"
    monkeypatch.setattr(mounts, "MOUNTINFO", str(info))
    root = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
    info.write_text(root + "2 1 0:45 / /elsewhere rw - tmpfs none rw\n")
    types = FileSystemTypes()
    assert types[8 << 8 | 1] == "ext4"
    info.write_text(root + "3 1 0:45 / /source/below rw - fuse.sshfs server: rw\n")
    assert types[45] == "fuse.sshfs"
    assert types[99] == ""


def test_a_file_system_that_mountinfo_lacks_is_known_by_its_magic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is missing in a chroot whose root is no mount point, and for a btrfs subvolume."""
    expected = mounts.FileSystemTypes()[tmp_path.stat().st_dev]
    info = tmp_path / "mountinfo"
    info.write_text("1 0 0:99 / /proc rw - proc proc rw\n")
    monkeypatch.setattr(mounts, "MOUNTINFO", str(info))
    types, device = FileSystemTypes(), tmp_path.stat().st_dev
    assert types[device] == ""
    fd = os.open(tmp_path, os.O_PATH)
    magic = syscalls.file_system_magic(fd)
    os.close(fd)
    types.learn(device, magic)
    assert types[device] == expected
    assert mounts.all_local(str(tmp_path)) is (expected in mounts.LOCAL_FILE_SYSTEMS)


def test_mountinfo_takes_precedence_over_the_magic_number() -> None:
    types, [proc] = (
        FileSystemTypes(),
        {point.device for point in mount_points() if point.path == "/proc"},
    )
    types.learn(proc, 0xEF53)
    assert types[proc] == "proc"
    types.learn(1 << 40, 0x12345)
    assert types[1 << 40] == ""
