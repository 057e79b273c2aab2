"""Test that evicted pages are held back while the kernel has been, or will be, told to drop them."""

import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from cleanfs.fuse import notify
from cleanfs.fuse.notify import Notifier
from tests.harness.holds import Holds


class Device:
    """Stands in for the device: a notification waits until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.notifier = Notifier()
        self.notifier.use_device(self.writer)
        self.holds = Holds()
        self.notifier.use_evictions(self.holds)
        monkeypatch.setattr(self.notifier, "_write", lambda _: self.open.wait(20))
        monkeypatch.setattr(notify, "PAGES_SECONDS", 0.01)

    def close(self) -> None:
        self.open.set()
        self.notifier.close()
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    made = Device(monkeypatch)
    yield made
    made.close()


@asynccontextmanager
async def running(notifier: Notifier) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(notifier.run)
        with trio.fail_after(20):
            yield
        nursery.cancel_scope.cancel()


async def let_through(device: Device) -> None:
    """Let all notifications through, after which nothing is held."""
    assert device.holds.nodes == [7]
    device.open.set()
    await device.notifier.drained()
    while device.holds.nodes:  # noqa: ASYNC110  # nothing tells when a task of ``written`` ends
        await trio.sleep(0.01)


async def test_an_invalidated_node_is_held_until_the_kernel_has_dropped_its_pages(
    device: Device,
) -> None:
    device.notifier.inode(7)
    assert device.holds.nodes == [7]  # before it is sent
    async with running(device.notifier):
        await trio.sleep(0.05)
        await let_through(device)


async def test_one_that_is_invalidated_again_meanwhile_stays_held(device: Device) -> None:
    async with running(device.notifier):
        device.notifier.inode(7)
        await trio.sleep(0.05)
        device.notifier.inode(7)
        device.notifier.inode(7)
        await let_through(device)


async def test_a_range_is_held_as_the_node(device: Device) -> None:
    device.notifier.pages(7, 4096, 4096)
    async with running(device.notifier):
        await let_through(device)


async def test_an_invalidation_that_is_waited_for_replaces_the_one_in_the_queue(
    device: Device,
) -> None:
    device.notifier.inode(7)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(device.notifier.pages_dropped, 7)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert device.holds.held[7] == 1
        device.open.set()
    assert device.holds.nodes == []
    async with running(device.notifier):
        await device.notifier.drained()


async def test_the_pages_of_a_write_are_held_also_beyond_its_reply(device: Device) -> None:
    async with running(device.notifier):
        await trio.lowlevel.checkpoint()
        await device.notifier.written(7, 0, 4096, lambda: False)
        await let_through(device)


async def test_names_and_attributes_hold_nothing(device: Device) -> None:
    device.open.set()
    async with running(device.notifier):
        device.notifier.entry(7, b"a")
        device.notifier.expire(7, b"a")
        await device.notifier.attributes_changed(7)
        await device.notifier.drained()
    assert device.holds.ever == []
