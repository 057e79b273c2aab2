"""Test calls that find the source full while a removed file is still open."""

import errno
import os
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.lowlevel
import trio.testing
from trio.testing import MockClock

from cleanfs.source.errors import HalfDoneError
from cleanfs.source.space_retry import FULL, LATELY_SECONDS, SpaceRetry

A, B = 7, 8


def attempts(calls: list[float], *outcomes: int) -> Callable[[], Awaitable[str]]:
    """Make a call that fails with each errno in turn and then always with the last; 0 is success."""

    async def call() -> str:
        outcome = outcomes[min(len(calls), len(outcomes) - 1)]
        calls.append(trio.current_time())
        if outcome:
            raise OSError(outcome, os.strerror(outcome))
        return "done"

    return call


async def test_a_call_that_succeeds_is_made_once() -> None:
    calls: list[float] = []
    retry = SpaceRetry()
    retry.removed(A)
    assert await retry.retrying(attempts(calls, 0)) == "done"
    assert len(calls) == 1


@pytest.mark.parametrize("full", FULL)
async def test_a_call_is_repeated_when_a_removed_file_is_released(
    autojump_clock: MockClock, full: int
) -> None:
    calls: list[float] = []
    retry = SpaceRetry()
    retry.removed(A)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_release, retry, A, 0.3)
        assert await retry.retrying(attempts(calls, full, 0)) == "done"
    assert calls[1] - calls[0] == pytest.approx(0.3)


async def test_a_release_during_the_call_counts(autojump_clock: MockClock) -> None:
    calls: list[float] = []
    retry = SpaceRetry()
    retry.removed(A)

    async def call() -> str:
        calls.append(trio.current_time())
        if len(calls) == 1:
            retry.released(A)
            raise OSError(errno.ENOSPC, "full")
        return "done"

    assert await retry.retrying(call) == "done"
    assert calls[0] == calls[1]


async def test_a_release_right_after_a_stall_of_the_machine_counts(
    mock_clock: MockClock,
) -> None:
    """The deadline passes at the same time."""
    calls: list[float] = []
    retry = SpaceRetry()
    retry.removed(A)
    async with trio.open_nursery() as nursery:

        async def stall_and_release() -> None:
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(60)
            await trio.testing.wait_all_tasks_blocked(0.001)  # a request is read before it is handled
            retry.released(A)

        nursery.start_soon(stall_and_release)
        with trio.fail_after(61):
            assert await retry.retrying(attempts(calls, errno.ENOSPC, 0)) == "done"
    assert len(calls) == 2


async def test_a_call_fails_at_once_if_no_removed_file_is_left(autojump_clock: MockClock) -> None:
    retry, began = SpaceRetry(), trio.current_time()
    retry.removed(A)
    retry.released(A)
    retry.closing(B)
    retry.released(B)
    with pytest.raises(OSError, match="No space"):
        await retry.retrying(attempts([], errno.ENOSPC))
    assert trio.current_time() == began


async def test_a_call_with_another_error_fails_at_once(autojump_clock: MockClock) -> None:
    retry, began = SpaceRetry(), trio.current_time()
    retry.removed(A)
    with pytest.raises(OSError, match="Input/output"):
        await retry.retrying(attempts([], errno.EIO))
    assert trio.current_time() == began


async def test_a_call_that_is_half_done_is_not_repeated(autojump_clock: MockClock) -> None:
    calls, retry = list[float](), SpaceRetry()
    retry.removed(A)

    async def call() -> None:
        calls.append(trio.current_time())
        retry.released(A)
        raise HalfDoneError(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    with pytest.raises(OSError, match="No space") as raised:
        await retry.retrying(call)
    assert raised.value.errno == errno.ENOSPC
    assert len(calls) == 1


async def test_a_held_file_is_waited_for_once_and_again_when_it_is_closed(
    autojump_clock: MockClock,
) -> None:
    retry, began = SpaceRetry(), trio.current_time()
    retry.removed(A)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            await retry.retrying(attempts([], errno.ENOSPC))
        assert trio.current_time() - began == pytest.approx(LATELY_SECONDS)
    retry.closing(A)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_release, retry, A, 0.2)
        assert await retry.retrying(attempts([], errno.ENOSPC, 0)) == "done"


async def test_continuous_removals_by_others_do_not_delay_a_call(autojump_clock: MockClock) -> None:
    retry, began = SpaceRetry(), trio.current_time()

    async def others() -> None:
        while True:
            retry.removed(A)
            await trio.sleep(0.01)
            retry.released(A)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        await trio.lowlevel.checkpoint()
        with pytest.raises(OSError, match="No space"):
            await retry.retrying(attempts([], errno.ENOSPC))
        nursery.cancel_scope.cancel()
    assert trio.current_time() - began < LATELY_SECONDS + 0.1


async def _release(retry: SpaceRetry, node: int, after: float) -> None:
    await trio.sleep(after)
    retry.released(node)
