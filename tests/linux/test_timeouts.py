"""Test time limits on a machine that may stall."""

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from cleanfs.linux.timeouts import wait_with_stall_grace


@pytest.mark.parametrize("late", [0.0, 0.4, 0.9])
async def test_a_wait_that_ends_in_time_succeeds(autojump_clock: MockClock, late: float) -> None:
    event, began = trio.Event(), trio.current_time()
    async with trio.open_nursery() as nursery:

        async def set_late() -> None:
            await trio.sleep(late)
            event.set()

        nursery.start_soon(set_late)
        assert await wait_with_stall_grace(1, event.wait)
    assert trio.current_time() - began == pytest.approx(late)


async def test_a_wait_that_does_not_end_takes_its_time_limit(autojump_clock: MockClock) -> None:
    began = trio.current_time()
    assert not await wait_with_stall_grace(1, trio.sleep_forever)
    assert trio.current_time() - began == pytest.approx(1)
    assert not await wait_with_stall_grace(-1, trio.sleep_forever)
    assert trio.current_time() - began == pytest.approx(1)


async def test_a_stalled_machine_does_not_end_a_wait(mock_clock: MockClock) -> None:
    event = trio.Event()
    async with trio.open_nursery() as nursery:

        async def stall() -> None:
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(60)
            await trio.testing.wait_all_tasks_blocked(0.001)
            event.set()

        nursery.start_soon(stall)
        assert await wait_with_stall_grace(1, event.wait)
