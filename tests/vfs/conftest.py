"""Provide an inode table over a small tree."""

# ruff: noqa: SLF001  # invariants are checked on private tables

from collections.abc import Iterator
from pathlib import Path

import pytest

from cleanfs.vfs.node_ids import ROOT
from tests.vfs.inode_rig import Rig, open_fds


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Make a table with files a, b, c, a symbolic link and a directory. No fd may leak."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a", "b", "c"):
        (source / name).write_text(name)
    (source / "link").symlink_to("a")
    (source / "dir").mkdir()
    (source / "dir" / "x").write_text("x")
    before = open_fds()
    made = Rig(source)
    yield made
    nodes = made.table._nodes
    assert all(inode.node == node for node, inode in nodes.items())
    assert set(made.table._index) <= set(nodes.values())
    held = {inode.node for inode in nodes.values() if inode.fd >= 0 and inode.node != ROOT}
    assert set(made.table._held) == held
    made.table.close()
    assert open_fds() == before
