"""Test the files that the channel opens and closes, beside what Python does."""

import errno
import fcntl
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cleanfs.backends.ops import FileKey
from cleanfs.fuse.protocol import FUSE_OPEN_IN as OPEN_IN
from cleanfs.fuse.protocol import FUSE_RELEASE_IN as RELEASE_IN
from cleanfs.vfs import handles
from cleanfs.vfs.coherency import Coherency
from cleanfs.vfs.handles import FileHandle
from cleanfs.vfs.node_ids import ROOT
from tests.fs.metadata_rig import OPEN, RELEASE, THREAD, Opened
from tests.fs.twins import Twins, needs_native, twins_over
from tests.harness.served import READ, READ_IN

pytestmark = needs_native

USER = 1000


@pytest.fixture(params=[Coherency.OPEN, Coherency.NONE])
async def opened(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Twins]:
    """Serve a source whose file ``a`` was opened, long after its last change, and closed."""
    clock = SimpleNamespace(time_ns=lambda: 10**20)
    monkeypatch.setattr(handles, "time", clock)
    async with twins_over(tmp_path, request.param) as twins:
        node = await twins.found(b"a")
        assert not await twins.is_served("open", node)
        await twins.both("release")
        twins.deliver()
        yield twins


checked = pytest.mark.parametrize("opened", [Coherency.OPEN], indirect=True)
"""For rules that do not hold with ``--coherency none``."""


def node_of(twins: Twins) -> int:
    return (twins.source / "a").stat().st_ino


async def is_opened(twins: Twins, **arguments: int) -> bool:
    """Have ``a`` opened by both. Return whether the channel did it."""
    node = arguments.pop("node", 0) or node_of(twins)
    before = twins.natively
    for side in twins.sides:
        assert isinstance(await side.open(node, **arguments), Opened)
    twins.compare()
    return twins.natively > before


async def test_a_file_that_was_opened_before_is_opened_and_closed(opened: Twins) -> None:
    assert await is_opened(opened)
    assert await is_opened(opened)
    assert [side.fs.open_files for side in opened.sides] == [2, 2]
    assert await opened.is_served("release")
    assert await opened.is_served("release")
    assert opened.sides[0].fs.open_files == 0


async def test_a_user_opens_a_file_that_is_as_the_kernel_was_told(opened: Twins) -> None:
    assert await is_opened(opened, uid=USER)


async def test_python_takes_over_a_file_that_it_must_handle(opened: Twins) -> None:
    assert await is_opened(opened)
    assert [await side.read() for side in opened.sides] == [b"a", b"a"]
    opened.compare()
    assert not await opened.is_served("release")
    opened.compare()


async def test_a_cold_read_of_a_file_that_python_takes_over_tries_once_not_to_wait(
    opened: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await is_opened(opened)
    with (opened.source / "a").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    side, preadv, flags_seen = opened.sides[0], os.preadv, list[int]()

    def noting(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        flags_seen.append(flags)
        return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", noting)
    node, fh = side.fhs[0]
    assert not side.served(READ, node, READ_IN.pack(fh, 0, 100, 0, 0, 0, 0), THREAD)
    assert await side.read() == b"a"
    handle = side.fs._handles[fh]  # noqa: SLF001  # no public access
    assert isinstance(handle, FileHandle)
    if not handle._source._fs.nowait:  # noqa: SLF001  # no public access
        pytest.skip("the source does not know RWF_NOWAIT")
    assert not any(flags & os.RWF_NOWAIT for flags in flags_seen)


@pytest.mark.parametrize("flags", [os.O_NOATIME, os.O_TRUNC, os.O_WRONLY | os.O_TRUNC])
async def test_an_open_that_does_more_is_left_to_python(opened: Twins, flags: int) -> None:
    assert not opened.sides[0].served(OPEN, node_of(opened), OPEN_IN.pack(flags, 0))


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_SYNC])
async def test_a_file_is_opened_for_writing(opened: Twins, flags: int) -> None:
    assert await is_opened(opened, flags=flags)
    assert [side.fs.open_for_writing() for side in opened.sides] == [{node_of(opened)}] * 2
    assert await is_opened(opened, flags=flags)
    assert await opened.is_served("release")
    for side in opened.sides:
        assert side.fs._handles[side.fhs[0][1]]  # noqa: SLF001  # Python takes it over
    assert not await opened.is_served("release")
    assert [side.fs.open_for_writing() for side in opened.sides] == [set()] * 2


async def test_a_file_that_the_kernel_writes_back_is_left_to_python(opened: Twins) -> None:
    for side in opened.sides:
        side.table.states.writeback = True
    assert await is_opened(opened)
    assert not await is_opened(opened, flags=os.O_WRONLY)


@pytest.mark.parametrize("flags", [os.O_NONBLOCK, os.O_DIRECT, os.O_NOFOLLOW])
async def test_flags_of_the_program_are_kept(opened: Twins, flags: int) -> None:
    assert await is_opened(opened, flags=flags)
    inodes = opened.inodes(node_of(opened))
    first, second = (fcntl.fcntl(inode.open_fds[0], fcntl.F_GETFL) for inode in inodes)
    assert first == second


@checked
async def test_a_file_that_was_changed_is_left_to_python(opened: Twins) -> None:
    (opened.source / "a").write_text("longer")
    assert not await is_opened(opened)


@checked
async def test_a_racy_fingerprint_is_left_to_python(opened: Twins) -> None:
    for inode in opened.inodes(node_of(opened)):
        assert inode.record is not None
        inode.record.racy = True
    assert not await is_opened(opened)


async def test_a_file_without_fingerprint_is_left_to_python(opened: Twins) -> None:
    for side, inode in zip(opened.sides, opened.inodes(node_of(opened)), strict=True):
        assert inode.record is not None
        side.services.coherency.distrust(inode.record)
    assert not await is_opened(opened)


async def test_a_file_whose_record_was_forgotten_is_left_to_python(opened: Twins) -> None:
    for side, inode in zip(opened.sides, opened.inodes(node_of(opened)), strict=True):
        assert inode.record is not None
        side.services.pagecache.forget(inode.record)
    assert not await is_opened(opened)


async def test_an_open_of_a_file_that_is_being_invalidated_is_left_to_python(opened: Twins) -> None:
    opened.on_both("invalidate", ROOT)
    opened.on_both("expire", b"a")
    assert await is_opened(opened)
    opened.on_both("invalidate", node_of(opened))
    assert not await is_opened(opened)


@checked
async def test_an_open_after_one_that_drops_pages_is_left_to_python(opened: Twins) -> None:
    (opened.source / "a").write_text("longer")
    assert not await is_opened(opened)
    opened.deliver()
    assert not await is_opened(opened)
    for _ in range(2):
        await opened.both("release")
    assert await is_opened(opened)


@checked
async def test_an_open_while_attributes_are_in_doubt_is_left_to_python(opened: Twins) -> None:
    for inode in opened.inodes(node_of(opened)):
        inode.kernel.rollback()
    assert not await is_opened(opened)
    assert await is_opened(opened)


@checked
async def test_an_open_of_a_file_of_which_the_kernel_knows_no_attributes_is_left_to_python(
    opened: Twins,
) -> None:
    for inode in opened.inodes(node_of(opened)):
        inode.kernel.sent = (1, 2, 3)
    assert not await is_opened(opened)


@checked
async def test_a_thread_that_was_refused_is_left_to_python(opened: Twins) -> None:
    other = await opened.found(b"b")
    (opened.source / "b").rename(opened.source / "gone")
    assert await opened.both("open", other) == -errno.ESTALE
    opened.deliver()
    assert not await is_opened(opened)
    assert await is_opened(opened, thread=THREAD + 1)


@checked
async def test_a_name_that_leads_elsewhere_is_refused(opened: Twins) -> None:
    node = node_of(opened)
    opened.source.joinpath("a").rename(opened.source / "moved")
    opened.source.joinpath("b").rename(opened.source / "a")
    os.utime(opened.source / "moved", ns=(0, 0))
    for side in opened.sides:
        st = (opened.source / "moved").stat()
        inode = side.table[node]
        assert inode.record is not None
        inode.kernel.sent = inode.record.stamps = (st.st_size, st.st_mtime_ns, st.st_ctime_ns)
    assert await opened.both("open", node) == -errno.ESTALE


@checked
async def test_a_file_whose_directory_is_parked_is_left_to_python(opened: Twins) -> None:
    directory = await opened.found(b"dir")
    node = await opened.found(b"x", directory)
    await opened.both("open", node)
    await opened.both("release")
    opened.deliver()
    assert await is_opened(opened, node=node)
    for side in opened.sides:
        side.table[directory].used, side.table[node].used = False, True
        side.table.pin(side.table[node])
        side.table.shrink(1)
        side.table.unpin(side.table[node])
        assert side.table[directory].fd == -1
    assert not await is_opened(opened, node=node)


@checked
async def test_a_file_whose_directory_the_kernel_forgot_is_left_to_python(opened: Twins) -> None:
    directory = await opened.found(b"dir")
    node = await opened.found(b"x", directory)
    await opened.both("open", node)
    await opened.both("release")
    opened.deliver()
    for side in opened.sides:
        side.table.pin(side.table[directory])
    await opened.both("forget_one", directory, 1)
    assert not await is_opened(opened, node=node)


async def test_a_user_whose_access_may_have_changed_is_left_to_python(opened: Twins) -> None:
    for inode in opened.inodes(node_of(opened)):
        inode.kernel.access_ctime -= 1  # an ACL may have been set
    assert not await is_opened(opened, uid=USER)
    assert await is_opened(opened, uid=USER)
    for inode in opened.inodes(node_of(opened)):
        inode.kernel.access += 1
    assert await is_opened(opened)
    before = opened.natively
    assert await opened.both("open", node_of(opened), os.O_RDONLY) == Opened(keeps_pages=True)
    assert opened.natively > before
    for side in opened.sides:
        assert await side.open(node_of(opened), uid=USER) == -errno.ESTALE


async def test_an_open_that_must_park_inodes_is_left_to_python(opened: Twins) -> None:
    assert await is_opened(opened)
    for side in opened.sides:
        side.table.fd_budget = 1
    assert not await is_opened(opened)


async def test_a_file_on_a_file_system_that_is_not_local_is_left_to_python(opened: Twins) -> None:
    for inode in opened.inodes(node_of(opened)):
        inode.local = False
    assert not await is_opened(opened)


async def test_a_lease_is_waited_for_by_python(opened: Twins) -> None:
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the holder of a lease gets one
    with (opened.source / "a").open("r+b") as file:
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError:
            pytest.skip("no leases here")
        assert not opened.sides[0].served(OPEN, node_of(opened), OPEN_IN.pack(os.O_RDONLY, 0))
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    signal.signal(signal.SIGIO, before)


async def test_the_last_close_of_a_removed_file_is_left_to_python(opened: Twins) -> None:
    assert await is_opened(opened)
    (opened.source / "a").unlink()
    assert not await opened.is_served("release")
    assert [side.services.pagecache.files() for side in opened.sides] == [[], []]


async def test_a_close_after_a_stream_is_left_to_python(opened: Twins) -> None:
    (opened.source / "big").write_bytes(bytes(1 << 20))
    node = await opened.found(b"big")
    await opened.both("open", node)
    await opened.both("release")
    opened.deliver()
    assert await is_opened(opened, node=node)
    side = opened.sides[0]
    fh = side.fhs[0][1]
    for offset in (0, 4096, 8192):
        assert side.served(READ, node, READ_IN.pack(fh, offset, 4096, 0, 0, 0, 0))
        assert side.device is not None
        [(_, error, body)] = side.device.replies()
        assert (error, len(body)) == (0, 4096)
    assert not side.served(RELEASE, node, RELEASE_IN.pack(fh, 0, 0, 0))


@checked
async def test_another_fingerprint_is_left_to_python(opened: Twins) -> None:
    for inode in opened.inodes(node_of(opened)):
        assert inode.record is not None
        inode.record.stamps = (1, 2, 3)
    assert not await is_opened(opened)


async def test_an_inode_that_the_kernel_forgot_goes_with_the_close(opened: Twins) -> None:
    assert await is_opened(opened)
    await opened.both("forget_one", node_of(opened), 1)
    assert len(opened.sides[0].table) == 2
    assert await opened.is_served("release")
    assert len(opened.sides[0].table) == 1


@checked
async def test_an_open_file_is_polled_for_changes(opened: Twins) -> None:
    inode = opened.inodes(node_of(opened))[0]
    assert not inode.polled
    assert await is_opened(opened)
    assert inode.polled
    assert await opened.is_served("release")
    polled = opened.sides[0].fs._open_files  # noqa: SLF001  # no public access
    assert inode.polled
    polled.closed(inode)
    assert not inode.polled
    assert polled.count == 0


async def test_a_record_that_the_channel_used_is_not_forgotten_first(opened: Twins) -> None:
    other = await opened.found(b"b")
    await opened.both("open", other)
    await opened.both("release")
    opened.deliver()
    assert await is_opened(opened)
    await opened.both("release")
    for side in opened.sides:
        side.services.pagecache.max_files = 2
        side.services.pagecache.file(FileKey(1, 2, b"another"))
        used, unused = (side.table[node].record for node in (node_of(opened), other))
        assert used is not None
        assert unused is not None
        assert (used.forgotten, unused.forgotten) == (False, True)
