"""Begin a handler on its caller's stack, and give it a task only when it has to wait.

Most handlers never wait, as the source is in memory. A task costs more than they do: its making, a run
of the scheduler, and its end. So the caller ``start``s the handler's coroutine. If that must wait, it
first asks for a task, by ``before_wait``, and the rest of it runs in one (``finish``). asyncio has the
same as ``eager_task_factory``.

Until then trio takes the caller's task for the current one. So ``before_wait`` comes before every call
of trio that may suspend, in all code that handlers of the channel run. No lock that belongs to a task
may be held across it: ``trio.Semaphore`` has no owner.
"""

import enum
import types
from collections.abc import Coroutine, Generator
from typing import Any, Final, Literal, TypeVar

T = TypeVar("T")


class _Sentinel(enum.Enum):
    UNFINISHED = enum.auto()
    NEEDS_TASK = enum.auto()


UNFINISHED: Final = _Sentinel.UNFINISHED
"""Stands in for the result of a coroutine that needs a task."""


class _State:
    """Says whether the code that runs is a coroutine's that has no task yet."""

    starting = False


def start(coroutine: Coroutine[Any, Any, T]) -> T | Literal[_Sentinel.UNFINISHED]:
    """Run a coroutine to its end, and return its result; or, if it must wait, up to there.

    Then have a task ``finish`` it. Raises what the coroutine raises.
    """
    _State.starting = True
    try:
        sent = coroutine.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]  # that of the coroutine
    finally:
        _State.starting = False
    if sent is not _Sentinel.NEEDS_TASK:
        coroutine.throw(RuntimeError("a handler waits without before_wait()"))
    return UNFINISHED


@types.coroutine
def finish(coroutine: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Run the rest of an unfinished coroutine, in this task. Returns its result."""
    result: T = yield from coroutine
    return result


async def before_wait() -> None:
    """Ask for a task, unless this code has one. Call this before anything that may suspend."""
    if _State.starting:
        await _ask_for_task()


@types.coroutine
def _ask_for_task() -> Generator[_Sentinel, None, None]:
    yield _Sentinel.NEEDS_TASK
