"""Threads that hold nothing of ours."""

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
    """Some, until the block ends."""
    outsiders = IsolatedThreads(THREADS)
    outsiders.start()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outsiders.run)
            with trio.fail_after(20):
                yield outsiders
            nursery.cancel_scope.cancel()
    finally:
        outsiders.close()


async def test_a_call_is_made_elsewhere_and_its_result_is_the_callers() -> None:
    async with running() as outsiders:
        assert await outsiders.ask(threading.get_ident) != threading.get_ident()
        assert await outsiders.ask(divmod, 7, 4) == (1, 3)
        with pytest.raises(FileNotFoundError) as raised:
            await outsiders.ask(os.stat, "/nothing/here")
        assert raised.value.errno == errno.ENOENT


def descriptors() -> dict[int, str]:
    """What this thread has open, but for the standard ones."""
    found = {}
    for name in os.listdir("/proc/thread-self/fd"):
        with suppress(FileNotFoundError):  # that of the listing
            found[int(name)] = os.readlink(f"/proc/thread-self/fd/{name}")
    return {number: target for number, target in found.items() if number > 2}


async def test_no_descriptor_of_ours_is_there_and_no_signal_arrives() -> None:
    fd = os.open("/", os.O_RDONLY)
    try:
        async with running() as outsiders:
            theirs = await outsiders.ask(descriptors)
            assert [target.removeprefix("anon_inode:") for target in theirs.values()] == ["[eventfd]"]
            with pytest.raises(OSError, match="Bad file descriptor"):
                await outsiders.ask(os.fstat, fd)
            assert descriptors()[fd] == "/"
            blocked = await outsiders.ask(signal.pthread_sigmask, signal.SIG_BLOCK, ())
            assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP} <= set(blocked)
    finally:
        os.close(fd)


async def test_who_does_not_want_to_wait_leaves_and_others_are_served() -> None:
    go_on = threading.Event()
    async with running() as outsiders:
        for _ in range(THREADS - 1):
            with trio.move_on_after(0.01) as scope:
                await outsiders.ask(go_on.wait, 20)
            assert scope.cancelled_caught
        assert await outsiders.ask(len, "abc") == 3
        go_on.set()


async def test_they_end_and_leave_nothing_open() -> None:
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    async with running() as outsiders:
        await outsiders.ask(len, "abc")
    with trio.fail_after(20):
        while threading.active_count() > threads:  # noqa: ASYNC110  # they end by themselves
            await trio.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) == before
