"""Wait with a time limit that a stalled machine does not use up."""

from collections.abc import Awaitable, Callable

import trio


async def wait_with_stall_grace(seconds: float, wait: Callable[[], Awaitable[None]]) -> bool:
    """Return whether ``wait`` returned in time. It may be called twice.

    When a stalled machine goes on, a deadline has passed before the task or thread that would end the
    wait could run. So the time is split into two halves, and the second begins after the stall.
    """
    for _ in range(2):
        with trio.move_on_after(max(seconds, 0.0) / 2) as half:
            await wait()
        if not half.cancelled_caught:
            return True
    return False
