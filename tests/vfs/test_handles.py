"""What an open file tells the source, and the kernel, when descriptors of it are closed."""

import contextlib
import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from pyfuse3 import (
    FileHandleT,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    RequestContext,
    XAttrNameT,
)
from trio.testing import wait_all_tasks_blocked

from cleanfs.cache.cleancache import Cleancache
from cleanfs.cache.pagecache import PageCache
from cleanfs.cache.pending_writes import PendingWrite
from cleanfs.cache.resident import make_resident
from cleanfs.fs.control import Control, Operator
from cleanfs.fs.operations import CleanFS
from cleanfs.fuse.notify import Notifier
from cleanfs.fuse.refused_replies import RefusedReplies
from cleanfs.latency import Latencies
from cleanfs.linux import mounts
from cleanfs.linux.mounts import FileSystemTypes, all_local
from cleanfs.source import attributes, listing, namespace
from cleanfs.source.errors import HalfDoneError
from cleanfs.source.file import SourceFile
from cleanfs.source.identity import Rules
from cleanfs.source.io import Backing
from cleanfs.source.space_retry import SpaceRetry
from cleanfs.vfs.coherency import Coherency, CoherencyChecker
from cleanfs.vfs.handles import DirHandle, Services
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.kernel_view import NOT_TOLD


@pytest.fixture
def services() -> Services:
    pagecache = PageCache(1 << 20, Cleancache().init_fs(4096), make_resident(4096))
    checker = CoherencyChecker(pagecache, Coherency.NONE)
    return Services(Backing(), pagecache, checker, FileSystemTypes(), Notifier(), Latencies())


@pytest.fixture
def inodes(tmp_path: Path) -> Iterator[InodeTable]:
    (tmp_path / "f").write_bytes(b"text")
    fd = os.open(tmp_path, os.O_PATH)
    table = InodeTable(fd, 64, 64, SpaceRetry(), Rules(FileSystemTypes()))
    os.close(fd)
    yield table
    table.close()


async def opened(
    services: Services, inodes: InodeTable, flags: int = os.O_RDWR
) -> tuple[CleanFS, FileHandleT]:
    """A file system with a file that is open for writing."""
    control = Control(cast(Operator, NoOperator()))
    fs = CleanFS(services, inodes, control, RefusedReplies(), attr_timeout=1)
    ctx = cast(RequestContext, SimpleNamespace(uid=0, pid=1))
    entry = await fs.lookup(inodes.root.node, b"f", ctx)
    info = await fs.open(entry.st_ino, FlagT(flags), ctx)
    return fs, FileHandleT(info.fh)


class NoOperator:
    """What a control directory that nobody looks at needs."""

    stats = set_backend = set_log_level = options = drop = None


async def test_a_close_is_passed_on(
    services: Services, inodes: InodeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, fh = await opened(services, inodes)
    flushed: list[int] = []
    monkeypatch.setattr(namespace, "flush", flushed.append)
    await fs.flush(fh)
    assert await fs.write(fh, 0, b"new") == 3
    assert len(flushed) == 1
    await fs.release(fh)


async def test_where_it_reports_nothing_the_kernel_need_not_ask(
    services: Services, inodes: InodeTable
) -> None:
    fs, fh = await opened(replace(services, flushless=True), inodes)
    with pytest.raises(FUSEError) as caught:
        await fs.flush(fh)
    assert caught.value.errno == errno.ENOSYS
    await fs.release(fh)


async def test_a_write_reports_what_a_close_would_where_none_is_asked_any_more(
    services: Services, inodes: InodeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server's file system that was mounted below the source after us."""
    fs, fh = await opened(replace(services, flushless=True), inodes)
    monkeypatch.setattr("cleanfs.vfs.handles.LOCAL_FILE_SYSTEMS", frozenset())

    def full(fd: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(namespace, "flush", full)
    with pytest.raises(FUSEError) as caught:
        await fs.write(fh, 0, b"new")
    assert caught.value.errno == errno.EDQUOT
    await fs.release(fh)


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDWR | os.O_APPEND])
async def test_a_read_waits_for_the_write_that_came_before_it(
    services: Services, inodes: InodeTable, flags: int
) -> None:
    """The kernel may have dropped the page that it sends us, and would keep the old one."""
    fs, fh = await opened(services, inodes, flags)
    [file] = services.pagecache.files()
    inode = inodes.all()[-1]
    inode.kernel.size_sent(4)
    got: dict[tuple[int, int], bytes] = {}

    one_is_there = trio.Event()

    async def read(offset: int, size: int) -> None:
        got[offset, size] = bytes(await fs.read(fh, offset, size))
        one_is_there.set()

    # Which the write has to wait for.
    async with trio.open_nursery() as nursery, services.pagecache.changing(file):
        nursery.start_soon(fs.write, fh, 4 if flags & os.O_APPEND else 2, b"new")
        await wait_all_tasks_blocked()
        for offset, size in ((0, 10), (4, 1), (0, 2)):
            nursery.start_soon(read, offset, size)
        with trio.fail_after(10):
            await one_is_there.wait()
        await wait_all_tasks_blocked()
        assert got == {(0, 2): b"te"}
    assert got[0, 10] == (b"textnew" if flags & os.O_APPEND else b"tenew")
    assert not file.writes
    await fs.release(fh)


async def test_a_read_does_not_wait_for_a_write_that_failed(
    services: Services, inodes: InodeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, fh = await opened(services, inodes)
    [file] = services.pagecache.files()

    async def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SourceFile, "write_all", full)
    with pytest.raises(FUSEError):
        await fs.write(fh, 0, b"new")
    assert not file.writes
    assert bytes(await fs.read(fh, 0, 10)) == b"text"
    await fs.release(fh)


def test_a_directory_is_local_with_all_that_is_mounted_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all_local(str(tmp_path))
    assert not all_local("/proc")
    below = tmp_path / "below"
    below.mkdir()
    made = subprocess.run(["mount", "-t", "ramfs", "none", below], check=False, timeout=10)
    if made.returncode:
        pytest.skip("mounting needs root")
    try:
        assert "ramfs" not in mounts.LOCAL_FILE_SYSTEMS
        assert not all_local(str(tmp_path))
        monkeypatch.setattr(mounts, "LOCAL_FILE_SYSTEMS", mounts.LOCAL_FILE_SYSTEMS | {"ramfs"})
        assert all_local(str(tmp_path))
    finally:
        subprocess.run(["umount", below], check=True, timeout=10)


async def test_a_read_that_waits_for_two_writes_is_not_late_for_the_second() -> None:
    first, second = PendingWrite(0, 10), PendingWrite(0, 10)

    async def read() -> None:
        for write in (first, second):
            await write.wait()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            first.end()
            second.end()


@pytest.mark.parametrize(("uid", "may"), [(0, True), (1234, True), (1235, False)])
async def test_lists_of_other_file_systems_are_their_owners_to_change(
    services: Services, inodes: InodeTable, monkeypatch: pytest.MonkeyPatch, uid: int, may: bool
) -> None:
    """NFS, CIFS and NTFS have lists that the kernel does not check for us."""
    fs, fh = await opened(services, inodes)
    inode = inodes.all()[-1]
    inode.kernel.access = NOT_TOLD
    fstat = os.fstat

    def owned(fd: int) -> os.stat_result:
        return os.stat_result((*fstat(fd)[:4], 1234, *fstat(fd)[5:]))

    changes: list[object] = []

    def change(fd: int, *what: object) -> tuple[os.stat_result, os.stat_result]:
        changes.append(what)
        return fstat(fd), fstat(fd)

    monkeypatch.setattr(os, "getxattr", lambda *_: b"list")
    monkeypatch.setattr(os, "fstat", owned)
    monkeypatch.setattr(attributes, "change_xattr", change)
    ctx = cast(RequestContext, SimpleNamespace(uid=uid, gid=1, pid=1, umask=0))
    name = XAttrNameT(b"system.nfs4_acl")
    calls = (
        partial(fs.setxattr, InodeT(inode.node), name, b"new", ctx),
        partial(fs.removexattr, InodeT(inode.node), name, ctx),
    )
    for call in calls:
        if may:
            await call()
        else:
            with pytest.raises(FUSEError) as caught:
                await call()
            assert caught.value.errno == errno.EPERM
    assert bool(changes) is may
    monkeypatch.undo()
    await fs.release(fh)


async def test_what_another_handler_gave_out_is_not_taken_back(
    services: Services, inodes: InodeTable
) -> None:
    """pyfuse3 answers a setxattr by what getxattr says; if that is refused, nothing was given."""
    fs, fh = await opened(services, inodes)
    ctx = cast(RequestContext, SimpleNamespace(uid=0, gid=0, pid=1))
    node = InodeT(fs._handles[fh].inode.node)  # type: ignore[attr-defined]  # noqa: SLF001
    os.setxattr(inodes[node].path(), "user.x", b"value")
    taken_back = list[str]()
    for name in (b"security.capability", b"user.x", b"user.none"):
        fs.refused_replies.hold(lambda name=name: taken_back.append(name))  # type: ignore[misc]
        with contextlib.suppress(FUSEError):
            await fs.getxattr(node, XAttrNameT(name), ctx)
        fs.refused_replies.refused()
    assert not taken_back


async def test_what_was_half_done_is_looked_up_again(
    services: Services, inodes: InodeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, _ = await opened(services, inodes)
    ctx = cast(RequestContext, SimpleNamespace(uid=0, gid=0, pid=1, umask=0))
    told = list[tuple[int, bytes]]()
    monkeypatch.setattr(services.notifier, "entry", lambda *place: told.append(place))
    for error in (OSError(errno.EDQUOT, ""), HalfDoneError(OSError(errno.EDQUOT, ""))):

        def fail(*_: object, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr(namespace, "make_node", fail)
        with pytest.raises(FUSEError):
            await fs.mkdir(InodeT(inodes.root.node), FileNameT(b"new"), ModeT(0o755), ctx)
    assert told == [(inodes.root.node, b"new")]


async def test_a_file_that_is_only_read_is_closed_whatever_hangs(
    services: Services, inodes: InodeTable
) -> None:
    """Its read-ahead may be under way."""
    fs, fh = await opened(services, inodes, os.O_RDONLY)
    services.backing.abandoned_calls = 1
    with fs._handles[fh].use:  # type: ignore[attr-defined]  # noqa: SLF001
        await fs.flush(fh)


async def test_two_who_list_one_directory_do_not_mix_names_and_attributes(
    services: Services, inodes: InodeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is gone, and its listing goes on."""
    for i in range(5):
        (tmp_path / f"old{i}").touch()
    directory = DirHandle(services, inodes.root, os.open(tmp_path, os.O_RDONLY))
    directory.batch = 100
    await directory.rewind()
    directory.forget_stats()
    begun, go_on, stat_names = threading.Event(), threading.Event(), listing.stat_names

    def slowly(fd: int, names: list[bytes], handles: bool) -> list[listing.EntryStat]:
        stats = stat_names(fd, names, handles)
        begun.set()
        go_on.wait(10)
        return stats

    found = list[tuple[bytes, listing.EntryStat] | None]()

    async def list_on() -> None:
        found.append(await directory.entry(0))

    async with trio.open_nursery() as nursery:
        monkeypatch.setattr(listing, "stat_names", slowly)
        nursery.start_soon(list_on)
        assert await trio.to_thread.run_sync(begun.wait, 10)
        monkeypatch.setattr(listing, "stat_names", stat_names)
        inos = {entry.name.encode(): entry.inode() for entry in os.scandir(tmp_path)}
        for i in range(5):
            (tmp_path / f"old{i}").rename(tmp_path / f"new{i}")
        await directory.rewind()
        go_on.set()
    await directory.release()
    assert found[0] is not None
    name, listed = found[0]
    assert isinstance(listed, listing.ListedEntry)
    assert listed.stat.st_ino == inos[name]


@pytest.mark.parametrize("how", ["unlink", "rename over"])
async def test_who_goes_by_one_of_two_names_is_served_when_the_other_goes(
    services: Services, inodes: InodeTable, tmp_path: Path, how: str
) -> None:
    """Overlayfs keeps a whiteout, links it time and again, and does not look names up anew."""
    fs, fh = await opened(services, inodes)
    await fs.release(fh)
    root = InodeT(inodes.root.node)
    ctx = cast(RequestContext, SimpleNamespace(uid=0, gid=0, pid=os.getpid(), umask=0o022))
    node = (await fs.lookup(root, FileNameT(b"f"), ctx)).st_ino
    await fs.link(node, root, FileNameT(b"g"), ctx)
    if how == "unlink":
        await fs.unlink(root, FileNameT(b"g"), ctx)
    else:
        (tmp_path / "other").write_bytes(b"")
        await fs.rename(root, FileNameT(b"other"), root, FileNameT(b"g"), FlagT(0), ctx)
    assert (await fs.link(node, root, FileNameT(b"h"), ctx)).st_nlink == 2
    info = await fs.open(node, FlagT(os.O_RDONLY), ctx)
    await fs.release(FileHandleT(info.fh))


async def test_a_file_that_is_closed_is_not_looked_at_any_more(
    services: Services, inodes: InodeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def done(*_: object) -> None:
        await trio.lowlevel.checkpoint()

    services.coherency.mode = Coherency.WATCH
    monkeypatch.setattr(Notifier, "refreshed", done)
    fs, fh = await opened(services, inodes)
    ctx = cast(RequestContext, SimpleNamespace(uid=0, pid=os.getpid()))
    node = (await fs.lookup(InodeT(inodes.root.node), FileNameT(b"f"), ctx)).st_ino
    again = await fs.open(node, FlagT(os.O_RDONLY), ctx)
    assert fs._open_files.count == 1  # noqa: SLF001
    await fs.release(fh)
    assert fs._open_files.count == 1  # noqa: SLF001
    await fs.release(FileHandleT(again.fh))
    assert fs._open_files.count == 0  # noqa: SLF001
