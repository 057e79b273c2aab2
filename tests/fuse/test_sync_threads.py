"""Test FSYNCs that native threads make, with a pair of sockets in place of the device."""

import errno
import os
import select
import struct
from pathlib import Path
from typing import Any

import pytest

from cleanfs.backends.ops import FileKey
from cleanfs.cache.state import CacheState, FileState, HandleState, KernelState
from cleanfs.fuse.session import native
from cleanfs.vfs.directory_state import DirectoryState
from cleanfs.vfs.inode_state import InodeStates
from tests.harness.kernel import PID, Device
from tests.harness.mounting import wait_until

pytestmark = pytest.mark.skipif(
    native is None or not CacheState.native, reason="the native modules are not in use"
)

FSYNC, FSYNCDIR = 20, 30
FH = 7


def body(*, data_only: bool = False) -> bytes:
    """Pack a struct fuse_fsync_in."""
    return struct.pack("=QII", FH, int(data_only), 0)


def channel_of(device: Device, fd: int) -> Any:  # noqa: ANN401  # of the native module
    """Make a native channel that serves one open file."""
    assert native is not None
    channel = native.Channel(device.fd, -1, 0, lambda *_: b"", lambda _: None)
    channel.serve_from(CacheState(4096))
    handle = HandleState(FileState(1, FileKey(1, 2, b"")), KernelState(), fd)
    channel.add_handle(FH, handle)
    return channel


def replies(device: Device, count: int) -> list[tuple[int, int, bytes]]:
    """Wait for so many replies."""
    found = device.replies()
    while len(found) < count:
        assert select.select([device.kernel], [], [], 30)[0]
        found += device.replies()
    return found


def test_a_directory_is_synced_without_python(device: Device, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    channel = channel_of(device, fd)
    inodes = InodeStates()
    channel.serve_metadata(inodes)
    device.send(FSYNCDIR, 2, body())
    assert channel.receive_now().unique == 2
    directory = DirectoryState(fd)
    channel.add_directory(FH, directory)
    device.send(FSYNCDIR, 4, body())
    assert channel.receive_now() is None
    assert replies(device, 1) == [(4, 0, b"")]
    os.close(fd)


@pytest.mark.parametrize("data_only", [False, True])
def test_a_file_is_synced_without_python(device: Device, tmp_path: Path, data_only: bool) -> None:
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    channel = channel_of(device, fd)
    device.send(FSYNC, 2, body(data_only=data_only))
    assert channel.receive_now() is None
    assert replies(device, 1) == [(2, 0, b"")]
    assert channel.served == 1
    os.close(fd)


def test_an_error_is_the_reply(device: Device) -> None:
    """A pipe cannot be synced."""
    fd, other = os.pipe()
    channel = channel_of(device, fd)
    device.send(FSYNC, 2, body())
    assert channel.receive_now() is None
    assert replies(device, 1) == [(2, -errno.EINVAL, b"")]
    os.close(fd)
    os.close(other)


def test_the_file_may_be_closed_meanwhile(device: Device, tmp_path: Path) -> None:
    """As after its requester was killed: the number may be another file's by then."""
    for unique in range(2, 400, 2):
        fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
        channel = channel_of(device, fd)
        device.send(FSYNC, unique, body())
        assert channel.receive_now() is None
        channel.remove_handle(FH)
        os.close(fd)
        assert replies(device, 1) == [(unique, 0, b"")]


def test_many_calls_all_get_their_reply_and_are_forgotten(device: Device, tmp_path: Path) -> None:
    """Those for which no thread is free are Python's."""
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    channel = channel_of(device, fd)
    left, asked_for, found = 0, 0, []
    for unique in range(2, 2002, 2):
        device.send(FSYNC, unique, body())
        left += channel.receive_now() is not None
        request = channel.request(unique)
        if request is not None and request.opcode == FSYNC:
            asked_for += 1
            assert (request.unique, request.pid) == (unique, PID)
        found += device.replies()
    found += replies(device, 1000 - left - len(found))
    assert {error for _, error, _ in found} == {0}
    assert len({unique for unique, *_ in found}) == 1000 - left
    assert asked_for > 0
    wait_until(lambda: channel.syncing == 0)
    channel.receive_now()
    assert len(channel) == left, "those of Python, which has not replied"
    os.close(fd)
