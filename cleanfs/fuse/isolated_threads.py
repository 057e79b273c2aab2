"""Threads in which the daemon asks its own mount, as a program would.

Nobody can end a thread that waits for an answer which the daemon has begun to make. If the daemon is
killed in that moment, such a thread keeps the process, and with it the FUSE device, whose closing alone
would end the wait: the mount would hang for ever, and not be dead. So these threads have a descriptor
table of their own (``unshare(2)``, CLONE_FILES), with nothing in it of ours but the descriptor by which
they say that they are done. The device is closed with the others, then, and the wait ends.
"""

import contextlib
import logging
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar, TypeVarTuple

import trio

from cleanfs.linux import syscalls

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

FIRST_DESCRIPTOR: Final = 3
"""After the standard ones."""


class _Call:
    """One call and what became of it."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self.returned = trio.Event()
        self._value: object = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """In a thread."""
        try:
            self._value = self._call()
        except BaseException as exc:  # it is raised where it was asked for
            self._error = exc

    def result(self) -> object:
        """What the call returned, or raised."""
        if self._error is not None:
            raise self._error
        return self._value


class IsolatedThreads:
    """See the module. Use: ``run`` in a nursery, from before the device is opened."""

    def __init__(self, threads: int) -> None:
        """None yet. Further calls wait: what is asked for may hang with the source."""
        self.threads = threads
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._done: deque[_Call] = deque()
        self._news = -1
        self._apart = True

    def start(self) -> None:
        """Start the threads: before the device is opened, so that none ever has it."""
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        apart = [threading.Event() for _ in range(self.threads)]
        for event in apart:
            threading.Thread(target=self._serve, args=(event,), daemon=True, name="outsider").start()
        for event in apart:
            event.wait()

    async def run(self) -> None:
        """Hand out results until cancelled, if there can be any."""
        while self._news >= 0:
            await trio.lowlevel.wait_readable(self._news)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._news)
            while self._done:
                self._done.popleft().returned.set()

    async def ask(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """The result of a call that waits for the mount. If cancelled, the call goes on unheard.

        The call opens what descriptors it needs; ours are not there. Raises what the call raises.
        """
        asked = _Call(lambda: call(*args))
        self._calls.put(asked)
        await asked.returned.wait()
        return asked.result()  # type: ignore[return-value]  # of this very call

    def close(self) -> None:
        """The threads end, each after the call that it is in."""
        for _ in range(self.threads):
            self._calls.put(None)
        if (
            self._news >= 0 and self._apart
        ):  # else one that ends late would write to what has the number then
            os.close(self._news)

    def _serve(self, apart: threading.Event) -> None:
        news = self._news
        # Python's handlers write to a descriptor, which is not here.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            syscalls.unshare_descriptors()
        except OSError as exc:  # a sandbox may forbid it
            self._apart = False
            log.warning("a daemon that is killed may leave a mount that hangs: unshare: %s", exc)
        else:
            os.closerange(FIRST_DESCRIPTOR, news)
            os.closerange(news + 1, os.sysconf("SC_OPEN_MAX"))
        finally:
            apart.set()
        while (asked := self._calls.get()) is not None:
            asked.run()
            self._done.append(asked)
            os.eventfd_write(news, 1)
