"""Test the release of killed requesters, with a pair of sockets in place of the device."""

import errno
import os
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import pytest
import trio
from trio.testing import MockClock

from cleanfs.fuse import interrupts as interrupts_module
from cleanfs.fuse.channel import Channel
from cleanfs.fuse.interrupts import (
    CHECK_SECONDS,
    DIRECT_CHECK_SECONDS,
    RELEASE_SECONDS,
    Interrupts,
)
from cleanfs.fuse.protocol import FUSE_INTERRUPT, FUSE_INTERRUPT_IN
from cleanfs.fuse.request import Request, current, on_refusal, set_current
from cleanfs.fuse.session import native
from cleanfs.source.io import Backing
from tests.harness.kernel import Device
from tests.harness.served import READ, READ_IN, WRITE, WRITE_IN

pytestmark = pytest.mark.skipif(native is None, reason="the native module was not built")

T = TypeVar("T")

STATFS = 17
KILLED, ALIVE = 77, 88


@pytest.fixture(autouse=True)
def only_one_is_killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let one requester be killed. Returns the list that holds it."""
    killed = [KILLED]
    monkeypatch.setattr(interrupts_module, "is_killed", killed.__contains__)

    async def at_once(call: Callable[..., object], *arguments: object, **_: bool) -> object:
        await trio.lowlevel.checkpoint()
        return call(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)  # the clock does not wait for a thread
    return killed


class Rig:
    """The kernel's end, and what releases requesters at the other."""

    def __init__(self) -> None:
        self.device = Device()
        self.channel = Channel(0)
        self.channel.receive_from(self.device.fd)
        self.backing = Backing()
        self.releases = 0
        self.interrupts = Interrupts(self.channel, self.backing, self._before_release)

    def _before_release(self) -> None:
        self.releases += 1

    async def request(self, unique: int, pid: int, opcode: int = STATFS, body: bytes = b"") -> Request:
        """Have a request received."""
        self.device.send(opcode, unique, body, pid=pid)
        await self.channel.wait_readable(self.device.fd)
        request = current()
        assert request is not None
        return request

    async def interrupt(self, *uniques: int) -> None:
        """Have signals of these requests' processes received."""
        for unique in uniques:
            self.device.send(FUSE_INTERRUPT, unique | 1, FUSE_INTERRUPT_IN.pack(unique))
        await self.request(1000, pid=ALIVE)

    async def run(self, seconds: float) -> None:
        """Let it release whom it must; with an autojump clock that takes no time."""
        with trio.move_on_after(seconds):
            await self.interrupts.run()

    def replies(self) -> list[tuple[int, int]]:
        return [(unique, error) for unique, error, _ in self.device.replies()]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    yield rig
    rig.device.close()
    set_current(None)


SOON = RELEASE_SECONDS + 2 * CHECK_SECONDS


async def test_a_killed_requester_is_released_and_no_other(rig: Rig, autojump_clock: MockClock) -> None:
    """Two of these requests are of one requester; an interrupt names the request."""
    for unique, pid in (2, KILLED), (4, ALIVE), (6, KILLED):
        await rig.request(unique, pid)
    await rig.interrupt(2, 4)
    await rig.run(SOON)
    assert rig.replies() == [(2, -errno.EINTR)]
    assert (rig.releases, rig.backing.abandoned_calls) == (1, 1)
    await rig.run(10)
    assert not rig.replies(), "it is released once"


async def test_a_request_must_have_lasted_a_while(rig: Rig, autojump_clock: MockClock) -> None:
    await rig.request(2, KILLED)
    await rig.interrupt(2)
    await rig.run(RELEASE_SECONDS - 0.01)
    assert not rig.replies()


async def test_a_requester_that_is_killed_after_another_signal_is_released(
    rig: Rig, autojump_clock: MockClock, only_one_is_killed: list[int]
) -> None:
    """The kernel reports the first signal only."""
    await rig.request(2, ALIVE)
    await rig.interrupt(2)
    await rig.run(60)
    assert not rig.replies()
    only_one_is_killed.append(ALIVE)
    await rig.run(SOON)
    assert rig.replies() == [(2, -errno.EINTR)]


async def test_a_killed_requester_of_direct_io_is_released_without_an_interrupt(
    rig: Rig, autojump_clock: MockClock
) -> None:
    read = READ_IN.pack(1, 0, 0, 0, 0, os.O_DIRECT, 0)
    write = WRITE_IN.pack(1, 0, 0, 0, 0, os.O_DIRECT | os.O_RDWR, 0)
    await rig.request(2, KILLED, READ, read)
    await rig.request(4, KILLED, WRITE, write)
    await rig.request(6, ALIVE, READ, read)
    await rig.request(8, 0, WRITE, write)
    await rig.request(10, KILLED, READ, READ_IN.pack(1, 0, 0, 0, 0, 0, 0))
    await rig.run(DIRECT_CHECK_SECONDS - 0.01)
    assert not rig.replies(), "they must have lasted a while"
    await rig.run(3 * DIRECT_CHECK_SECONDS)
    assert sorted(rig.replies()) == [(2, -errno.EINTR), (4, -errno.EINTR)]
    assert (rig.releases, rig.backing.abandoned_calls) == (2, 2)
    await rig.run(10)
    assert not rig.replies(), "they are released once"


async def test_direct_io_of_a_process_that_exits_is_released(
    rig: Rig, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that submitted it may have ended."""
    exiting = list[int]()
    monkeypatch.setattr(interrupts_module, "process_of", {ALIVE: 1000}.get)
    monkeypatch.setattr(interrupts_module, "is_exiting", exiting.__contains__)
    await rig.request(2, ALIVE, READ, READ_IN.pack(1, 0, 0, 0, 0, os.O_DIRECT, 0))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.interrupts.run)
        await trio.sleep(10)
        assert not rig.replies()
        monkeypatch.setattr(interrupts_module, "process_of", lambda thread: 0)
        exiting.append(1000)
        await trio.sleep(2 * DIRECT_CHECK_SECONDS)
        assert rig.replies() == [(2, -errno.EINTR)]
        nursery.cancel_scope.cancel()


async def test_the_end_of_a_released_call_is_rolled_back(rig: Rig, autojump_clock: MockClock) -> None:
    request = await rig.request(2, KILLED)
    undone = list[int]()
    on_refusal(lambda: undone.append(2))
    await rig.interrupt(2)
    await rig.run(SOON)
    assert not undone
    assert rig.backing.abandoned_calls == 1
    rig.channel.refused(request)  # the reply of its handler
    assert undone == [2]
    assert rig.backing.abandoned_calls == 0
    rig.channel.refused(await rig.request(4, ALIVE))
    assert rig.backing.abandoned_calls == 0


async def test_an_interrupt_of_an_unknown_request_is_ignored(
    rig: Rig, autojump_clock: MockClock
) -> None:
    await rig.interrupt(2)
    await rig.run(2 * CHECK_SECONDS)
    await rig.request(2, KILLED)
    await rig.run(60)
    assert not rig.replies()


async def test_an_interrupt_may_overtake_its_request(rig: Rig, autojump_clock: MockClock) -> None:
    """The device tells of it, and the thread of a queue hands the request over."""
    await rig.interrupt(2)
    request = await rig.request(2, KILLED)
    await rig.run(SOON)
    assert request.interrupted
    assert rig.replies() == [(2, -errno.EINTR)]


async def test_a_connection_that_has_ended_does_not_end_the_watch(
    rig: Rig, autojump_clock: MockClock
) -> None:
    await rig.request(2, KILLED)
    await rig.interrupt(2)
    rig.device.kernel.close()
    await rig.run(SOON)
    assert rig.backing.abandoned_calls == 0
