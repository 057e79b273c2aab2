"""Test marks, and the effects of events, without a mount."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from cleanfs.backends.ops import FileKey
from cleanfs.cache.cleancache import Cleancache
from cleanfs.cache.files import CachedFile
from cleanfs.cache.pagecache import PageCache
from cleanfs.cache.resident import make_resident
from cleanfs.fuse.notify import Expiry, Notifier
from cleanfs.latency import Latencies
from cleanfs.linux import fanotify
from cleanfs.linux.mounts import LOCAL_FILE_SYSTEMS, FileSystemTypes
from cleanfs.linux.syscalls import name_to_handle
from cleanfs.source.identity import Rules
from cleanfs.source.io import Backing
from cleanfs.vfs import source_watch
from cleanfs.vfs.coherency import Coherency, CoherencyChecker
from cleanfs.vfs.handles import Services
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.open_files import OpenFiles, look
from cleanfs.vfs.source_watch import Batch, SourceWatch, UnwatchableError
from tests.harness.source_calls import CONTENTS, SIZE, held


class RecordingNotifier(Notifier):
    """Records the notifications to the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.notifications: list[object] = []

    def _queue(self, item: object) -> None:
        self.notifications.append(item)


class Site:
    """Holds a watched directory with its inode table and page cache."""

    def __init__(self, source: Path) -> None:
        pagecache = PageCache(1 << 20, Cleancache().init_fs(4096), make_resident(4096))
        self.notifier = RecordingNotifier()
        self.notifier._device = 1 << 20  # noqa: SLF001  # no public access
        self.services = Services(
            Backing(),
            pagecache,
            CoherencyChecker(pagecache, Coherency.WATCH),
            FileSystemTypes(),
            self.notifier,
            Latencies(),
        )
        root_fd = os.open(source, os.O_PATH)
        self.inodes = InodeTable(
            root_fd, 100, 1000, self.services.space_retry, Rules(self.services.types)
        )
        os.close(root_fd)
        self.source = source
        self.watch = SourceWatch(self.services, self.inodes)

    def look_up(self, name: str) -> Inode:
        fd = os.open(self.source / name, os.O_PATH | os.O_NOFOLLOW)
        return self.inodes.looked_up(fd, os.fstat(fd), self.inodes.root, name.encode())

    def cached(self, inode: Inode) -> CachedFile:
        """Return the record of a file as after a read."""
        inode.file_key = FileKey(inode.device, inode.ino, name_to_handle(inode.fd))
        file = self.services.pagecache.file(inode.file_key)
        file.size = 5
        return file

    async def handle_events(self) -> list[object]:
        """Handle the pending events. Return the notifications to the kernel."""
        self.notifier.notifications.clear()
        batch = Batch()
        await self.watch._drain(batch)  # noqa: SLF001  # no public access
        await self.watch._apply(batch)  # noqa: SLF001  # no public access
        return self.notifier.notifications

    def close(self) -> None:
        self.watch.close()
        self.inodes.close()


@pytest.fixture(params=["filesystem", "inode"])
def site(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    if request.param == "inode":
        refuse(monkeypatch, errno.EPERM, fanotify.FAN_MARK_FILESYSTEM)
    try:
        made = Site(tmp_path)
    except UnwatchableError as exc:
        pytest.skip(str(exc))
    # Events caused by this process count as changes by others.
    made.watch._pid = 0  # noqa: SLF001  # no public access
    if request.param not in made.watch.stats().watcher:
        made.close()
        pytest.skip("takes privileges")
    yield made
    made.close()


def refuse(monkeypatch: pytest.MonkeyPatch, number: int, flag: int, path: str = "") -> None:
    """Let the kernel refuse marks of that kind."""
    real = fanotify.mark

    def mark(group: int, flags: int, mask: int, where: str) -> None:
        if flags & flag and (not path or os.path.realpath(where) == path):
            raise OSError(number, os.strerror(number))
        real(group, flags, mask, where)

    monkeypatch.setattr(fanotify, "mark", mark)


async def test_a_write_by_others_flushes_the_file_and_notifies_the_kernel(site: Site) -> None:
    (site.source / "f").write_bytes(b"12345")
    inode = site.look_up("f")
    file = site.cached(inode)
    await site.handle_events()
    version = file.version
    (site.source / "f").write_bytes(b"54321")
    assert inode.node in await site.handle_events()
    assert file.version > version
    assert file.size == 0


@pytest.mark.parametrize("call", CONTENTS)
async def test_each_call_that_changes_the_contents_has_an_event(site: Site, call: str) -> None:
    path = site.source / "f"
    for name in ("f", "other"):
        (site.source / name).write_bytes(bytes(range(256)) * (SIZE // 256) + bytes(SIZE % 256))
    inode = site.look_up("f")
    await site.handle_events()
    with held(path, os.O_RDWR) as writer:
        CONTENTS[call](site.source, writer)
        assert (inode.node in await site.handle_events()) == (call not in ("mmap", "io_submit"))
    assert inode.node in await site.handle_events(), "there may have been a mapping"


async def test_an_own_write_is_ignored(site: Site) -> None:
    (site.source / "f").write_bytes(b"12345")
    inode = site.look_up("f")
    file = site.cached(inode)
    await site.handle_events()
    site.watch._pid = os.getpid()  # noqa: SLF001  # no public access
    version = file.version
    (site.source / "f").write_bytes(b"54321")
    assert await site.handle_events() == []
    assert file.version == version
    assert site.watch.stats().watch_events_own > 0


async def test_created_renamed_and_removed_names_are_invalidated(site: Site) -> None:
    (site.source / "old").write_bytes(b"")
    await site.handle_events()
    root = site.inodes.root.node
    (site.source / "new").write_bytes(b"")
    assert await site.handle_events() == [root]
    (site.source / "old").rename(site.source / "new")
    assert sorted(map(repr, await site.handle_events())) == sorted(
        map(repr, [root, (root, b"old"), root, Expiry(root, b"new")])
    )
    (site.source / "new").unlink()
    assert await site.handle_events() == [root, (root, b"new")]


async def test_lost_events_flush_everything(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    (site.source / "f").write_bytes(b"12345")
    inode = site.look_up("f")
    file = site.cached(inode)
    for damaged in (b"\1", fanotify.METADATA.pack(24, 3, 0, 24, fanotify.FAN_Q_OVERFLOW, -1, 0)):
        file.size = 5
        buffers = [damaged, b""]
        monkeypatch.setattr(site.watch, "_read", lambda: buffers.pop(0))  # noqa: B023  # called before the next iteration
        notifications = await site.handle_events()
        assert file.size == 0
        assert {site.inodes.root.node, inode.node, Expiry(site.inodes.root.node, b"f")} == set(
            notifications
        )
    assert site.watch.stats().watch_overflows == 2


async def test_pages_of_a_file_that_the_kernel_has_forgotten_are_flushed(site: Site) -> None:
    if site.watch.stats().watcher != "fanotify-filesystem":
        pytest.skip("an inode that is not held has no mark; the next open checks it")
    (site.source / "f").write_bytes(b"12345")
    inode = site.look_up("f")
    file = site.cached(inode)
    await site.handle_events()
    site.inodes.forget(inode.node, 1)
    (site.source / "f").write_bytes(b"54321")
    assert await site.handle_events() == []
    assert file.size == 0
    (site.source / "f").unlink()
    with trio.fail_after(10):  # another watcher of this file system may hold it for a moment
        while site.services.pagecache.known(file.key) is not None:
            await site.handle_events()


async def test_inodes_without_marks_are_counted_and_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(monkeypatch, errno.EPERM, fanotify.FAN_MARK_FILESYSTEM)
    try:
        site = Site(tmp_path)
    except UnwatchableError as exc:
        pytest.skip(str(exc))
    try:
        refuse(monkeypatch, errno.ENOSPC, fanotify.FAN_MARK_ADD)
        nodes = []
        for name in ("a", "b"):
            (tmp_path / name).write_bytes(b"")
            nodes.append(site.look_up(name).node)
        assert site.watch.stats().watch_unwatched == 2
        assert caplog.text.count("not all changes") == 1
        assert os.strerror(errno.ENOSPC) in caplog.text
        for node in nodes:
            site.inodes.forget(node, 1)
        assert site.watch.stats().watch_unwatched == 0
        assert site.watch.stats().watch_inodes == 1
    finally:
        site.close()


@pytest.mark.parametrize("flag", [fanotify.FAN_MARK_FILESYSTEM, fanotify.FAN_MARK_ADD])
def test_a_root_without_a_mark_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: int
) -> None:
    refuse(monkeypatch, errno.EINVAL, fanotify.FAN_MARK_ADD)
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(source_watch, "LOCAL_FILE_SYSTEMS", () if flag > 1 else LOCAL_FILE_SYSTEMS)
    with pytest.raises(UnwatchableError, match=os.strerror(errno.EINVAL)):
        Site(tmp_path)
    assert [os.readlink(f"/proc/self/fd/{fd}") for fd in _open_fds()].count(
        "anon_inode:[fanotify]"
    ) == 0
    assert (
        len(os.listdir("/proc/self/fd")) <= before + 2
    )  # the fds of the table, which the test does not close


def _open_fds() -> list[str]:
    fds = []
    for fd in os.listdir("/proc/self/fd"):
        if os.path.lexists(f"/proc/self/fd/{fd}"):
            fds.append(fd)
    return fds


async def test_open_files_are_checked_for_changes_without_events(
    site: Site, autojump_clock: trio.testing.MockClock
) -> None:
    path = site.source / "f"
    path.write_bytes(b"12345")
    inode = site.look_up("f")
    fd = os.open(path, os.O_RDWR)
    try:
        site.inodes.opened(inode, fd)
        file = site.cached(inode)
        look(site.services, inode)
        assert file.size == 5
        os.ftruncate(fd, 3)
        async with trio.open_nursery() as nursery:
            files = OpenFiles(site.services, 0)
            nursery.start_soon(files.run)
            files.opened(inode)
            await trio.sleep(1.5)
            nursery.cancel_scope.cancel()
        assert file.size == 3
        assert inode.node in site.notifier.notifications
    finally:
        os.close(fd)
