"""Test requests with handlers of ours, by raw messages, under a real scheduler."""

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pyfuse3
import pytest
import trio
import trio.lowlevel
import trio.testing
from pyfuse3 import FUSEError

from cleanfs.eager import before_wait
from cleanfs.fs.handler import handler
from cleanfs.fuse import channel as channel_module
from cleanfs.fuse.channel import AsyncHandler, Channel
from cleanfs.fuse.interrupts import Interrupts
from cleanfs.fuse.protocol import FUSE_FALLOCATE, FUSE_INTERRUPT, FUSE_INTERRUPT_IN, FUSE_IOCTL
from cleanfs.fuse.request import Request, current, on_refusal
from cleanfs.fuse.session import native
from cleanfs.source.io import Backing
from tests.harness.kernel import Device

pytestmark = pytest.mark.skipif(native is None, reason="the native module was not built")

BODY = bytes(32)
"""Long enough for the struct of an FALLOCATE or IOCTL."""


@asynccontextmanager
async def serving(handle: AsyncHandler) -> AsyncIterator[tuple[Device, Channel]]:
    """Serve FALLOCATE by ``handle``."""
    device = Device()
    channel = Channel(0)
    channel.async_handlers[FUSE_FALLOCATE] = handle
    channel.receive_from(device.fd)
    Interrupts(channel, Backing())
    before = pyfuse3.trio  # type: ignore[attr-defined]  # imported there, not exported
    try:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(channel.run)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(channel.wait_readable, device.fd)
                yield device, channel
                nursery.cancel_scope.cancel()
    finally:
        pyfuse3.trio = before  # type: ignore[attr-defined]  # see above
        channel.close()
        device.close()


async def replies(device: Device, count: int) -> list[tuple[int, int, bytes]]:
    found = list[tuple[int, int, bytes]]()
    while len(found) < count:
        found += device.replies()
        await trio.sleep(0.001)
    return found


async def test_the_reply_is_what_the_handler_returns() -> None:
    async def handle(request: Request, body: bytes) -> bytes:
        assert current() is request
        await before_wait()
        await trio.lowlevel.checkpoint()
        return b"reply to %d" % request.unique + body[:1]

    async with serving(handle) as (device, channel):
        for unique in (2, 4, 6):
            device.send(FUSE_FALLOCATE, unique, b"x" + BODY[1:])
        found = await replies(device, 3)
        assert sorted(found) == [(unique, 0, b"reply to %dx" % unique) for unique in (2, 4, 6)]
        assert channel.request(2) is None


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (FUSEError(errno.EXDEV), errno.EXDEV),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (FUSEError(errno.ENOSYS), errno.EOPNOTSUPP),  # the kernel would ask no more
        (RuntimeError("a bug"), errno.EIO),
    ],
)
async def test_an_error_is_replied(
    raised: Exception, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    @handler
    async def handle(request: Request, body: bytes) -> bytes:
        raise raised

    async with serving(handle) as (device, _):
        device.send(FUSE_FALLOCATE, 2, BODY)
        assert await replies(device, 1) == [(2, -error, b"")]
    assert ("failed" in caplog.text) == isinstance(raised, RuntimeError)


async def test_one_that_does_not_wait_has_no_task() -> None:
    tasks = list[trio.lowlevel.Task]()

    async def handle(request: Request, body: bytes) -> bytes:
        if request.unique == 4:
            await before_wait()
        tasks.append(trio.lowlevel.current_task())
        return b""

    async with serving(handle) as (device, _):
        for unique in (2, 4, 6):
            device.send(FUSE_FALLOCATE, unique, BODY)
        await replies(device, 3)
    first, second, third = (task.name for task in tasks)
    assert "wait_readable" in first
    assert {second, third} == {first, "cleanfs.fuse.channel.Channel._finish"}


async def test_one_that_waits_holds_up_no_other() -> None:
    goes_on = trio.Event()

    async def handle(request: Request, body: bytes) -> bytes:
        if request.unique == 2:
            await before_wait()
            await goes_on.wait()
        return b""

    async with serving(handle) as (device, _):
        device.send(FUSE_FALLOCATE, 2, BODY)
        device.send(FUSE_FALLOCATE, 4, BODY)
        assert await replies(device, 1) == [(4, 0, b"")]
        goes_on.set()
        assert await replies(device, 1) == [(2, 0, b"")]


async def test_their_number_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "MAX_REQUESTS", 2)
    begun, goes_on = list[int](), trio.Event()

    async def handle(request: Request, body: bytes) -> bytes:
        begun.append(request.unique)
        await before_wait()
        await goes_on.wait()
        return b""

    async with serving(handle) as (device, _):
        for unique in (2, 4, 6):
            device.send(FUSE_FALLOCATE, unique, BODY)
        with trio.move_on_after(0.2):
            await replies(device, 1)
        assert begun == [2, 4]
        goes_on.set()
        assert len(await replies(device, 3)) == 3


async def test_an_interrupt_is_told_also_before_the_handler_begins() -> None:
    async def handle(request: Request, body: bytes) -> bytes:
        await before_wait()
        with trio.CancelScope() as wait:
            request.on_interrupt = wait.cancel
            if request.interrupted:
                wait.cancel()
            await trio.sleep_forever()
        raise FUSEError(errno.EINTR)

    async with serving(handle) as (device, _):
        device.send(FUSE_FALLOCATE, 2, BODY)
        device.send(FUSE_INTERRUPT, 3, FUSE_INTERRUPT_IN.pack(2))
        assert await replies(device, 1) == [(2, -errno.EINTR, b"")]
        device.send(FUSE_FALLOCATE, 4, BODY)
        with trio.move_on_after(0.05):
            await replies(device, 1)
        device.send(FUSE_INTERRUPT, 5, FUSE_INTERRUPT_IN.pack(4))
        assert await replies(device, 1) == [(4, -errno.EINTR, b"")]


async def test_a_refused_reply_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    undone = trio.Event()

    async def handle(request: Request, body: bytes) -> bytes:
        on_refusal(undone.set)
        return b""

    async with serving(handle) as (device, channel):
        monkeypatch.setattr(channel, "reply", lambda *_: False)
        device.send(FUSE_FALLOCATE, 2, BODY)
        await undone.wait()


async def test_an_unknown_ioctl_gets_enotty_and_no_handler() -> None:
    async def handle(request: Request, body: bytes) -> bytes:
        return b""

    async with serving(handle) as (device, channel):
        device.send(FUSE_IOCTL, 2, bytes(32))
        assert await replies(device, 1) == [(2, -errno.ENOTTY, b"")]
        assert channel.request(2) is None
