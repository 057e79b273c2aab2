"""Test the window of busy polling, and the wait on a socket under a real scheduler."""

import logging
import socket
import time
from collections.abc import Iterator

import pyfuse3
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from cleanfs.fuse.busypoll import GROW_START_NS, WAKE_NS, BusyPoll, ReaderLock, Window

LIMIT_US = 50.0
LIMIT_NS = 50_000
LONG_US = 120e6
"""A window longer than any test."""


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@pytest.fixture
def unchanged_pyfuse3() -> Iterator[None]:
    before = pyfuse3.trio  # type: ignore[attr-defined]  # imported there, not exported
    yield
    pyfuse3.trio = before  # type: ignore[attr-defined]  # imported there, not exported


def open_window(poll: BusyPoll) -> None:
    """Set the window as some short waits would."""
    poll._window.ns = poll._window.limit_ns  # noqa: SLF001  # no public access


# -- the window ----------------------------------------------------------------------------------


def test_short_waits_open_the_window_step_by_step() -> None:
    window = Window(LIMIT_NS)
    seen = [window.ns]
    for _ in range(4):
        window.waited(1_000)
        seen.append(window.ns)
    assert seen == [0, GROW_START_NS, 2 * GROW_START_NS, 4 * GROW_START_NS, LIMIT_NS]


def test_one_long_wait_closes_the_window() -> None:
    window = Window(LIMIT_NS)
    window.waited(1_000)
    window.waited(LIMIT_NS + WAKE_NS + 1)
    assert window.ns == 0


def test_a_wait_longer_than_the_widest_window_closes_it() -> None:
    window = Window(LIMIT_NS)
    window.ns = LIMIT_NS
    window.waited(LIMIT_NS + 1)
    assert window.ns == 0


@given(st.integers(0, 10**6), st.lists(st.integers(0, 10**9), max_size=50))
def test_the_window_stays_within_its_limits(limit: int, waits: list[int]) -> None:
    window = Window(limit)
    for ns in waits:
        window.waited(ns)
        assert 0 <= window.ns <= limit
        if ns > limit + WAKE_NS:
            assert window.ns == 0


# -- the wait ------------------------------------------------------------------------------------


async def test_a_pending_message_is_found_without_sleeping(ends: tuple[socket.socket, ...]) -> None:
    poll = BusyPoll(LONG_US)
    open_window(poll)
    ends[1].send(b"x")
    await poll.wait_readable(ends[0].fileno())
    assert (poll.stats().polled, poll.stats().slept) == (1, 0)


async def test_a_closed_window_sleeps(ends: tuple[socket.socket, ...]) -> None:
    poll = BusyPoll(LIMIT_US)
    ends[1].send(b"x")
    await poll.wait_readable(ends[0].fileno())
    assert (poll.stats().polled, poll.stats().slept) == (0, 1)


async def test_a_late_message_is_found_and_closes_the_window(
    ends: tuple[socket.socket, ...], nursery: trio.Nursery
) -> None:
    poll = BusyPoll(LIMIT_US)
    open_window(poll)

    async def send_late() -> None:
        await wait_all_tasks_blocked()
        ends[1].send(b"x")

    nursery.start_soon(send_late)
    with trio.fail_after(5):
        await poll.wait_readable(ends[0].fileno())
    assert (poll.stats().polled, poll.stats().slept) == (0, 1)
    assert poll._window.ns == 0  # noqa: SLF001  # no public access


async def test_a_wait_continues_if_the_message_has_gone(
    ends: tuple[socket.socket, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read would block the whole daemon: the message was an interrupt whose request has finished."""
    waited, wait = list[int](), trio.lowlevel.wait_readable

    async def wait_readable(fd: int) -> None:
        waited.append(fd)
        if len(waited) == 1:
            await trio.lowlevel.checkpoint()
        else:
            ends[1].send(b"x")
            await wait(fd)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    await BusyPoll(LIMIT_US).wait_readable(ends[0].fileno())
    assert len(waited) == 2
    assert ends[0].recv(1) == b"x"


async def test_a_finished_thread_is_served_during_polling(
    ends: tuple[socket.socket, ...], nursery: trio.Nursery
) -> None:
    poll = BusyPoll(LONG_US)
    open_window(poll)

    async def hop() -> None:
        await trio.to_thread.run_sync(time.sleep, 0.01)
        ends[1].send(b"x")

    nursery.start_soon(hop)
    await trio.lowlevel.checkpoint()
    with trio.fail_after(30):
        await poll.wait_readable(ends[0].fileno())
    assert poll.stats().polled == 1


async def test_other_tasks_and_deadlines_run_while_it_polls(
    ends: tuple[socket.socket, ...], nursery: trio.Nursery
) -> None:
    poll = BusyPoll(LONG_US)
    open_window(poll)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        for _ in range(20):
            await trio.sleep(0.001)
            ticks += 1
        ends[1].send(b"x")

    nursery.start_soon(tick)
    with trio.fail_after(30):
        await poll.wait_readable(ends[0].fileno())
    assert ticks == 20
    assert poll.stats().polled == 1


async def test_continuous_requests_do_not_starve_other_tasks(
    ends: tuple[socket.socket, ...], nursery: trio.Nursery
) -> None:
    poll = BusyPoll(LIMIT_US)
    ends[1].send(b"x")
    done = False

    async def other() -> None:
        nonlocal done
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        done = True

    nursery.start_soon(other)
    with trio.fail_after(5):
        while not done:
            open_window(poll)
            await poll.wait_readable(ends[0].fileno())


async def test_a_wait_that_polls_can_be_cancelled(ends: tuple[socket.socket, ...]) -> None:
    poll = BusyPoll(LONG_US)
    open_window(poll)
    began = time.monotonic()
    with trio.move_on_after(0.05) as scope:
        await poll.wait_readable(ends[0].fileno())
    assert scope.cancelled_caught
    assert time.monotonic() - began < 30


async def test_closing_ends_a_wait_that_polls(
    ends: tuple[socket.socket, ...], nursery: trio.Nursery
) -> None:
    poll = BusyPoll(LONG_US)
    open_window(poll)

    async def close() -> None:
        await trio.sleep(0.01)
        poll.notify_closing(ends[0].fileno())

    nursery.start_soon(close)
    with trio.fail_after(30), pytest.raises(trio.ClosedResourceError):
        await poll.wait_readable(ends[0].fileno())


# -- the lock ------------------------------------------------------------------------------------


async def test_one_task_holds_the_lock_and_passes_it_on() -> None:
    lock, inside, most = ReaderLock(), 0, 0

    async def worker() -> None:
        nonlocal inside, most
        for _ in range(20):
            async with lock:
                inside += 1
                most = max(most, inside)
                await trio.lowlevel.checkpoint()
                inside -= 1
            await trio.lowlevel.checkpoint()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(worker)
    assert most == 1
    assert lock.woken == 0


async def test_a_task_that_returns_at_once_keeps_the_lock(nursery: trio.Nursery) -> None:
    lock, order = ReaderLock(), []

    async def other() -> None:
        async with lock:
            order.append("other")

    async with lock:
        nursery.start_soon(other)
        await wait_all_tasks_blocked()
    async with lock:
        order.append("again")
        await wait_all_tasks_blocked()
    await wait_all_tasks_blocked()
    assert order == ["again", "other"]


async def test_a_cancelled_wait_leaves_the_lock_intact(nursery: trio.Nursery) -> None:
    lock = ReaderLock()
    scope = trio.CancelScope()

    async def give_up() -> None:
        with scope:
            async with lock:
                raise AssertionError

    async with lock:
        nursery.start_soon(give_up)
        await wait_all_tasks_blocked()
        scope.cancel()
        await wait_all_tasks_blocked()
    with trio.fail_after(30):
        async with lock:
            pass


# -- pyfuse3 -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchanged_pyfuse3")
def test_the_wait_is_installed_in_pyfuse3_and_removed() -> None:
    poll = BusyPoll(LIMIT_US)
    assert poll.install()
    seen = pyfuse3.trio  # type: ignore[attr-defined]  # imported there, not exported
    assert seen.lowlevel.wait_readable == poll.wait_readable
    assert seen.ClosedResourceError is trio.ClosedResourceError
    assert seen.lowlevel.current_task is trio.lowlevel.current_task
    assert isinstance(seen.Lock(), ReaderLock)
    assert isinstance(seen.Lock(), trio.Lock), "a second lock is trio's"
    poll.uninstall()
    assert pyfuse3.trio is trio  # type: ignore[attr-defined]  # imported there, not exported


@pytest.mark.usefixtures("unchanged_pyfuse3")
def test_without_polling_the_installed_wait_sleeps_at_once() -> None:
    """The second check that the message is still there matters without polling, too."""
    poll = BusyPoll(0)
    assert poll.install()
    seen = pyfuse3.trio  # type: ignore[attr-defined]  # imported there, not exported
    assert seen.lowlevel.wait_readable == poll.wait_readable
    assert poll.confirm()
    for wait_ns in (0, 1, 10_000, 10_000, 10**9):
        poll._window.waited(wait_ns)  # noqa: SLF001  # no public access
        assert not poll._window.ns  # noqa: SLF001  # no public access


@pytest.mark.usefixtures("unchanged_pyfuse3")
def test_a_pyfuse3_without_a_global_trio_causes_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pyfuse3.trio = None  # type: ignore[attr-defined]  # imported there, not exported
    assert not BusyPoll(LIMIT_US).install()
    assert pyfuse3.trio is None  # type: ignore[attr-defined]  # imported there, not exported
    assert "busy polling is off" in caplog.text


@pytest.mark.usefixtures("unchanged_pyfuse3")
def test_a_pyfuse3_that_does_not_use_the_wait_causes_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    poll = BusyPoll(LIMIT_US)
    poll.install()
    with caplog.at_level(logging.WARNING):
        assert not poll.confirm()
    assert "busy polling is off" in caplog.text
    assert pyfuse3.trio is trio  # type: ignore[attr-defined]  # imported there, not exported
    assert poll.stats().limit_us == 0
