"""Test the channel under a real scheduler, with a pair of sockets in place of the device."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyfuse3
import pytest
import trio

from cleanfs.fuse import channel as channel_module
from cleanfs.fuse import scheduler
from cleanfs.fuse.channel import LOST, Channel, roll_back
from cleanfs.fuse.device import find_device
from cleanfs.fuse.protocol import FUSE_FORGET, FUSE_FORGET_IN, FUSE_INTERRUPT, FUSE_INTERRUPT_IN
from cleanfs.fuse.reader_lock import ReaderLock
from cleanfs.fuse.request import Request, current, on_refusal, set_current
from cleanfs.fuse.session import native
from tests.harness.kernel import PID, Device

pytestmark = pytest.mark.skipif(native is None, reason="the native module was not built")

LIMIT_US = 50.0
LONG_US = 120e6
"""A window longer than any test."""

STATFS = 17
"""An opcode whose request has no body."""


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before = pyfuse3.trio  # type: ignore[attr-defined]  # imported there, not exported
    yield
    pyfuse3.trio = before  # type: ignore[attr-defined]  # imported there, not exported
    set_current(None)


def channel_of(device: Device, busy_poll_us: float = LIMIT_US, *, polls: bool = False) -> Channel:
    """Make a channel; if it ``polls``, its window is open as after some short waits."""
    channel = Channel(busy_poll_us)
    channel.receive_from(device.fd)
    if polls:
        open_window(channel)
    return channel


def open_window(channel: Channel) -> None:
    window(channel).open()


def window(channel: Channel) -> Any:  # noqa: ANN401  # of the native module
    return channel._native.window  # noqa: SLF001  # no public access


def later(call: Callable[[], None]) -> None:
    """Call from a thread, once the present task most likely sleeps: no task can run meanwhile."""
    threading.Timer(0.02, call).start()


def waits(channel: Channel) -> tuple[int, int]:
    return channel.stats().busy_poll_polled, channel.stats().busy_poll_slept


# -- waiting -------------------------------------------------------------------------------------


async def test_a_pending_message_is_found_without_sleeping(device: Device) -> None:
    channel = channel_of(device, LONG_US, polls=True)
    device.send(STATFS, 2)
    await channel.wait_readable(device.fd)
    assert waits(channel) == (1, 0)


async def test_a_closed_window_sleeps(device: Device) -> None:
    channel = channel_of(device)
    later(lambda: device.send(STATFS, 2))
    await channel.wait_readable(device.fd)
    assert waits(channel) == (0, 1)


async def test_a_late_message_is_found_and_closes_the_window(device: Device) -> None:
    channel = channel_of(device, polls=True)
    later(lambda: device.send(STATFS, 2))
    with trio.fail_after(30):
        await channel.wait_readable(device.fd)
    assert waits(channel) == (0, 1)
    assert window(channel).ns == 0


async def test_a_wait_continues_if_the_message_has_gone(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read would block the whole daemon: the message was an interrupt whose request has finished.

    Where trio's epoll is not known, the wait is trio's.
    """
    monkeypatch.setattr(scheduler, "_epoll_fd", lambda: -1)
    waited, wait = list[int](), trio.lowlevel.wait_readable

    async def wait_readable(fd: int) -> None:
        waited.append(fd)
        if len(waited) == 1:
            await trio.lowlevel.checkpoint()
        else:
            device.send(STATFS, 2)
            await wait(fd)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    await channel_of(device).wait_readable(device.fd)
    assert len(waited) == 2


async def test_the_end_of_the_connection_ends_a_wait(device: Device) -> None:
    """Libfuse must read it, so that pyfuse3 leaves its loop."""
    device.kernel.close()
    with trio.fail_after(5):
        await channel_of(device).wait_readable(device.fd)
        await channel_of(device, polls=True).wait_readable(device.fd)
    assert current() is None


@pytest.mark.parametrize("polls", [False, True])
async def test_a_message_with_a_handler_does_not_end_a_wait(
    device: Device, nursery: trio.Nursery, polls: bool
) -> None:
    channel = channel_of(device, LONG_US, polls=polls)
    handled = list[tuple[int, bytes]]()
    was_handled, ended = trio.Event(), trio.Event()

    def handle(request: Request, body: bytes) -> None:
        handled.append((request.nodeid, body))
        was_handled.set()

    channel.handlers[FUSE_FORGET] = handle

    async def wait() -> None:
        await channel.wait_readable(device.fd)
        request = current()
        assert request is not None
        assert request.unique == 4
        ended.set()

    nursery.start_soon(wait)
    device.send(FUSE_FORGET, 2, FUSE_FORGET_IN.pack(3))
    with trio.fail_after(30):
        await was_handled.wait()
    assert handled == [(1, FUSE_FORGET_IN.pack(3))]
    await trio.sleep(0.01)
    assert not ended.is_set()
    device.send(STATFS, 4)
    with trio.fail_after(30):
        await ended.wait()


async def test_the_task_that_waited_knows_its_request(device: Device) -> None:
    """Two requests of one requester are told apart."""
    channel = channel_of(device)
    known = dict[str, Request | None]()
    both_wait = trio.Event()

    async def handle(name: str, task_status: trio.TaskStatus[None]) -> None:
        await channel.wait_readable(device.fd)
        task_status.started()
        await both_wait.wait()
        known[name] = current()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for number, name in (2, "one"), (4, "other"):
                device.send(STATFS, number)
                await nursery.start(handle, name)
            both_wait.set()
    one, other = known["one"], known["other"]
    assert one is not None
    assert other is not None
    assert (one.unique, one.pid, one.uid, one.gid) == (2, PID, 1000, 100)
    assert (other.unique, other.pid) == (4, PID)
    assert channel.request(2) is one
    assert channel.request(6) is None


# -- other tasks ---------------------------------------------------------------------------------


async def test_a_finished_thread_is_served_during_polling(
    device: Device, nursery: trio.Nursery
) -> None:
    channel = channel_of(device, LONG_US, polls=True)

    async def hop() -> None:
        await trio.to_thread.run_sync(time.sleep, 0.01)
        device.send(STATFS, 2)

    nursery.start_soon(hop)
    await trio.lowlevel.checkpoint()
    with trio.fail_after(30):
        await channel.wait_readable(device.fd)
    assert channel.stats().busy_poll_polled == 1


async def test_other_tasks_and_deadlines_run_while_it_polls(
    device: Device, nursery: trio.Nursery
) -> None:
    channel = channel_of(device, LONG_US, polls=True)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        for _ in range(20):
            await trio.sleep(0.001)
            ticks += 1
        device.send(STATFS, 2)

    nursery.start_soon(tick)
    with trio.fail_after(30):
        await channel.wait_readable(device.fd)
    assert ticks == 20
    assert channel.stats().busy_poll_polled == 1


@pytest.mark.parametrize("opcode", [STATFS, FUSE_INTERRUPT])
async def test_continuous_messages_do_not_starve_other_tasks(
    device: Device, nursery: trio.Nursery, opcode: int
) -> None:
    channel = channel_of(device, LONG_US)
    unique = 0

    def more(*_: object) -> None:
        nonlocal unique
        unique += 2
        device.send(opcode, unique, FUSE_INTERRUPT_IN.pack(1))

    channel.handlers[FUSE_INTERRUPT] = more
    done = trio.CancelScope()

    async def other() -> None:
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        done.cancel()

    more()
    nursery.start_soon(other)
    with trio.fail_after(30), done:
        while True:
            open_window(channel)
            await channel.wait_readable(device.fd)
            more()
    assert done.cancelled_caught


async def test_a_wait_that_polls_can_be_cancelled(device: Device) -> None:
    channel = channel_of(device, LONG_US, polls=True)
    began = time.monotonic()
    with trio.move_on_after(0.05) as scope:
        await channel.wait_readable(device.fd)
    assert scope.cancelled_caught
    assert time.monotonic() - began < 30


async def test_closing_ends_a_wait_that_polls(device: Device, nursery: trio.Nursery) -> None:
    channel = channel_of(device, LONG_US, polls=True)

    async def close() -> None:
        await trio.sleep(0.01)
        channel.notify_closing(device.fd)

    nursery.start_soon(close)
    with trio.fail_after(30), pytest.raises(trio.ClosedResourceError):
        await channel.wait_readable(device.fd)


# -- replies -------------------------------------------------------------------------------------


async def test_a_reply_is_sent_to_its_request(device: Device) -> None:
    channel = channel_of(device)
    device.send(STATFS, 2)
    await channel.wait_readable(device.fd)
    request = current()
    assert request is not None
    assert channel.reply(request, 0, b"body")
    assert channel.reply(request, -errno.ENOSYS)
    assert device.replies() == [(2, 0, b"body"), (2, -errno.ENOSYS, b"")]


async def test_a_rollback_belongs_to_the_request_of_its_task(device: Device) -> None:
    channel = channel_of(device)
    undone = list[int]()
    requests = []
    for unique in 2, 4:
        device.send(STATFS, unique)
        await channel.wait_readable(device.fd)
        on_refusal(lambda unique=unique: undone.append(unique))  # type: ignore[misc]  # mypy does not infer it
        requests.append(current())
    one, other = requests
    assert one is not None
    assert other is not None
    roll_back(other)
    assert undone == [4]
    roll_back(other)
    assert undone == [4], "it is undone once"
    roll_back(one)
    assert undone == [4, 2]


def test_without_a_request_a_rollback_is_dropped() -> None:
    set_current(None)
    on_refusal(lambda: None)
    assert current() is None


# -- pyfuse3 -------------------------------------------------------------------------------------


class Native:
    """Stands for the native module while a session is mounted."""

    def __init__(self, device: Device | None) -> None:
        self._fd = None if device is None else device.fd
        self.attached = self.closed = False

    def session_fd(self) -> int | None:
        return self._fd

    def Channel(self, *_: object) -> "Native":  # noqa: N802  # a class there
        return self

    def attach(self) -> None:
        self.attached = True

    def close(self) -> None:
        self.closed = True


async def test_the_wait_of_pyfuse3_is_replaced_and_restored(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "native", fake := Native(device))
    channel = Channel(LIMIT_US)
    channel.begin()
    assert fake.attached
    seen = pyfuse3.trio  # type: ignore[attr-defined]  # imported there, not exported
    assert seen.lowlevel.wait_readable == channel.wait_readable
    assert seen.lowlevel.notify_closing == channel.notify_closing
    assert seen.ClosedResourceError is trio.ClosedResourceError
    assert seen.lowlevel.current_task is trio.lowlevel.current_task
    assert isinstance(seen.Lock(), ReaderLock)
    assert isinstance(seen.Lock(), trio.Lock), "a second lock is trio's"
    channel.close()
    assert fake.closed
    assert pyfuse3.trio is trio  # type: ignore[attr-defined]  # imported there, not exported


@pytest.mark.parametrize("lack", ["module", "session", "wait"])
def test_a_channel_that_cannot_be_had_causes_a_warning(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lack: str
) -> None:
    fake = {"module": None, "session": Native(None), "wait": Native(device)}[lack]
    monkeypatch.setattr(channel_module, "native", fake)
    if lack == "wait":
        pyfuse3.trio = None  # type: ignore[attr-defined]  # imported there, not exported
    before = pyfuse3.trio  # type: ignore[attr-defined]  # imported there, not exported
    channel = Channel(LIMIT_US)
    channel.begin()
    channel.confirm()
    assert caplog.text.count(LOST) == 1
    assert pyfuse3.trio is before  # type: ignore[attr-defined]  # imported there, not exported
    channel.close()


async def test_a_pyfuse3_that_does_not_use_the_wait_causes_a_warning(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    unused, used = channel_of(device), channel_of(device)
    used.make_lock()
    used.confirm()
    assert LOST not in caplog.text
    unused.confirm()
    assert LOST in caplog.text


def test_the_device_is_found_without_the_channel() -> None:
    assert find_device() == -1
    with open("/dev/fuse", "rb", buffering=0) as one:
        assert find_device() == one.fileno()
        with open("/dev/fuse", "rb", buffering=0):
            assert find_device() == -1, "it may be either"


async def test_the_device_becomes_non_blocking(device: Device) -> None:
    os.set_blocking(device.fd, True)
    assert channel_of(device).device == device.fd
    assert not os.get_blocking(device.fd)
