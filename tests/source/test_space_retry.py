"""A call that finds the source full, while what was removed has not been given up."""

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
    """A call that fails with each errno in turn, and then always with the last; 0 is success."""

    async def call() -> str:
        outcome = outcomes[min(len(calls), len(outcomes) - 1)]
        calls.append(trio.current_time())
        if outcome:
            raise OSError(outcome, os.strerror(outcome))
        return "done"

    return call


async def test_a_call_that_succeeds_is_made_once() -> None:
    calls: list[float] = []
    room = SpaceRetry()
    room.removed(A)
    assert await room.retrying(attempts(calls, 0)) == "done"
    assert len(calls) == 1


@pytest.mark.parametrize("full", FULL)
async def test_it_is_made_again_when_something_is_given_up(
    autojump_clock: MockClock, full: int
) -> None:
    calls: list[float] = []
    room = SpaceRetry()
    room.removed(A)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_give_up, room, A, 0.3)
        assert await room.retrying(attempts(calls, full, 0)) == "done"
    assert calls[1] - calls[0] == pytest.approx(0.3)


async def test_what_is_given_up_while_it_was_made_counts(autojump_clock: MockClock) -> None:
    calls: list[float] = []
    room = SpaceRetry()
    room.removed(A)

    async def call() -> str:
        calls.append(trio.current_time())
        if len(calls) == 1:
            room.released(A)
            raise OSError(errno.ENOSPC, "full")
        return "done"

    assert await room.retrying(call) == "done"
    assert calls[0] == calls[1]


async def test_what_is_given_up_when_a_machine_goes_on_that_stood_still_counts(
    mock_clock: MockClock,
) -> None:
    """The deadline passes at the same time."""
    calls: list[float] = []
    room = SpaceRetry()
    room.removed(A)
    async with trio.open_nursery() as nursery:

        async def stand_still() -> None:
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(60)
            await trio.testing.wait_all_tasks_blocked(0.001)  # a request is read before it is handled
            room.released(A)

        nursery.start_soon(stand_still)
        with trio.fail_after(61):
            assert await room.retrying(attempts(calls, errno.ENOSPC, 0)) == "done"
    assert len(calls) == 2


async def test_it_fails_at_once_if_nothing_is_to_come(autojump_clock: MockClock) -> None:
    room, began = SpaceRetry(), trio.current_time()
    room.removed(A)
    room.released(A)
    room.closing(B)
    room.released(B)
    with pytest.raises(OSError, match="No space"):
        await room.retrying(attempts([], errno.ENOSPC))
    assert trio.current_time() == began


async def test_another_error_is_not_waited_with(autojump_clock: MockClock) -> None:
    room, began = SpaceRetry(), trio.current_time()
    room.removed(A)
    with pytest.raises(OSError, match="Input/output"):
        await room.retrying(attempts([], errno.EIO))
    assert trio.current_time() == began


async def test_what_is_half_done_is_not_done_again(autojump_clock: MockClock) -> None:
    calls, room = list[float](), SpaceRetry()
    room.removed(A)

    async def call() -> None:
        calls.append(trio.current_time())
        room.released(A)
        raise HalfDoneError(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    with pytest.raises(OSError, match="No space") as raised:
        await room.retrying(call)
    assert raised.value.errno == errno.ENOSPC
    assert len(calls) == 1


async def test_what_is_held_is_waited_for_once_and_again_when_it_is_closed(
    autojump_clock: MockClock,
) -> None:
    room, began = SpaceRetry(), trio.current_time()
    room.removed(A)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            await room.retrying(attempts([], errno.ENOSPC))
        assert trio.current_time() - began == pytest.approx(LATELY_SECONDS)
    room.closing(A)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_give_up, room, A, 0.2)
        assert await room.retrying(attempts([], errno.ENOSPC, 0)) == "done"


async def test_others_that_remove_all_the_time_keep_nobody(autojump_clock: MockClock) -> None:
    room, began = SpaceRetry(), trio.current_time()

    async def others() -> None:
        while True:
            room.removed(A)
            await trio.sleep(0.01)
            room.released(A)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        await trio.lowlevel.checkpoint()
        with pytest.raises(OSError, match="No space"):
            await room.retrying(attempts([], errno.ENOSPC))
        nursery.cancel_scope.cancel()
    assert trio.current_time() - began < LATELY_SECONDS + 0.1


async def _give_up(room: SpaceRetry, node: int, after: float) -> None:
    await trio.sleep(after)
    room.released(node)
