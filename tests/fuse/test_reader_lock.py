"""Test the lock under which pyfuse3's tasks wait."""

import trio
from trio.testing import wait_all_tasks_blocked

from cleanfs.fuse.reader_lock import ReaderLock


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
