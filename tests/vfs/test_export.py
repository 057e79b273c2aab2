"""Test file handles of the source: composed ones, remembered ones, and failures."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cleanfs.cache.cleancache import Cleancache
from cleanfs.cache.pagecache import PageCache
from cleanfs.cache.resident import make_resident
from cleanfs.fuse.notify import Notifier
from cleanfs.latency import Latencies
from cleanfs.linux import syscalls
from cleanfs.linux.mounts import FileSystemTypes, is_file_system_root
from cleanfs.source import file_handles, listing
from cleanfs.source.errors import StaleError
from cleanfs.source.identity import Rules
from cleanfs.source.io import Backing
from cleanfs.source.listing import ListedEntry
from cleanfs.vfs import export
from cleanfs.vfs.coherency import Coherency, CoherencyChecker
from cleanfs.vfs.export import LAYOUTS, Export
from cleanfs.vfs.handles import Services
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.node_ids import generation_of
from cleanfs.vfs.tree import Tree

EXT4_ROOT = bytes([1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0])
BTRFS_ROOT = bytes([0x4D, 0, 0, 0]) + (256).to_bytes(8, "little") + bytes([5, *[0] * 7, 7, 0, 0, 0])


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    """Make a tree over an empty directory whose inodes are exported."""
    pagecache = PageCache(1 << 20, Cleancache().init_fs(4096), make_resident(4096))
    checker = CoherencyChecker(pagecache, Coherency.NONE)
    services = Services(Backing(), pagecache, checker, FileSystemTypes(), Notifier(), Latencies())
    fd = os.open(tmp_path, os.O_PATH)
    inodes = InodeTable(fd, 64, 64, services.space_retry, Rules(services.types), exports=True)
    os.close(fd)
    yield Tree(services, inodes)
    inodes.close()


def test_handles_are_composed_in_the_layout_of_the_root() -> None:
    [ext4] = [layout for layout in LAYOUTS if layout.fits("ext4", EXT4_ROOT)]
    assert ext4.compose(EXT4_ROOT, 0x1234, 9) == bytes([1, 0, 0, 0, 0x34, 0x12, 0, 0, 9, 0, 0, 0])
    with pytest.raises(StaleError):
        ext4.compose(EXT4_ROOT, 1 << 32, 0)
    [btrfs] = [layout for layout in LAYOUTS if layout.fits("", BTRFS_ROOT)]
    made = btrfs.compose(BTRFS_ROOT, 0x1234, 9)
    assert made == BTRFS_ROOT[:4] + (0x1234).to_bytes(8, "little") + bytes([5, *[0] * 7, 9, 0, 0, 0])


def test_a_handle_of_an_unknown_layout_is_not_composed() -> None:
    tmpfs = bytes([1, 0, 0, 0, *[0] * 12])
    assert not [layout for layout in LAYOUTS if layout.fits("tmpfs", tmpfs)]
    assert not [layout for layout in LAYOUTS if layout.fits("overlay", EXT4_ROOT)]


def test_two_files_of_one_number_have_two_generations() -> None:
    made = {generation_of(EXT4_ROOT[:8] + i.to_bytes(4, "little")) for i in range(100_000)}
    assert len(made) == 100_000


def test_a_directory_below_the_root_of_a_file_system_is_not_a_root(tmp_path: Path) -> None:
    for path, expected in ((tmp_path, False), (Path("/proc"), True)):
        fd = os.open(path, os.O_RDONLY)
        try:
            assert is_file_system_root(fd) is expected
        finally:
            os.close(fd)


async def test_a_file_without_a_handle_is_found_all_the_same(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "no handle")

    (tmp_path / "f").touch()
    Export(tree.services, tree.inodes, tree)
    for module in (syscalls, file_handles):
        monkeypatch.setattr(module, "name_to_handle", fail)
    inode, st = await tree.look_up(tree.inodes.root, b"f")
    assert (inode.handle, st.st_size) == (None, 0)
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        [entry] = listing.stat_names(directory, [b"f"], handles=True)
    finally:
        os.close(directory)
    assert isinstance(entry, ListedEntry)
    assert (entry.handle, entry.stat.st_ino) == (None, st.st_ino)
    tree.inodes.forget(inode.node, 1)
    assert len(tree.inodes) == 1


async def test_an_inode_forgotten_while_fds_run_out_is_not_remembered(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> bool:
        raise OSError(errno.EMFILE, "too many open files")

    (tmp_path / "f").touch()
    exported = Export(tree.services, tree.inodes, tree)
    inode, _ = await tree.look_up(tree.inodes.root, b"f")
    node = inode.node
    with monkeypatch.context() as patch:
        patch.setattr(export, "is_file_system_root", fail)
        tree.inodes.forget(node, 1)
    assert len(tree.inodes) == 1
    with pytest.raises(StaleError):
        await exported.find(node)
