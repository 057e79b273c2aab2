"""Test notifications byte by byte, and the fd that they are sent through."""

import contextlib
import fcntl
import os
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pyfuse3
import pytest
import trio
import trio.lowlevel
import trio.testing

from cleanfs.fuse import notify
from cleanfs.fuse.notify import Notifier, entry_message, inode_message
from cleanfs.fuse.size_sync import MountedAt


@pytest.fixture
def device() -> Iterator[tuple[int, int]]:
    """Make a pipe in place of the device."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(writer, True)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_messages_have_the_kernels_layout() -> None:
    assert inode_message(7) == struct.pack("=IiQ Qqq", 40, 2, 0, 7, 0, 0)
    assert inode_message(7, attributes_only=True) == struct.pack("=IiQ Qqq", 40, 2, 0, 7, -1, 0)
    assert inode_message(7, offset=5, length=9) == struct.pack("=IiQ Qqq", 40, 2, 0, 7, 5, 9)
    assert entry_message(7, b"name") == struct.pack("=IiQ QII", 37, 3, 0, 7, 4, 0) + b"name\0"
    assert entry_message(7, b"n", 1) == struct.pack("=IiQ QII", 34, 3, 0, 7, 1, 1) + b"n\0"


async def test_notifications_use_an_fd_of_their_own(
    device: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The functions of libfuse would know no range of an inode."""
    for name in ("invalidate_inode", "invalidate_entry"):
        monkeypatch.setattr(pyfuse3, name, None)
    monkeypatch.setattr(notify, "PAGES_SECONDS", 10)  # a busy machine would exceed a shorter one
    monkeypatch.setattr(notify, "STUCK_SECONDS", 10)  # after which order is not kept
    reader, writer = device
    notifier = Notifier()
    notifier.use_device(writer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(notifier.run)
        notifier.inode(7)
        notifier.entry(7, b"a")
        notifier.expire(7, b"b")
        with trio.fail_after(10):
            await notifier.drained()
            await notifier.attributes_changed(8)
            await notifier.drop_names([(7, b"c"), (7, b"d")])
            await notifier.written(9, 4096, 12388, lambda: False)
        nursery.cancel_scope.cancel()
    expected = [inode_message(7), entry_message(7, b"a"), entry_message(7, b"b", 1)]
    expected.append(inode_message(8, attributes_only=True))
    expected += [entry_message(7, b"c"), entry_message(7, b"d")]
    expected.append(inode_message(9, offset=4096, length=8292))
    assert os.read(reader, 4096) == b"".join(expected)
    before = len(os.listdir("/proc/self/fd"))
    notifier.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1


class PendingNodes:
    """Notes the nodes of which an invalidation is said to be pending."""

    def __init__(self) -> None:
        self.nodes = set[int]()

    def set_invalidating(self, node: int, pending: bool) -> None:
        (self.nodes.add if pending else self.nodes.discard)(node)


async def empty(reader: int) -> None:
    """Empty a pipe again and again. One page has room for one waiting writer at a time."""
    while True:
        with contextlib.suppress(BlockingIOError):
            os.read(reader, 4096)
        await trio.sleep(0.01)


async def test_an_invalidation_is_pending_until_it_was_sent(device: tuple[int, int]) -> None:
    reader, writer = device
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, bytes(4096))  # the pipe is full
    notifier, pending = Notifier(), PendingNodes()
    notifier.use_device(writer)
    notifier.note_pending_in(pending)
    notifier.inode(7)
    notifier.entry(8, b"name")
    notifier.expire(9, b"name")
    assert pending.nodes == {7}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(notifier.run)
        nursery.start_soon(notifier.pages_dropped, 10)
        await trio.testing.wait_all_tasks_blocked()
        notifier.inode(7)  # for a later change
        assert pending.nodes == {7, 10}
        nursery.start_soon(empty, reader)
        with trio.fail_after(10):
            await notifier.drained()
        assert not pending.nodes
        nursery.cancel_scope.cancel()
    notifier.close()


@pytest.mark.parametrize("cause", ["waits for the reply", "waits for a read", "is slow"])
async def test_a_write_waits_until_its_pages_are_dropped_unless_the_drop_waits_for_the_reply(
    device: tuple[int, int], monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    monkeypatch.setattr(notify, "PAGES_SECONDS", 30)
    reader, writer = device
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, bytes(4096))  # the pipe is full
    if cause != "is slow":  # as a thread that waits for a page
        monkeypatch.setattr(notify._Drop, "waits", lambda drop: drop.thread > 0)  # noqa: SLF001  # no public access
    notifier = Notifier()
    notifier.use_device(writer)
    dropped = False

    async def drop_pages() -> None:
        nonlocal dropped
        await trio.sleep(0.2)
        dropped = True
        os.read(reader, 4096)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(notifier.run)
        if cause != "waits for the reply":
            nursery.start_soon(drop_pages)
        with trio.fail_after(20):
            while notifier._nursery is None:  # noqa: SLF001  # until it runs
                await trio.lowlevel.checkpoint()
            await notifier.written(9, 0, 100, lambda: cause == "waits for a read" and not dropped)
            if cause == "waits for the reply":
                nursery.start_soon(drop_pages)
            else:
                assert dropped
            while notifier._writers or not dropped:  # noqa: ASYNC110, SLF001  # there is no other sign
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    notifier.close()


def test_a_thread_that_writes_after_the_close_writes_to_dev_null(device: tuple[int, int]) -> None:
    """It must not write to another file with the same fd number."""
    reader, writer = device
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    before = len(os.listdir("/proc/self/fd"))
    os.write(writer, bytes(4096))
    notifier = Notifier()
    notifier.use_device(writer)
    thread = threading.Thread(target=trio.run, args=(notifier.attributes_changed, 7))
    thread.start()
    while not notifier._writers:  # noqa: SLF001  # there is no other sign
        threading.Event().wait(0.001)
    notifier.close()
    assert os.read(reader, 4096) == bytes(4096)  # now the pipe has space
    thread.join(10)
    assert not thread.is_alive()
    assert len(os.listdir("/proc/self/fd")) == before
    trio.run(notifier.attributes_changed, 8)  # too late, and no error


class Kernel:
    """Simulates refreshes that last until the test lets them end."""

    def __init__(self) -> None:
        self.refreshed: list[int] = []
        self.paths: list[bytes] = []
        self.done = threading.Event()
        self._begun = threading.Semaphore(0)

    def refresh(self, _: MountedAt, node: int, generation: int, path: bytes) -> bool:
        self.refreshed.append(node)
        self.paths.append(path)
        self._begun.release()
        return self.done.wait(10)

    async def refresh_begins(self) -> bool:
        """Wait until another refresh begins. Return False after 10 s."""
        return await trio.to_thread.run_sync(self._begun.acquire, True, 10)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(notify, "refresh_kernel_size", kernel.refresh)
    monkeypatch.setattr(notify, "can_open_handles", lambda: True)
    return kernel


@asynccontextmanager
async def running(device: int) -> AsyncIterator[Notifier]:
    """Run a notifier that can refresh sizes, for 20 s at most."""
    notifier = Notifier()
    notifier.use_device(device)
    notifier.start()
    notifier.use_mount(MountedAt("/x", 1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(notifier.run)
        with trio.fail_after(20):
            yield notifier
        nursery.cancel_scope.cancel()
    notifier.close()


async def test_a_change_during_a_refresh_causes_another_one(
    device: tuple[int, int], kernel: Kernel
) -> None:
    """The refresh may have missed the change."""
    async with running(device[1]) as notifier:
        notifier.refresh(7, 1, b"f")
        assert await kernel.refresh_begins()
        for _ in range(3):
            notifier.refresh(7, 1, b"f")
            await notifier.drained()
        kernel.done.set()
        assert await kernel.refresh_begins()
        await trio.sleep(0.05)
    assert kernel.refreshed == [7, 7]


async def test_an_open_starts_a_refresh_even_during_a_long_one(
    device: tuple[int, int], kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "REFRESH_SECONDS", 0.2)
    async with running(device[1]) as notifier:
        notifier.refresh(7, 1, b"f")
        assert await kernel.refresh_begins()
        await notifier.refreshed(7, 1, b"f")
        kernel.done.set()
        assert await kernel.refresh_begins()
    assert kernel.refreshed == [7, 7]


@pytest.mark.parametrize("privileged", [True, False])
@pytest.mark.parametrize("path", [b"d/f", b""])
async def test_a_size_is_refreshed_by_path_only_if_it_cannot_be_by_handle(
    device: tuple[int, int],
    kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
    privileged: bool,
    path: bytes,
) -> None:
    monkeypatch.setattr(notify, "can_open_handles", lambda: privileged)
    kernel.done.set()
    async with running(device[1]) as notifier:
        await notifier.refreshed(7, 1, path)
    assert kernel.paths == ([b""] if privileged else [path] if path else [])


async def test_without_a_thread_a_notification_is_sent_later(
    device: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mount stays alive."""
    run_sync, refused = trio.to_thread.run_sync, 0

    async def no_thread(*args: object, **options: object) -> object:
        nonlocal refused
        if refused < 2:
            refused += 1
            raise RuntimeError("can't start new thread")
        return await run_sync(*args, **options)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(trio.to_thread, "run_sync", no_thread)
    monkeypatch.setattr(notify, "NO_THREAD_SECONDS", 0.01)
    notifier = Notifier()
    notifier.use_device(device[1])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(notifier.run)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(10):
            await notifier.written(9, 0, 100, lambda: False)
            notifier.inode(7)
            await notifier.drained()
        nursery.cancel_scope.cancel()
    notifier.close()
    assert refused == 2
    assert os.read(device[0], 4096) == inode_message(9, offset=0, length=100) + inode_message(7)


async def test_without_a_free_thread_a_write_invalidates_the_whole_file_later(
    device: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All MAX_STUCK threads are stuck in notifications."""
    monkeypatch.setattr(notify, "PAGES_SECONDS", 0.05)
    notifier = Notifier()
    notifier.use_device(device[1])
    limiter = notifier._limiter  # noqa: SLF001  # no public access
    async with trio.open_nursery() as nursery:
        nursery.start_soon(notifier.run)
        await trio.testing.wait_all_tasks_blocked()
        limiter.total_tokens, total = 1, limiter.total_tokens
        await limiter.acquire()
        tasks = len(nursery.child_tasks)
        with trio.fail_after(10):
            for _ in range(3):
                await notifier.written(9, 0, 100, lambda: False)
            await trio.testing.wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == tasks
            limiter.total_tokens = total
            limiter.release()
            await notifier.drained()
        nursery.cancel_scope.cancel()
    notifier.close()
    sent = os.read(device[0], 4096)
    assert sent in (inode_message(9), 2 * inode_message(9))


async def test_an_error_in_a_thread_is_not_taken_for_a_missing_thread() -> None:
    notifier = Notifier()
    calls = 0

    def fail() -> None:
        nonlocal calls
        calls += 1
        raise RuntimeError("a bug")

    with trio.fail_after(10), pytest.raises(RuntimeError, match="a bug"):
        await notifier._in_a_thread(fail)  # noqa: SLF001  # no notification raises such an error
    assert calls == 1
