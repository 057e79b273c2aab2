"""What the kernel is told, byte by byte, and by which descriptor."""

import fcntl
import os
import struct
import threading
from collections.abc import Iterator

import pyfuse3
import pytest
import trio

from cleanfs import notify
from cleanfs.notify import Notifier, entry_message, inode_message


@pytest.fixture
def device() -> Iterator[tuple[int, int]]:
    """A pipe in the device's place: what is written arrives."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(writer, True)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_messages_are_laid_out_as_the_kernel_has_them() -> None:
    assert inode_message(7) == struct.pack("=IiQ Qqq", 40, 2, 0, 7, 0, 0)
    assert inode_message(7, attributes_only=True) == struct.pack("=IiQ Qqq", 40, 2, 0, 7, -1, 0)
    assert inode_message(7, offset=5, length=9) == struct.pack("=IiQ Qqq", 40, 2, 0, 7, 5, 9)
    assert entry_message(7, b"name") == struct.pack("=IiQ QII", 37, 3, 0, 7, 4, 0) + b"name\0"
    assert entry_message(7, b"n", 1) == struct.pack("=IiQ QII", 34, 3, 0, 7, 1, 1) + b"n\0"


async def test_notifications_go_by_a_descriptor_of_ours(
    device: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libfuse's stands for something else while ``interrupts`` has lent it a message."""
    for name in ("invalidate_inode", "invalidate_entry"):
        monkeypatch.setattr(pyfuse3, name, None)
    monkeypatch.setattr(notify, "PAGES_SECONDS", 10)  # on a busy machine nobody waits for it else
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
            await notifier.pages(9, 4096, 100)
        nursery.cancel_scope.cancel()
    expected = [inode_message(7), entry_message(7, b"a"), entry_message(7, b"b", 1)]
    expected.append(inode_message(8, attributes_only=True))
    expected += [entry_message(7, b"c"), entry_message(7, b"d")]
    expected.append(inode_message(9, offset=4096, length=100))
    assert os.read(reader, 4096) == b"".join(expected)
    before = len(os.listdir("/proc/self/fd"))
    notifier.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_who_still_writes_when_the_device_is_closed_writes_nowhere(device: tuple[int, int]) -> None:
    """And to no other file that got the number meanwhile."""
    reader, writer = device
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    before = len(os.listdir("/proc/self/fd"))
    os.write(writer, bytes(4096))
    notifier = Notifier()
    notifier.use_device(writer)
    thread = threading.Thread(target=trio.run, args=(notifier.attributes_changed, 7))
    thread.start()
    while not notifier._writers:  # noqa: SLF001  # nobody else can tell
        threading.Event().wait(0.001)
    notifier.close()
    assert os.read(reader, 4096) == bytes(4096)  # now there is room
    thread.join(10)
    assert not thread.is_alive()
    assert len(os.listdir("/proc/self/fd")) == before
    trio.run(notifier.attributes_changed, 8)  # too late, and no error
