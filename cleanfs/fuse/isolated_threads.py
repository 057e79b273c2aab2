"""Call the daemon's own mount from threads, as a program would.

A thread that waits for a reply the daemon has begun to make cannot be ended. If the daemon is killed at
that moment, such a thread keeps the process alive, and with it the FUSE device, whose close alone would
end the wait: the mount would hang for ever, and not be dead. So these threads have an fd table of their
own (``unshare(2)``, CLONE_FILES), with only the eventfd that reports finished calls. The device is then
closed with the main thread's table, and the wait ends.
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
    """Holds one call and what became of it."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self.returned = trio.Event()
        self._value: object = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Make the call, in a thread."""
        try:
            self._value = self._call()
        except BaseException as exc:  # it is raised where it was asked for
            self._error = exc

    def result(self) -> object:
        """Return the call's result, or raise its exception."""
        if self._error is not None:
            raise self._error
        return self._value


class IsolatedThreads:
    """Runs calls in isolated threads: ``start`` it before the device is opened, ``run`` in a
    nursery.
    """

    def __init__(self, threads: int) -> None:
        """Prepare so many threads. While all are busy, perhaps for long, further calls wait."""
        self.threads = threads
        self.ids: set[int] = set()
        """Their thread ids, once started."""
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._done: deque[_Call] = deque()
        self._eventfd = -1
        self._isolated = True

    def start(self) -> None:
        """Start the threads: before the device is opened, so that none ever has it."""
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        isolated = [threading.Event() for _ in range(self.threads)]
        for event in isolated:
            threading.Thread(
                target=self._serve, args=(event,), daemon=True, name="cleanfs-isolated"
            ).start()
        for event in isolated:
            event.wait()

    async def run(self) -> None:
        """Hand out results until cancelled, if there can be any."""
        while self._eventfd >= 0:
            await trio.lowlevel.wait_readable(self._eventfd)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._eventfd)
            while self._done:
                self._done.popleft().returned.set()

    async def run_sync(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a call that waits for the mount. If cancelled, the call goes on and its result is lost.

        The call must open the fds it needs, as ours are not there. Raises what the call raises.
        """
        pending = _Call(lambda: call(*args))
        self._calls.put(pending)
        await pending.returned.wait()
        return pending.result()  # type: ignore[return-value]  # of this very call

    def close(self) -> None:
        """Let each thread end after its present call."""
        for _ in range(self.threads):
            self._calls.put(None)
        # Without isolation, a thread that ends late would write to another file with that number.
        if self._eventfd >= 0 and self._isolated:
            os.close(self._eventfd)

    def _serve(self, isolated: threading.Event) -> None:
        eventfd = self._eventfd
        self.ids.add(threading.get_native_id())
        # Python's signal handlers write to an fd that this thread does not have.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            syscalls.unshare_descriptors()
        except OSError as exc:  # a sandbox may forbid it
            self._isolated = False
            log.warning("a daemon that is killed may leave a mount that hangs: unshare: %s", exc)
        else:
            os.closerange(FIRST_DESCRIPTOR, eventfd)
            os.closerange(eventfd + 1, os.sysconf("SC_OPEN_MAX"))
        finally:
            isolated.set()
        while (pending := self._calls.get()) is not None:
            pending.run()
            self._done.append(pending)
            os.eventfd_write(eventfd, 1)
