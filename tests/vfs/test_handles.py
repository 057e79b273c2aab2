"""Test open files and directories: flushes, waits of reads for writes, lists and names."""

import errno
import os
import stat as stat_module
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
from cleanfs.fuse.channel import Channel
from cleanfs.fuse.notify import Notifier
from cleanfs.fuse.protocol import (
    FUSE_HANDLE_KILLPRIV_V2,
    FUSE_OPEN_KILL_SUIDGID,
    FUSE_WRITE_CACHE,
    FUSE_WRITE_KILL_SUIDGID,
)
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
from cleanfs.vfs.handles import DirHandle, FileHandle, Services
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.kernel_view import NOT_TOLD
from tests.harness.holds import Holds
from tests.harness.kernel import handling


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
    """Make a file system and open a file in it, for writing by default."""
    control = Control(cast(Operator, NoOperator()))
    fs = CleanFS(services, inodes, control, Channel(0), attr_timeout=1)
    ctx = cast(RequestContext, SimpleNamespace(uid=0, pid=1))
    entry = await fs.lookup(inodes.root.node, b"f", ctx)
    info = await fs.open(entry.st_ino, FlagT(flags), ctx)
    return fs, FileHandleT(info.fh)


class NoOperator:
    """Satisfies a control directory that the test does not use."""

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


async def test_without_errors_to_report_flush_is_unsupported(
    services: Services, inodes: InodeTable
) -> None:
    fs, fh = await opened(replace(services, flushless=True), inodes)
    with pytest.raises(FUSEError) as caught:
        await fs.flush(fh)
    assert caught.value.errno == errno.ENOSYS
    await fs.release(fh)


async def test_a_write_reports_the_errors_of_a_close_where_flush_is_unsupported(
    services: Services, inodes: InodeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system was mounted below the source after the start of cleanfs."""
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
async def test_a_read_waits_for_an_earlier_write(
    services: Services, inodes: InodeTable, flags: int
) -> None:
    """The kernel may have dropped the page that it writes, and would cache the old one."""
    fs, fh = await opened(services, inodes, flags)
    [file] = services.pagecache.files()
    got: dict[tuple[int, int], bytes] = {}

    one_is_read = trio.Event()

    async def read(offset: int, size: int) -> None:
        got[offset, size] = bytes(await fs.read(fh, offset, size))
        one_is_read.set()

    # The write waits for this change to end.
    async with trio.open_nursery() as nursery, services.pagecache.changing(file):
        nursery.start_soon(fs.write, fh, 4 if flags & os.O_APPEND else 2, b"new")
        await wait_all_tasks_blocked()
        for offset, size in ((0, 10), (4, 1), (0, 2)):
            nursery.start_soon(read, offset, size)
        with trio.fail_after(10):
            await one_is_read.wait()
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


def test_a_directory_is_local_if_all_mounts_below_are(
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


async def test_a_read_that_waits_for_two_writes_does_not_miss_the_end_of_the_second() -> None:
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


@pytest.mark.parametrize(("uid", "permitted"), [(0, True), (1234, True), (1235, False)])
async def test_only_root_and_the_owner_change_access_control_lists_of_other_kinds(
    services: Services, inodes: InodeTable, monkeypatch: pytest.MonkeyPatch, uid: int, permitted: bool
) -> None:
    """NFS, CIFS and NTFS have access control lists that the kernel does not check for a FUSE mount."""
    fs, fh = await opened(services, inodes)
    inode = inodes.all()[-1]
    inode.kernel.access = NOT_TOLD
    fstat = os.fstat

    def owned(fd: int) -> os.stat_result:
        return os.stat_result((*fstat(fd)[:4], 1234, *fstat(fd)[5:]))

    changes: list[object] = []

    def change(fd: int, *arguments: object) -> tuple[os.stat_result, os.stat_result]:
        changes.append(arguments)
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
        if permitted:
            await call()
        else:
            with pytest.raises(FUSEError) as caught:
                await call()
            assert caught.value.errno == errno.EPERM
    assert bool(changes) is permitted
    monkeypatch.undo()
    await fs.release(fh)


async def test_a_half_done_creation_is_invalidated(
    services: Services, inodes: InodeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, _ = await opened(services, inodes)
    ctx = cast(RequestContext, SimpleNamespace(uid=0, gid=0, pid=1, umask=0))
    invalidated = list[tuple[int, bytes]]()
    monkeypatch.setattr(services.notifier, "entry", lambda *place: invalidated.append(place))
    for error in (OSError(errno.EDQUOT, ""), HalfDoneError(OSError(errno.EDQUOT, ""))):

        def fail(*_: object, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr(namespace, "make_node", fail)
        with pytest.raises(FUSEError):
            await fs.mkdir(InodeT(inodes.root.node), FileNameT(b"new"), ModeT(0o755), ctx)
    assert invalidated == [(inodes.root.node, b"new")]


async def test_a_close_of_a_file_open_for_reading_does_not_wait(
    services: Services, inodes: InodeTable
) -> None:
    """Its read-ahead may still be in flight."""
    fs, fh = await opened(services, inodes, os.O_RDONLY)
    services.backing.abandoned_calls = 1
    with fs._handles[fh].use:  # type: ignore[attr-defined]  # noqa: SLF001  # a file's handle
        await fs.flush(fh)


async def test_two_listings_of_one_directory_do_not_mix_names_and_attributes(
    services: Services, inodes: InodeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of the first one has ended, and its listing continues."""
    for i in range(5):
        (tmp_path / f"old{i}").touch()
    directory = DirHandle(services, inodes.root, os.open(tmp_path, os.O_RDONLY))
    directory.batch = 100
    await directory.rewind()
    directory.forget_stats()
    begun, release, stat_names = threading.Event(), threading.Event(), listing.stat_names

    def held(fd: int, names: list[bytes], handles: bool) -> list[listing.EntryStat]:
        stats = stat_names(fd, names, handles)
        begun.set()
        release.wait(10)
        return stats

    found = list[tuple[bytes, listing.EntryStat] | None]()

    async def read_entry() -> None:
        found.append(await directory.entry(0))

    async with trio.open_nursery() as nursery:
        monkeypatch.setattr(listing, "stat_names", held)
        nursery.start_soon(read_entry)
        assert await trio.to_thread.run_sync(begun.wait, 10)
        monkeypatch.setattr(listing, "stat_names", stat_names)
        inos = {entry.name.encode(): entry.inode() for entry in os.scandir(tmp_path)}
        for i in range(5):
            (tmp_path / f"old{i}").rename(tmp_path / f"new{i}")
        await directory.rewind()
        release.set()
    await directory.release()
    assert found[0] is not None
    name, listed = found[0]
    assert isinstance(listed, listing.ListedEntry)
    assert listed.stat.st_ino == inos[name]


@pytest.mark.parametrize("operation", ["unlink", "rename over"])
async def test_a_call_by_one_of_two_names_is_served_after_the_other_is_removed(
    services: Services, inodes: InodeTable, tmp_path: Path, operation: str
) -> None:
    """Overlayfs keeps a whiteout, links it again and again, and does not look names up anew."""
    fs, fh = await opened(services, inodes)
    await fs.release(fh)
    root = InodeT(inodes.root.node)
    ctx = cast(RequestContext, SimpleNamespace(uid=0, gid=0, pid=os.getpid(), umask=0o022))
    node = (await fs.lookup(root, FileNameT(b"f"), ctx)).st_ino
    await fs.link(node, root, FileNameT(b"g"), ctx)
    if operation == "unlink":
        await fs.unlink(root, FileNameT(b"g"), ctx)
    else:
        (tmp_path / "other").write_bytes(b"")
        await fs.rename(root, FileNameT(b"other"), root, FileNameT(b"g"), FlagT(0), ctx)
    assert (await fs.link(node, root, FileNameT(b"h"), ctx)).st_nlink == 2
    info = await fs.open(node, FlagT(os.O_RDONLY), ctx)
    await fs.release(FileHandleT(info.fh))


async def test_a_closed_file_is_not_checked_any_more(
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
    assert fs._open_files.count == 1  # noqa: SLF001  # no public access
    await fs.release(fh)
    assert fs._open_files.count == 1  # noqa: SLF001  # no public access
    await fs.release(FileHandleT(again.fh))
    assert fs._open_files.count == 0  # noqa: SLF001  # no public access


# -- what a WRITE says ---------------------------------------------------------------------------


@pytest.fixture
def shared(services: Services) -> Services:
    """Another process may append in the source."""
    return replace(services, coherency=CoherencyChecker(services.pagecache, Coherency.OPEN))


@pytest.mark.parametrize("opened_with", [os.O_RDWR, os.O_RDWR | os.O_APPEND])
@pytest.mark.parametrize(
    ("file_flags", "flags", "result"),
    [
        (os.O_RDWR | os.O_APPEND, 0, b"texttheirsnew"),
        (os.O_RDWR, 0, b"textnewirs"),  # F_SETFL has cleared it
        (os.O_RDWR | os.O_APPEND, FUSE_WRITE_CACHE, b"textnewirs"),  # pages of a mapping
    ],
)
async def test_a_write_appends_if_its_message_says_so(
    shared: Services,
    inodes: InodeTable,
    tmp_path: Path,
    opened_with: int,
    file_flags: int,
    flags: int,
    result: bytes,
) -> None:
    """The kernel sees the file's end at 4. How it was opened makes no difference (F_SETFL)."""
    fs, fh = await opened(shared, inodes, opened_with)
    with (tmp_path / "f").open("ab") as theirs:
        theirs.write(b"theirs")
    with handling(flags=flags, file_flags=file_flags):
        assert await fs.write(fh, 4, b"new") == 3
    assert (tmp_path / "f").read_bytes() == result
    await fs.release(fh)


async def test_without_a_known_request_a_write_goes_to_its_offset(
    shared: Services, inodes: InodeTable, tmp_path: Path
) -> None:
    fs, fh = await opened(shared, inodes, os.O_RDWR | os.O_APPEND)
    assert await fs.write(fh, 2, b"new") == 3
    assert (tmp_path / "f").read_bytes() == b"tenew"
    await fs.release(fh)


@pytest.mark.parametrize("uid", [0, 12345])
@pytest.mark.parametrize(("flags", "mode"), [(FUSE_WRITE_KILL_SUIDGID, 0o755), (0, 0o6755)])
async def test_a_write_clears_set_id_bits_if_its_message_says_so(
    services: Services, inodes: InodeTable, tmp_path: Path, uid: int, flags: int, mode: int
) -> None:
    """Whose request it is does not say it: root may lack CAP_FSETID, and a user may have it."""
    (tmp_path / "f").chmod(0o6755)
    fs, fh = await opened(services, inodes)
    with handling(flags=flags, uid=uid, gid=uid):
        await fs.write(fh, 0, b"new")
    assert stat_module.S_IMODE((tmp_path / "f").stat().st_mode) == mode
    await fs.release(fh)


@pytest.mark.parametrize("uid", [0, 12345])
@pytest.mark.parametrize("flags", [FUSE_OPEN_KILL_SUIDGID, 0])
@pytest.mark.parametrize("negotiated", [FUSE_HANDLE_KILLPRIV_V2, 0])
async def test_an_open_that_truncates_clears_set_id_bits(
    services: Services, inodes: InodeTable, tmp_path: Path, uid: int, flags: int, negotiated: int
) -> None:
    (tmp_path / "f").chmod(0o6755)
    control, channel = Control(cast(Operator, NoOperator())), Channel(0)
    channel.init_flags = negotiated
    fs = CleanFS(services, inodes, control, channel, attr_timeout=1)
    ctx = cast(RequestContext, SimpleNamespace(uid=uid, gid=uid, pid=1))
    entry = await fs.lookup(inodes.root.node, b"f", ctx)
    with handling(flags=flags, uid=uid, gid=uid):
        info = await fs.open(entry.st_ino, FlagT(os.O_WRONLY | os.O_TRUNC), ctx)
    assert inodes[entry.st_ino].kernel.size == 0
    cleared = bool(flags) if negotiated else uid != 0
    assert stat_module.S_IMODE((tmp_path / "f").stat().st_mode) == (0o755 if cleared else 0o6755)
    await fs.release(FileHandleT(info.fh))


@pytest.mark.parametrize(("flags", "dropped"), [(0, True), (FUSE_WRITE_CACHE, False)])
async def test_a_write_back_waits_for_no_invalidation(
    services: Services,
    inodes: InodeTable,
    monkeypatch: pytest.MonkeyPatch,
    flags: int,
    dropped: bool,
) -> None:
    """It would wait for the reply. A program's write of these pages drops them later all the same."""
    fs, fh = await opened(services, inodes)
    pages = list[int]()

    async def written(node: int, start: int, *_: object) -> None:
        pages.append(start)

    monkeypatch.setattr(services.notifier, "written", written)
    await fs.read(fh, 0, 4)
    with handling(flags=flags):
        await fs.write(fh, 0, b"new")
    assert bool(pages) is dropped
    with handling():
        await fs.write(fh, 0, b"newer")
    assert pages == [0]
    await fs.release(fh)


# -- evictions of the kernel ----------------------------------------------------------------------


async def test_evicted_pages_are_held_back_until_a_handle_written_with_o_direct_closes(
    services: Services, inodes: InodeTable
) -> None:
    services.notifier.use_evictions(holds := Holds())
    fs, fh = await opened(services, inodes)
    handle = fs._handles[fh]  # noqa: SLF001  # no handler says what it does
    assert isinstance(handle, FileHandle)
    await handle.write(0, b"1")
    assert holds.nodes == []
    with handling(file_flags=os.O_DIRECT):
        await handle.write(0, b"2")
        await handle.write(0, b"3")
    await handle.write(0, b"4")
    assert holds.nodes == [handle.inode.node]
    await fs.release(fh)
    assert holds.nodes == []
