"""Test calls to the source in threads, their bound, and the state kept for each file system."""

import os
import threading
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cleanfs.source.io import Backing
from cleanfs.source.thread_limiter import MAX_THREADS, ThreadLimiter


async def test_calls_run_in_another_thread_and_pass_on_errors() -> None:
    backing = Backing()
    assert await backing.in_thread(trio.lowlevel.in_trio_run) is False
    with pytest.raises(FileNotFoundError):
        await backing.in_thread(os.stat, "/no/such/file")


async def test_a_cancelled_call_is_not_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    backing = Backing()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: backing.in_thread(os.open, fifo, os.O_RDONLY))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    # Release the thread: this open waits for its reader.
    os.close(await trio.to_thread.run_sync(os.open, fifo, os.O_WRONLY))


def test_each_file_system_has_its_own_state() -> None:
    backing = Backing()
    first = backing.file_system(1, local=True)
    assert backing.file_system(1, local=True) is first
    assert backing.file_system(2, local=True) is not first
    assert backing.file_system(1, local=False) is not first  # another file system has taken the number


async def test_calls_that_wait_are_bounded() -> None:
    backing, release, running = Backing(), threading.Event(), list[int]()
    backing.thread_limiter = ThreadLimiter(clock=lambda: 0.0)  # no call counts as hung

    def wait() -> None:
        running.append(1)
        release.wait(10)

    async with trio.open_nursery() as nursery:
        for _ in range(MAX_THREADS + 10):
            nursery.start_soon(backing.in_thread, wait)
        with trio.fail_after(10):
            while len(running) < MAX_THREADS:  # noqa: ASYNC110  # threads set no events
                await trio.sleep(0.01)
        await trio.sleep(0.05)
        assert len(running) == MAX_THREADS
        release.set()
    assert len(running) == MAX_THREADS + 10
