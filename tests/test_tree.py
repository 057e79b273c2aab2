"""The tree of held inodes, on a real directory without a mount."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from cleanfs import namespace
from cleanfs.backing import Backing
from cleanfs.cleancache import Cleancache
from cleanfs.coherency import Coherency, CoherencyChecker
from cleanfs.handles import Services
from cleanfs.inodes import InodeTable
from cleanfs.latency import Latencies
from cleanfs.mounts import FileSystemTypes
from cleanfs.namespace import NewAttributes
from cleanfs.notify import Notifier
from cleanfs.pagecache import PageCache
from cleanfs.resident import make_resident
from cleanfs.tree import Tree


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    """A tree over an empty directory."""
    pagecache = PageCache(1 << 20, Cleancache().init_fs(4096), make_resident(4096))
    checker = CoherencyChecker(pagecache, Coherency.NONE)
    services = Services(Backing(), pagecache, checker, FileSystemTypes(), Notifier(), Latencies())
    fd = os.open(tmp_path, os.O_PATH)
    inodes = InodeTable(fd, 64, 64)
    os.close(fd)
    yield Tree(services, inodes)
    inodes.close()


async def test_a_truncate_is_known_to_those_who_come_while_it_waits(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"x" * 10_000)
    inode, _ = await tree.look_up(tree.inodes.root, b"f")
    started, go_on = threading.Event(), threading.Event()
    truncate = namespace.set_attributes

    def slow(fd: int, io_fd: int, new: NewAttributes) -> tuple[os.stat_result, os.stat_result]:
        started.set()
        assert go_on.wait(10)
        return truncate(fd, io_fd, new)

    monkeypatch.setattr(namespace, "set_attributes", slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tree.set_attributes, inode, -1, NewAttributes(size=5))
        with trio.fail_after(10):
            await trio.to_thread.run_sync(started.wait)
        assert inode.file_key is not None
        file = tree.services.pagecache.known(inode.file_key)
        assert file is not None
        assert file.mutations == 1
        version = file.version
        go_on.set()
    assert file.version > version
    assert (tmp_path / "f").read_bytes() == b"x" * 5


async def test_a_parked_inode_is_found_by_its_place_its_handle_or_its_open_file(
    tree: Tree, tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(b"x")
    inode, st = await tree.look_up(tree.inodes.root, b"f")
    for moved in ("f", "g"):  # at its place; elsewhere, by handle
        (tmp_path / "f").rename(tmp_path / moved)
        tree.inodes.shrink(0)
        assert inode.fd < 0
        async with tree.using(inode.node) as held:
            assert os.fstat(held.fd).st_ino == st.st_ino
    fd = os.open(tmp_path / "g", os.O_RDONLY)
    tree.inodes.opened(inode, fd)
    (tmp_path / "g").unlink()
    tree.inodes.shrink(0)
    assert inode.fd < 0
    async with tree.using(inode.node) as held:
        assert os.fstat(held.fd).st_nlink == 0
    tree.inodes.released(inode, fd)
    os.close(fd)
