"""Test that a channel that sleeps in trio's place wakes for all that trio would wake for."""

import os
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing

from cleanfs.fuse.channel import Channel
from cleanfs.fuse.request import set_current
from cleanfs.fuse.scheduler import Scheduler
from cleanfs.fuse.session import native
from tests.harness.kernel import Device

pytestmark = pytest.mark.skipif(native is None, reason="the native module was not built")

LATE_SECONDS = 5.0
"""Later than any event here on a busy machine; sooner than what else would end the sleep."""

LONG_SECONDS = 60.0

STATFS = 17


@pytest.fixture(autouse=True)
def no_request() -> Iterator[None]:
    yield
    set_current(None)


@pytest.fixture
async def sleeping(device: Device) -> AsyncIterator[Channel]:
    """Return a channel in whose wait a task is. It sleeps whenever no other task can run."""
    channel = Channel(0)
    channel.receive_from(device.fd)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.wait_readable, device.fd)
        nursery.start_soon(trio.sleep, LONG_SECONDS)
        yield channel
        nursery.cancel_scope.cancel()
    channel.close()


async def test_a_deadline(sleeping: Channel) -> None:
    began = time.monotonic()
    await trio.sleep(0.05)
    assert 0.05 <= time.monotonic() - began < LATE_SECONDS
    assert sleeping.stats().busy_poll_slept


async def test_a_deadline_that_a_thread_moves_earlier(sleeping: Channel) -> None:
    def move() -> None:
        time.sleep(0.05)
        trio.from_thread.run_sync(setattr, scope, "deadline", -float("inf"))

    began = time.monotonic()
    with trio.CancelScope(deadline=trio.current_time() + LONG_SECONDS) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, move)
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert time.monotonic() - began < LATE_SECONDS
    assert sleeping.stats().busy_poll_slept


async def test_a_thread_that_ends(sleeping: Channel) -> None:
    began = time.monotonic()
    await trio.to_thread.run_sync(time.sleep, 0.05)
    assert time.monotonic() - began < LATE_SECONDS
    assert sleeping.stats().busy_poll_slept


async def test_a_thread_that_runs_something_here(sleeping: Channel) -> None:
    token, ran = trio.lowlevel.current_trio_token(), trio.Event()
    threading.Timer(0.05, token.run_sync_soon, (ran.set,)).start()
    with trio.fail_after(LATE_SECONDS):
        await ran.wait()
    assert sleeping.stats().busy_poll_slept


async def test_a_signal(sleeping: Channel) -> None:
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with trio.fail_after(LATE_SECONDS):
            assert await anext(signals) == signal.SIGUSR1
    assert sleeping.stats().busy_poll_slept


async def test_an_fd(sleeping: Channel) -> None:
    reader, writer = os.pipe()
    threading.Timer(0.05, os.write, (writer, b"x")).start()
    with trio.fail_after(LATE_SECONDS):
        await trio.lowlevel.wait_readable(reader)
    assert sleeping.stats().busy_poll_slept
    os.close(reader)
    os.close(writer)


async def test_tasks_that_wake_each_other_run_before_it_sleeps(sleeping: Channel) -> None:
    """No event of the kernel announces them."""
    send, receive = trio.open_memory_channel[int](0)

    async def pass_on() -> None:
        for number in range(100):
            await send.send(number)
        send.close()

    with trio.fail_after(LATE_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pass_on)
            assert [number async for number in receive] == list(range(100))


async def test_all_of_it_at_once(device: Device, sleeping: Channel) -> None:
    """Threads, deadlines, signals, fds and messages come at random. None comes late."""
    chosen, latest = random.Random(1), 0.0
    handled = list[int]()

    async def timed(seconds: float, in_thread: bool) -> None:
        nonlocal latest
        until = time.monotonic() + seconds
        if in_thread:
            await trio.to_thread.run_sync(time.sleep, seconds)
        else:
            await trio.sleep(seconds)
        latest = max(latest, time.monotonic() - until)

    async def get(signals: AsyncIterator[int]) -> None:
        async for number in signals:
            handled.append(number)

    stop = threading.Event()

    def disturb() -> None:
        while not stop.wait(0.002):
            os.kill(os.getpid(), signal.SIGUSR1)

    disturber = threading.Thread(target=disturb)
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(get, signals)
            disturber.start()
            async with trio.open_nursery() as events:
                for _ in range(300):
                    events.start_soon(timed, chosen.random() / 2, chosen.random() < 0.3)
                    await trio.sleep(chosen.random() / 500)
            stop.set()
            await trio.to_thread.run_sync(disturber.join)  # a signal must find its receiver
            nursery.cancel_scope.cancel()
    assert latest < LATE_SECONDS
    assert handled
    assert sleeping.stats().busy_poll_slept > 10


async def test_a_runnable_task_is_counted_until_it_runs() -> None:
    scheduler, event, ran = Scheduler(), trio.Event(), list[int]()

    async def wait() -> None:
        await event.wait()
        ran.append(scheduler.runnable)

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(wait)
        assert scheduler.runnable == 2
        await trio.testing.wait_all_tasks_blocked()
        assert scheduler.runnable == 0
        event.set()
        assert scheduler.runnable == 2
    assert ran == [1, 0]
    scheduler.close()
