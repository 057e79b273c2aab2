"""Test the tree of held inodes on a real directory, without a mount."""

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyfuse3
import pytest
import trio

from cleanfs.cache.cleancache import Cleancache
from cleanfs.cache.pagecache import PageCache
from cleanfs.cache.resident import make_resident
from cleanfs.fuse import notify
from cleanfs.fuse.notify import Notifier
from cleanfs.latency import Latencies
from cleanfs.linux.mounts import FileSystemTypes
from cleanfs.source import attributes, namespace
from cleanfs.source.attributes import NewAttributes
from cleanfs.source.identity import Rules
from cleanfs.source.inline_policy import SLOW_SECONDS
from cleanfs.source.io import Backing
from cleanfs.vfs.coherency import Coherency, CoherencyChecker
from cleanfs.vfs.handles import Services
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.tree import Tree
from tests.harness.unserved import fuse_mount


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    """Make a tree over an empty directory."""
    pagecache = PageCache(1 << 20, Cleancache().init_fs(4096), make_resident(4096))
    checker = CoherencyChecker(pagecache, Coherency.NONE)
    services = Services(Backing(), pagecache, checker, FileSystemTypes(), Notifier(), Latencies())
    fd = os.open(tmp_path, os.O_PATH)
    inodes = InodeTable(fd, 64, 64, services.space_retry, Rules(services.types))
    os.close(fd)
    yield Tree(services, inodes)
    inodes.close()


async def test_a_truncate_is_visible_as_a_mutation_while_it_waits(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"x" * 10_000)
    inode, _ = await tree.look_up(tree.inodes.root, b"f")
    started, release = threading.Event(), threading.Event()
    truncate = attributes.set_attributes

    def slow(fd: int, io_fd: int, new: NewAttributes) -> tuple[os.stat_result, os.stat_result]:
        started.set()
        assert release.wait(10)
        return truncate(fd, io_fd, new)

    monkeypatch.setattr(attributes, "set_attributes", slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tree.set_attributes, inode, -1, NewAttributes(size=5))
        with trio.fail_after(10):
            await trio.to_thread.run_sync(started.wait)
        assert inode.file_key is not None
        file = tree.services.pagecache.known(inode.file_key)
        assert file is not None
        assert file.mutations == 1
        version = file.version
        release.set()
    assert file.version > version
    assert (tmp_path / "f").read_bytes() == b"x" * 5


async def test_the_size_of_a_small_file_is_changed_inline_where_that_does_not_wait(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_threads = 0
    in_thread = tree.services.backing.in_thread

    async def count(*args: object) -> object:
        nonlocal in_threads
        in_threads += 1
        return await in_thread(*args)  # type: ignore[arg-type]  # it passes them on

    for name, size in (("small", 10_000), ("large", 2 << 20)):
        (tmp_path / name).write_bytes(b"x" * size)
    small, _ = await tree.look_up(tree.inodes.root, b"small")
    large, _ = await tree.look_up(tree.inodes.root, b"large")
    monkeypatch.setattr(tree.services.backing, "in_thread", count)
    policy = tree.services.source_fs(small).sizes
    for inode, is_inline, expected in ((small, False, 1), (large, True, 2), (small, True, 2)):
        policy.inline = is_inline
        policy.returned()
        await tree.set_attributes(inode, -1, NewAttributes(size=5))
        assert in_threads == expected
    assert (tmp_path / "small").read_bytes() == b"x" * 5


async def test_a_parked_inode_is_found_by_its_path_its_handle_or_its_open_file(
    tree: Tree, tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(b"x")
    inode, st = await tree.look_up(tree.inodes.root, b"f")
    for moved in ("f", "g"):  # by its path; moved, by handle
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
    with tree.inodes.closing(inode, fd):
        pass
    os.close(fd)


@pytest.mark.parametrize("kind", [stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO])
async def test_a_creation_is_undone_and_repeated_if_fds_run_out(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    lookup, calls = namespace.lookup, list[bytes]()

    def fail_once(parent_fd: int, name: bytes) -> namespace.Opened:
        calls.append(name)
        if len(calls) == 1:
            assert os.path.lexists(tmp_path / "new")
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return lookup(parent_fd, name)

    monkeypatch.setattr(namespace, "lookup", fail_once)
    actor = namespace.Actor(os.getuid(), os.getgid())
    _, st = await tree.make(tree.inodes.root, b"new", kind | 0o700, 0, b"target", actor)
    assert stat.S_IFMT(st.st_mode) == kind
    assert len(calls) == 2


async def test_names_are_dropped_until_the_table_is_within_its_bound(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few thread calls must suffice: with one for each name, programs outran the drops."""
    run_sync, hops = trio.to_thread.run_sync, list[object]()

    async def counted(call: Callable[..., object], *args: object, **options: object) -> object:
        hops.extend([call] * (call.__module__ == notify.__name__))
        return await run_sync(call, *args, **options)  # type: ignore[arg-type]  # passed on

    for i in range(1000):
        (tmp_path / f"{i}").touch()

    def drop(node: int, name: bytes) -> None:
        dropped.append(name)

    async def look_up_and_forget() -> None:
        for i in range(1000):
            await tree.look_up(tree.inodes.root, b"%d" % i)
        while len(tree.inodes) > tree.inodes.max_inodes:
            await trio.sleep(0.001)
            for name in dropped:
                inode = tree.inodes.find(os.stat(tmp_path / os.fsdecode(name)))
                if inode is not None:
                    tree.inodes.forget(inode.node, inode.nlookup)
            dropped.clear()

    dropped = list[bytes]()
    monkeypatch.setattr(pyfuse3, "invalidate_entry", drop)
    monkeypatch.setattr(trio.to_thread, "run_sync", counted)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tree.keep_bounded)
            await look_up_and_forget()
            nursery.cancel_scope.cancel()
    assert 0 < len(hops) < 20


async def test_a_name_unknown_to_the_kernel_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dropped = list[bytes]()

    def drop(node: int, name: bytes) -> None:
        if name == b"gone":
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        dropped.append(name)

    monkeypatch.setattr(pyfuse3, "invalidate_entry", drop)
    await Notifier().drop_names([(1, b"a"), (1, b"gone"), (1, b"b")])
    assert dropped == [b"a", b"b"]


@pytest.fixture
def threads(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Record the calls made in threads for a tree whose calls on names were fast so far."""
    run_sync, calls = trio.to_thread.run_sync, list[object]()

    async def counted(call: Callable[..., object], *args: object, **options: object) -> object:
        calls.append(args[0] if callable(args[0]) else call)
        return await run_sync(call, *args, **options)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(trio.to_thread, "run_sync", counted)
    monkeypatch.setattr("cleanfs.source.inline_policy.RECENT_SECONDS", 60)
    monkeypatch.setattr("cleanfs.source.inline_policy.FAST_SECONDS", 0)
    fs = tree.services.source_fs(tree.inodes.root)
    for policy in (fs.lookups, fs.names):
        policy.inline = True
        policy.returned()
    return calls


DAEMON = namespace.Actor(os.geteuid(), os.getegid(), local=True)


async def test_calls_on_names_that_do_not_wait_are_inline(
    tree: Tree, tmp_path: Path, threads: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cleanfs.source.io._sleeps", lambda: 0)  # a busy machine may sleep
    root = tree.inodes.root
    await tree.make(root, b"d", stat.S_IFDIR | 0o700, 0, b"", DAEMON)
    with pytest.raises(FileNotFoundError):
        await tree.look_up(root, b"absent")
    opened, _, _ = await tree.create(root, b"f", 0o600, os.O_RDWR, DAEMON)
    os.close(opened.fd)
    fd = root.fd
    await tree.change_names(root, DAEMON, namespace.rename, fd, b"f", fd, b"g", 0)
    await tree.change_names(root, DAEMON, namespace.rmdir, fd, b"d")
    assert os.listdir(tmp_path) == ["g"]
    assert threads == []


@pytest.mark.skipif(os.geteuid() != 0, reason="this takes root")
async def test_the_main_thread_does_not_act_as_another_user(
    tree: Tree, tmp_path: Path, threads: list[object]
) -> None:
    other_user = namespace.Actor(12345, 23456, local=True)
    os.chmod(tmp_path, 0o777)
    await tree.make(tree.inodes.root, b"d", stat.S_IFDIR | 0o700, 0, b"", other_user)
    assert os.stat(tmp_path / "d").st_uid == 12345
    assert threads == [namespace.make_node]


async def test_a_wait_for_names_is_not_followed_by_another_on_the_main_thread(
    tree: Tree, threads: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree.inodes.root
    here = namespace.lookup_here

    def slow(parent_fd: int, name: bytes) -> namespace.Opened:
        time.sleep(2 * SLOW_SECONDS)
        return here(parent_fd, name)

    monkeypatch.setattr(namespace, "lookup_here", slow)
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            await tree.run_on_names(root, slow, root.fd, b"absent")
    assert threads == [slow, slow]


@pytest.mark.skipif(os.geteuid() != 0, reason="this takes root")
async def test_the_main_thread_never_calls_a_file_system_mounted_on_a_name(
    tree: Tree, tmp_path: Path, threads: list[object]
) -> None:
    root = tree.inodes.root
    for name in ("mounted", "other"):
        (tmp_path / name).mkdir()
    with fuse_mount(tmp_path / "mounted"):
        fd = root.fd
        for change in (
            tree.change_names(root, DAEMON, namespace.rmdir, fd, b"mounted"),
            tree.change_names(root, DAEMON, namespace.rename, fd, b"mounted", fd, b"new", 0),
            tree.change_names(root, DAEMON, namespace.rename, fd, b"other", fd, b"mounted", 0),
        ):
            with pytest.raises(OSError, match="busy"):
                await change
        assert threads == []
        with trio.move_on_after(0.1) as limit:
            await tree.look_up(root, b"mounted")
        assert limit.cancelled_caught, "no process serves the mount"
        assert threads == [namespace.lookup]
