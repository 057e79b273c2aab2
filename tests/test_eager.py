"""Test coroutines that begin on their caller's stack."""

import pytest
import trio
import trio.lowlevel

from cleanfs.eager import UNFINISHED, before_wait, finish, start


async def sum_of(numbers: list[int], *, waits: bool) -> int:
    total = 0
    for number in numbers:
        if waits:
            await before_wait()
            await trio.lowlevel.checkpoint()
        total += number
    return total


def test_one_that_does_not_wait_ends_at_once() -> None:
    assert start(sum_of([1, 2], waits=False)) == 3


async def test_the_rest_of_one_that_waits_runs_in_the_task_that_finishes_it() -> None:
    coroutine = sum_of([1, 2, 3], waits=True)
    assert start(coroutine) is UNFINISHED
    assert await finish(coroutine) == 6


async def test_code_that_has_a_task_asks_for_none() -> None:
    assert await sum_of([1, 2], waits=True) == 3


async def test_errors_are_raised_before_and_after_the_wait() -> None:
    async def fail(*, waits: bool) -> None:
        if waits:
            await before_wait()
        raise LookupError

    with pytest.raises(LookupError):
        start(fail(waits=False))
    late = fail(waits=True)
    assert start(late) is UNFINISHED
    with pytest.raises(LookupError):
        await finish(late)
    assert await sum_of([1], waits=True) == 1  # the state is as before


async def test_a_wait_without_a_task_is_refused() -> None:
    async def waits() -> None:
        await trio.lowlevel.checkpoint()

    with pytest.raises(RuntimeError, match="before_wait"):
        start(waits())
