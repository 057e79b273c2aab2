"""Test threads that share no fds with the daemon."""

import errno
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from cleanfs.fuse.isolated_threads import IsolatedThreads

THREADS = 3


@asynccontextmanager
async def running() -> AsyncIterator[IsolatedThreads]:
    """Run some threads until the block ends."""
    isolated = IsolatedThreads(THREADS)
    isolated.start()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(isolated.run)
            with trio.fail_after(20):
                yield isolated
            nursery.cancel_scope.cancel()
    finally:
        isolated.close()


async def test_a_call_runs_in_another_thread_and_returns_its_result() -> None:
    async with running() as isolated:
        assert await isolated.run_sync(threading.get_ident) != threading.get_ident()
        assert await isolated.run_sync(divmod, 7, 4) == (1, 3)
        with pytest.raises(FileNotFoundError) as raised:
            await isolated.run_sync(os.stat, "/nothing/here")
        assert raised.value.errno == errno.ENOENT


def descriptors() -> dict[int, str]:
    """Return the open fds of this thread except stdin, stdout and stderr."""
    found = {}
    for name in os.listdir("/proc/thread-self/fd"):
        with suppress(FileNotFoundError):  # the fd of the listing
            found[int(name)] = os.readlink(f"/proc/thread-self/fd/{name}")
    return {number: target for number, target in found.items() if number > 2}


async def test_the_threads_have_no_fd_of_the_daemon_and_block_signals() -> None:
    fd = os.open("/", os.O_RDONLY)
    try:
        async with running() as isolated:
            open_in_thread = await isolated.run_sync(descriptors)
            assert [target.removeprefix("anon_inode:") for target in open_in_thread.values()] == [
                "[eventfd]"
            ]
            with pytest.raises(OSError, match="Bad file descriptor"):
                await isolated.run_sync(os.fstat, fd)
            assert descriptors()[fd] == "/"
            blocked = await isolated.run_sync(signal.pthread_sigmask, signal.SIG_BLOCK, ())
            assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP} <= set(blocked)
    finally:
        os.close(fd)


async def test_a_cancelled_call_does_not_delay_others() -> None:
    release = threading.Event()
    async with running() as isolated:
        for _ in range(THREADS - 1):
            with trio.move_on_after(0.01) as scope:
                await isolated.run_sync(release.wait, 20)
            assert scope.cancelled_caught
        assert await isolated.run_sync(len, "abc") == 3
        release.set()


async def test_the_threads_end_and_leave_no_fd_open() -> None:
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    async with running() as isolated:
        await isolated.run_sync(len, "abc")
    with trio.fail_after(20):
        while threading.active_count() > threads:  # noqa: ASYNC110  # they end by themselves
            await trio.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) == before
