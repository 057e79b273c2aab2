"""Release processes that are killed while they wait for a source that hangs.

A process waits in the kernel until our reply, even when it is killed. The kernel reports its first
signal by a FUSE_INTERRUPT, and later ones not at all. An interrupt does not say which signal came. A
process that continues (a timer, a child, a resized window) must not get EINTR from a regular file, so
only killed ones are released. /proc tells: every fatal signal becomes a SIGKILL that is pending until
the process has ended. So an interrupted request is watched until it has its reply.

For a READ or WRITE with O_DIRECT the kernel may report no signal at all, as it sends these in the
background and waits for them later (``fuse_direct_IO``). So those that last are watched in any case.

The handler of a released request goes on until the source replies. Then the kernel refuses its reply,
and what that gives is taken back (``request.on_refusal``).
"""

import contextlib
import errno
from collections.abc import Callable
from typing import Final

import trio

from cleanfs.fuse.channel import Channel, roll_back
from cleanfs.fuse.protocol import FUSE_INTERRUPT, FUSE_INTERRUPT_IN
from cleanfs.fuse.request import Request
from cleanfs.linux.killed_threads import is_exiting, is_killed, process_of
from cleanfs.source.io import Backing

RELEASE_SECONDS: Final = 0.5
"""How long an interrupted request must have waited before its requester is released. A slow disk
replies earlier."""

CHECK_SECONDS: Final = 0.2
"""How often to look whether requesters were killed, while one was interrupted."""

DIRECT_CHECK_SECONDS: Final = RELEASE_SECONDS
"""How often to look at requests with O_DIRECT, while there are any. One that is seen twice lasts."""


class Interrupts:
    """Releases one mount's killed requesters. ``run`` it beside pyfuse3's loop."""

    def __init__(
        self, channel: Channel, backing: Backing, before_release: Callable[[], None] = lambda: None
    ) -> None:
        """Handle the channel's interrupts; ``before_release`` is called before each release."""
        self._channel = channel
        self._backing = backing
        self._before_release = before_release
        self._interrupted: dict[int, float] = {}  # by unique: since when, by trio's clock
        self._some = trio.Event()
        self._some_direct = trio.Event()
        self._released: set[int] = set()
        channel.handlers[FUSE_INTERRUPT] = self._interrupt
        channel.direct_came = self._direct_came
        channel.refused = self._refused

    def _interrupt(self, _: Request, body: bytes) -> None:
        [unique] = FUSE_INTERRUPT_IN.unpack_from(body)
        request = self._channel.request(unique)
        if request is not None:
            _note(request)
        # Else it has had its reply, or the thread of a queue is about to hand it over.
        self._interrupted.setdefault(unique, trio.current_time())
        self._some.set()

    def _direct_came(self) -> None:
        self._some_direct.set()

    async def run(self) -> None:
        """Release killed requesters; never returns."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_interrupted)
            nursery.start_soon(self._watch_direct)

    async def _watch_interrupted(self) -> None:
        while True:
            await self._some.wait()
            await trio.sleep(CHECK_SECONDS)
            waiting = self._waiting()
            if not waiting:
                self._some = trio.Event()
            elif late := [request for request in waiting if self._seconds(request) > RELEASE_SECONDS]:
                for request in await trio.to_thread.run_sync(_killed, late, abandon_on_cancel=True):
                    self._release(request)

    async def _watch_direct(self) -> None:
        while True:
            seen: dict[int, int] = {}  # by unique, the requesting process
            await self._some_direct.wait()
            while requests := self._direct_requests():
                lasting = {request.unique: request for request in requests if request.unique in seen}
                processes = {unique: seen[unique] for unique in lasting}
                ended = await trio.to_thread.run_sync(
                    _killed_or_exiting, list(lasting.values()), processes, abandon_on_cancel=True
                )
                for request in ended:
                    self._release(request)
                seen = {
                    request.unique: seen.get(request.unique) or process_of(request.pid)
                    for request in requests
                }
                await trio.sleep(DIRECT_CHECK_SECONDS)
            self._some_direct = trio.Event()

    def _direct_requests(self) -> list[Request]:
        """Return the requests with O_DIRECT in progress whose requesters were not released."""
        requests = self._channel.direct_requests()
        return [request for request in requests if request.unique not in self._released]

    def _waiting(self) -> list[Request]:
        """Return the interrupted requests without a reply, and forget the others."""
        requests = [self._channel.request(unique) for unique in self._interrupted]
        waiting = {request.unique: request for request in requests if request is not None}
        self._interrupted = {unique: self._interrupted[unique] for unique in waiting}
        for request in waiting.values():
            _note(request)
        return list(waiting.values())

    def _seconds(self, request: Request) -> float:
        return trio.current_time() - self._interrupted[request.unique]

    def _release(self, request: Request) -> None:
        if self._channel.request(request.unique) is None:  # it has had its reply meanwhile
            return
        self._before_release()
        self._interrupted.pop(request.unique, None)
        with contextlib.suppress(OSError):  # the connection has ended
            if self._channel.reply(request, -errno.EINTR):
                self._released.add(request.unique)
                self._backing.abandoned_calls += 1

    def _refused(self, request: Request) -> None:
        if request.unique in self._released:
            self._released.remove(request.unique)
            self._backing.abandoned_calls -= 1
        roll_back(request)


def _note(request: Request) -> None:
    """Note that a signal has come for the requester, once."""
    if not request.interrupted:
        request.interrupted = True
        if request.on_interrupt is not None:
            request.on_interrupt()


def _killed(requests: list[Request]) -> list[Request]:
    """Return the requests whose requesters were killed. Runs in a thread."""
    return [request for request in requests if is_killed(request.pid)]


def _killed_or_exiting(requests: list[Request], processes: dict[int, int]) -> list[Request]:
    """Return the requests whose requesters were killed, or whose processes exit. Runs in a thread."""
    ended = {
        (thread, process)
        for thread, process in {(request.pid, processes[request.unique]) for request in requests}
        if is_killed(thread) or (process and is_exiting(process))
    }
    return [request for request in requests if (request.pid, processes[request.unique]) in ended]
