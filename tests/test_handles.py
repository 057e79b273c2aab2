"""What an open file tells the source, and the kernel, when descriptors of it are closed."""

import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from pyfuse3 import FileHandleT, FlagT, FUSEError, InodeT, RequestContext, XAttrNameT
from trio.testing import wait_all_tasks_blocked

from cleanfs import mounts, namespace
from cleanfs.backing import Backing
from cleanfs.cleancache import Cleancache
from cleanfs.coherency import Coherency, CoherencyChecker
from cleanfs.control import Control, Operator
from cleanfs.filesystem import CleanFS
from cleanfs.given import Given
from cleanfs.handles import Services
from cleanfs.inodes import NOT_TOLD, InodeTable
from cleanfs.latency import Latencies
from cleanfs.mounts import FileSystemTypes, all_local
from cleanfs.notify import Notifier
from cleanfs.pagecache import PageCache, Writing
from cleanfs.resident import make_resident
from cleanfs.room import Room


@pytest.fixture
def services() -> Services:
    pagecache = PageCache(1 << 20, Cleancache().init_fs(4096), make_resident(4096))
    checker = CoherencyChecker(pagecache, Coherency.NONE)
    return Services(Backing(), pagecache, checker, FileSystemTypes(), Notifier(), Latencies())


@pytest.fixture
def inodes(tmp_path: Path) -> Iterator[InodeTable]:
    (tmp_path / "f").write_bytes(b"text")
    fd = os.open(tmp_path, os.O_PATH)
    table = InodeTable(fd, 64, 64, Room())
    os.close(fd)
    yield table
    table.close()


async def opened(
    services: Services, inodes: InodeTable, flags: int = os.O_RDWR
) -> tuple[CleanFS, FileHandleT]:
    """A file system with a file that is open for writing."""
    control = Control(cast(Operator, NoOperator()))
    fs = CleanFS(services, inodes, control, Given(), attr_timeout=1)
    ctx = cast(RequestContext, SimpleNamespace(uid=0))
    entry = await fs.lookup(inodes.root.node, b"f", ctx)  # type: ignore[arg-type]
    info = await fs.open(entry.st_ino, FlagT(flags), ctx)
    return fs, FileHandleT(info.fh)


class NoOperator:
    """What a control directory that nobody looks at needs."""

    stats = set_backend = drop = None


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
    monkeypatch.setattr("cleanfs.handles.LOCAL_FILE_SYSTEMS", frozenset())

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
    inode.told_size(4)
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

    monkeypatch.setattr(services.backing, "write", full)
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
    first, second = Writing(0, 10), Writing(0, 10)

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
    inode.access = NOT_TOLD
    fstat = os.fstat

    def owned(fd: int) -> os.stat_result:
        return os.stat_result((*fstat(fd)[:4], 1234, *fstat(fd)[5:]))

    changes: list[object] = []

    def change(fd: int, *what: object) -> tuple[os.stat_result, os.stat_result]:
        changes.append(what)
        return fstat(fd), fstat(fd)

    monkeypatch.setattr(os, "getxattr", lambda *_: b"list")
    monkeypatch.setattr(os, "fstat", owned)
    monkeypatch.setattr(namespace, "change_xattr", change)
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
