"""Waiting for so long, on a machine that may stand still meanwhile."""

from collections.abc import Awaitable, Callable

import trio


async def wait_with_stall_grace(seconds: float, wait: Callable[[], Awaitable[None]]) -> bool:
    """Whether ``wait`` returned in time. It may be begun a second time.

    If the machine stood still, a deadline has passed before anybody could run who makes happen what is
    waited for. So the time comes in two halves, of which the second begins after that.
    """
    for _ in range(2):
        with trio.move_on_after(max(seconds, 0.0) / 2) as half:
            await wait()
        if not half.cancelled_caught:
            return True
    return False
