"""What is mounted where, as mountinfo writes it."""

from pathlib import Path

import pytest

from cleanfs import mounts
from cleanfs.mounts import FileSystemTypes, MountPoint, mount_points

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
def test_a_path_may_hold_any_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, path: str
) -> None:
    info = tmp_path / "mountinfo"
    lines = [LINE.format(path=written, source="x"), LINE.format(path="/next", source=written)]
    info.write_bytes("".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape"))
    monkeypatch.setattr(mounts, "MOUNTINFO", str(info))
    device = 98 << 8
    assert mount_points() == [
        MountPoint(device, path, "ext4", "/dev/x"),
        MountPoint(device, "/next", "ext4", "/dev/" + path),
    ]


def test_a_number_that_was_anothers_has_the_type_of_the_new_one(
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
