"""Test node ids, on one file system and on several."""

import os
import stat as stat_module
import subprocess

import pytest

from cleanfs.vfs.node_ids import CONTROL_BASE, CONTROL_END, DEVICE_SHIFT, DYNAMIC_BASE
from tests.vfs.inode_rig import Rig, needs_root


def fake_stat(device: int, ino: int) -> os.stat_result:
    return os.stat_result((stat_module.S_IFREG | 0o644, ino, device, 1, 0, 0, 0, 0, 0, 0))


@pytest.mark.parametrize("ino", [0, 1, DYNAMIC_BASE, CONTROL_BASE, CONTROL_END - 1, (1 << 64) - 1])
def test_numbers_reserved_by_fuse_get_dynamic_ids(rig: Rig, ino: int) -> None:
    device = rig.table.root.device
    inode = rig.table.listed(fake_stat(device, ino), rig.table.root, b"f")
    assert inode.node >= DYNAMIC_BASE
    assert inode.node < 1 << 64
    assert not CONTROL_BASE <= inode.node < CONTROL_END


@pytest.mark.parametrize("ino", [2, CONTROL_BASE - 1, CONTROL_END, DYNAMIC_BASE - 1])
def test_all_other_numbers_of_the_first_device_are_node_ids(rig: Rig, ino: int) -> None:
    inode = rig.table.listed(fake_stat(rig.table.root.device, ino), rig.table.root, b"f")
    assert inode.node == ino


def test_node_ids_of_further_devices_contain_their_index_and_are_unique(rig: Rig) -> None:
    here = rig.table.root.device
    nodes = [
        rig.table.listed(fake_stat(device, ino), rig.table.root, b"f").node
        for device in (here, here + 1000, here + 2000)
        for ino in (2, 3, 1 << DEVICE_SHIFT | 3, 2 << DEVICE_SHIFT | 2, (1 << DEVICE_SHIFT) - 1)
    ]
    assert len(set(nodes)) == len(nodes)
    assert nodes[5] == 1 << DEVICE_SHIFT | 2
    assert nodes[10] != 2 << DEVICE_SHIFT | 2, "taken by a number of the first device"


@needs_root
def test_a_mount_below_the_source_is_a_device_of_its_own(rig: Rig) -> None:
    mountpoint = rig.path / "dir"
    subprocess.run(["mount", "-t", "tmpfs", "cleanfs-test", str(mountpoint)], check=True)
    try:
        (mountpoint / "f").write_text("f")
        directory = rig.lookup("dir")
        assert rig.table.wants_mount_fd(directory)
        rig.table.add_mount_fd(directory.device, os.open(directory.path(), os.O_RDONLY))
        f = rig.lookup("f", directory)
        assert not rig.table.wants_mount_fd(f)
        ino = (mountpoint / "f").stat().st_ino
        assert f.device == directory.device != rig.table.root.device
        assert f.node == 1 << DEVICE_SHIFT | ino
        mount_fd = rig.table.mount_fd(f.device)
        assert mount_fd >= 0
        rig.park(f, directory)
        if f.handle:
            os.rename(mountpoint / "f", mountpoint / "g")
            assert rig.refers_to(rig.reopen(f), "dir/g")
    finally:
        rig.table.close()  # closes the fds on the mount
        subprocess.run(["umount", str(mountpoint)], check=True)


def test_an_unknown_device_has_no_mount_fd(rig: Rig) -> None:
    assert rig.table.mount_fd(rig.table.root.device) >= 0
    assert rig.table.mount_fd(987654) == -1
