"""Test what an inode knows of itself."""

import stat as stat_module

from cleanfs.vfs.inode import Inode
from cleanfs.vfs.node_ids import ROOT


def directory(node: int, parent: Inode | None = None, name: bytes = b"") -> Inode:
    inode = Inode(1, node, stat_module.S_IFDIR, node, 1)
    inode.move(parent, name)
    return inode


def test_a_path_on_the_mount_leads_from_its_root() -> None:
    root = directory(ROOT)
    below = directory(3, directory(2, root, b"a"), b"b")
    assert (root.mount_path(), below.mount_path()) == (b"", b"a/b")


def test_an_inode_without_a_name_has_no_path_nor_has_anything_below_it() -> None:
    lost = directory(2)
    assert directory(3, lost, b"b").mount_path() == lost.mount_path() == b""


def test_directories_that_contain_each_other_have_no_path() -> None:
    """The kernel has looked up one of them before a rename in the source, and one after it."""
    one = directory(2, directory(ROOT), b"a")
    one.move(directory(3, one, b"b"), b"a")
    assert one.mount_path() == b""
