"""Receive the kernel's messages: handle some, and leave the others to pyfuse3.

The native half (``native/channel.hpp``) alone reads from the FUSE device and writes to it. It runs
where pyfuse3 waits for a request: pyfuse3 waits through its module global ``trio``, which its own
asyncio mode replaces in the same way (``pyfuse3.asyncio.enable``). ``Channel.begin`` replaces that
global by an object that is trio except for the lock and the wait, and gives libfuse callbacks that
read and write through the channel (``fuse_session_custom_io``). So a message that pyfuse3 is to
handle is received in the wait, and copied once when libfuse reads.

* From a wait, pyfuse3 needs to know only that libfuse has a message to read or the device is being
  closed. Messages that have handlers here never end a wait.
* A wait that finds a message at once is no checkpoint, and other tasks must not starve. So before each
  wait the scheduler says whether another task could run; if so, it runs. It also runs for events
  that it waits for (``LOOK_NS``), and at the latest after ``MAX_UNYIELDING_NS``. During the wait, which
  may serve many requests, the native half looks at trio's epoll fd and at its next deadline.
* The wait sleeps in the native half, not in trio: a run of the scheduler is most of a small request's
  cost. It releases the GIL, so worker threads make progress.
"""

import contextlib
import enum
import errno
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

import pyfuse3
import trio
from pyfuse3 import FUSEError

from cleanfs import eager
from cleanfs.cache.state import CacheState, HandleState
from cleanfs.fuse import init_flags
from cleanfs.fuse.calls import Calls
from cleanfs.fuse.device import find_device
from cleanfs.fuse.protocol import FUSE_OVER_IO_URING, OPCODES
from cleanfs.fuse.reader_lock import ReaderLock
from cleanfs.fuse.request import Request, set_current
from cleanfs.fuse.scheduler import Scheduler
from cleanfs.fuse.session import native
from cleanfs.fuse.transport import Chosen, Transport, choose, why_no_ring
from cleanfs.latency import HistogramSnapshot, LatencyStats

log = logging.getLogger(__name__)


LOOK_NS: Final = 50_000
"""How often to look for events that the scheduler waits for, while requests come without a pause. A
look takes 1 us, a run of the scheduler some 20."""

MAX_UNYIELDING_NS: Final = 10_000_000
"""The scheduler runs at least this often, whatever it reports."""

DRAIN_LOOK_SECONDS: Final = 0.01
"""How often to look whether the last requests have ended, when the mount ends."""

MAX_REQUESTS: Final = 10_000
"""Requests in progress at a time, of pyfuse3's handlers and of ours each. At this limit no more are
read, not even for the control files."""

Handler = Callable[[Request, bytes], None]
"""Handles a message, given its body, without waiting."""

AsyncHandler = Callable[[Request, bytes], Coroutine[Any, Any, bytes]]
"""Handles a request, given its body. Returns the body of the reply. Raises FUSEError. It calls
``before_wait`` before it waits (``eager``)."""


class Received(enum.Enum):
    """Says what a look for a message has found."""

    NOTHING = enum.auto()
    HANDLED = enum.auto()
    """A message, which is being handled here."""
    FOR_LIBFUSE = enum.auto()
    """A message, or the end of the connection."""


@dataclass(frozen=True, slots=True)
class ChannelStats:
    """Holds a snapshot."""

    busy_poll_limit_us: float = 0.0
    """The widest window of polling; 0 disables it."""
    busy_poll_polled: int = 0
    """Messages that polling found."""
    busy_poll_slept: int = 0
    """Waits that went to sleep."""
    served_natively: int = 0
    """Requests that were served without Python."""
    transport: str = Transport.DEVICE.value
    """How requests come: device or uring."""
    transport_reason: str = ""
    requests: Mapping[str, int] = field(default_factory=dict)
    """All requests, by the name of their opcode."""


class Channel:
    """The channel of one mount. Call ``begin`` right after ``pyfuse3.init``."""

    def __init__(
        self,
        busy_poll_us: float,
        wanted_init_flags: int = 0,
        init_flags_granted: Callable[[int], None] = lambda flags: None,
        transport: Transport = Transport.DEVICE,
    ) -> None:
        """Poll for at most ``busy_poll_us`` microseconds at a time.

        ``init_flags_granted`` is called with the FUSE_INIT flags in force, before any other request.
        """
        self.handlers: dict[int, Handler] = {}
        """The messages that are handled here, by opcode."""
        self.async_handlers: dict[int, AsyncHandler] = {}
        """The requests that are handled here, by opcode."""
        self.init_flags = 0
        """The FUSE_INIT flags that were added to libfuse's."""
        self.device = -1
        """The fd of the FUSE device; -1 if it is not known."""
        self.refused: Callable[[Request], None] = roll_back
        """Called when the kernel refuses a reply of libfuse, as the requester is gone."""
        self.direct_came: Callable[[], None] = lambda: None
        """Called when a READ or WRITE with O_DIRECT came that the native half does not serve."""
        self._wanted_init_flags = wanted_init_flags
        self._init_flags_granted = init_flags_granted
        self._busy_poll_us = busy_poll_us
        self._transport = choose(transport)
        self._scheduler: Scheduler
        self._native: Any = None
        self._serves = False
        self._inodes: Any = None  # InodeStates of vfs, which is above
        self._calls: Calls
        self._lock = ReaderLock()
        self._lock_made = False
        self._closing = False
        self._yielded_ns = self._looked_ns = 0
        self._nursery: trio.Nursery | None = None
        self._in_progress = 0
        self._one_ended = trio.Event()

    def begin(self) -> None:
        """Take over the session that was just mounted, if this pyfuse3 lets us; else warn."""
        device = None if native is None else native.session_fd()
        self.device = find_device() if device is None else device
        if native is None or device is None:
            log.warning("libfuse reads the FUSE device by itself: %s", LOST)
            self._use_device("libfuse reads it by itself")
            return
        if getattr(pyfuse3, "trio", None) is not trio:
            log.warning("this pyfuse3 has no wait that can be replaced: %s", LOST)
            self._use_device("libfuse reads it by itself")
            return
        self.receive_from(device)
        self._make_queues()
        self._native.attach()
        pyfuse3.trio = _Trio(self)  # type: ignore[attr-defined]  # an attribute of its C module

    def receive_from(self, device: int) -> None:
        """Receive messages from an open FUSE device, which becomes non-blocking."""
        assert native is not None
        self.device = device
        self._scheduler = Scheduler()
        if self._scheduler.fd < 0:
            log.warning("this trio hides its epoll: a request costs a run of the scheduler")
        self._native = native.Channel(
            device,
            self._scheduler.fd,
            int(self._busy_poll_us * 1000),
            self._init_reply,
            self._refused,
        )

    def _make_queues(self) -> None:
        """Make the queues that the kernel is to be asked for in FUSE_INIT."""
        if self._transport.transport is not Transport.URING:
            return
        if self._scheduler.fd < 0:
            self._use_device("trio hides its epoll")
            return
        try:
            self._native.make_queues()
        except OSError as exc:
            self._use_device(why_no_ring(exc))
        else:
            self._wanted_init_flags |= FUSE_OVER_IO_URING

    def _use_device(self, why: str) -> None:
        if self._transport.transport is Transport.URING:
            self._transport = Chosen(Transport.DEVICE, why)

    def confirm(self) -> None:
        """Warn if this pyfuse3 waits elsewhere. Call this once the mount has replied to a request."""
        if self._native is not None and not self._native.queues:
            self._use_device("the kernel refused queues")
        chosen = self._transport
        log.info("requests come by %s: %s", chosen.transport.value, chosen.reason)
        if self._native is not None and not self._lock_made:
            log.warning("this pyfuse3 does not use the wait that was replaced: %s", LOST)

    def close(self) -> None:
        """Leave the device to libfuse, and pyfuse3 its trio."""
        if self._native is not None:
            pyfuse3.trio = trio  # type: ignore[attr-defined]  # see begin
            self._native.close()
            self._scheduler.close()

    def stats(self) -> ChannelStats:
        """Return a snapshot."""
        if self._native is None:
            return ChannelStats(transport_reason=self._transport.reason)
        native = self._native
        requests = {OPCODES.get(code, "other"): count for code, count in native.opcodes().items()}
        return ChannelStats(
            self._busy_poll_us,
            native.polled,
            native.slept,
            native.served,
            self._transport.transport.value,
            self._transport.reason,
            requests,
        )

    def request(self, unique: int) -> Request | None:
        """Return the request with that id, if it has no reply of its handler yet."""
        return cast(Request | None, self._native.request(unique))

    def direct_requests(self) -> list[Request]:
        """Return the READs and WRITEs with O_DIRECT in progress, without those of no known thread."""
        return cast(list[Request], self._native.direct_requests())

    def reply(self, request: Request, error: int, body: bytes = b"") -> bool:
        """Reply to a request; ``error`` is 0 or a negative errno. False if its requester is gone.

        Raises OSError.
        """
        return cast(bool, self._native.reply(request.unique, error, body))

    # -- requests that the native half serves -------------------------------------------------

    def serve_from(self, caches: CacheState) -> None:
        """Serve hits from these caches, unless they are Python's."""
        if self._native is not None and caches.native:
            self._native.serve_from(caches)
            self._serves = True
            if self._inodes is not None:
                self._inodes.use_table(self._calls, self._is_task_ready)
                self._native.serve_metadata(self._inodes)

    def serve_metadata(self, inodes: object, calls: Calls) -> None:
        """Serve names, attributes and opens by these ``InodeStates``, after ``serve_from``."""
        self._inodes, self._calls = inodes, calls

    def _is_task_ready(self) -> bool:
        return self._scheduler.runnable > self._lock.woken

    def adopt_handle(self, fh: int) -> Any:  # noqa: ANN401  # its types are those of vfs, which is above
        """Give up a file that was opened here: its inode, record, fd, flags, ``Stream``; if it writes;
        where it tried RWF_NOWAIT in vain.

        None if there is none with that number.
        """
        return self._native.adopt_handle(fh) if self._serves else None

    @property
    def own_handles(self) -> int:
        """Count the files that were opened here."""
        return self._native.own_handles if self._serves else 0

    def add_handle(self, fh: int, handle: HandleState) -> None:
        """Serve reads of an open file."""
        if self._serves:
            self._native.add_handle(fh, handle)

    def remove_handle(self, fh: int) -> None:
        """Serve no more reads of an open file."""
        if self._serves:
            self._native.remove_handle(fh)

    def add_directory(self, fh: int, directory: object) -> None:
        """List an open directory, given its ``DirectoryState``."""
        if self._serves:
            self._native.add_directory(fh, directory)

    def remove_directory(self, fh: int) -> None:
        """List an open directory no more."""
        if self._serves:
            self._native.remove_directory(fh)

    @property
    def own_writers(self) -> list[int]:
        """List the nodes of those that are open for writing."""
        return self._native.own_writers if self._serves else []

    @property
    def writes_served(self) -> int:
        """Return how many writes were served."""
        return self._native.writes_served if self._serves else 0

    def latencies(self) -> LatencyStats:
        """Return a snapshot of the requests that were served."""
        if not self._serves:
            return LatencyStats()
        native = self._native
        hit, got, source, write = (HistogramSnapshot(*found) for found in native.histograms())
        return LatencyStats(hit, got, source, write, native.read_bytes, native.write_bytes)

    async def drained(self) -> None:
        """Return when no request is in progress: no FSYNC in a native thread, no handler of ours."""
        while self._in_progress or self._syncing:  # noqa: ASYNC110  # native threads set no event
            await trio.sleep(DRAIN_LOOK_SECONDS)

    @property
    def _syncing(self) -> bool:
        return self._serves and self._native.syncing > 0

    def source_reads(self) -> tuple[int, int]:
        """Return how many reads of the source were made, and their bytes."""
        return self._native.source_reads() if self._serves else (0, 0)

    def _init_reply(self, request: bytes, reply: bytes) -> bytes:
        changed, granted = init_flags.negotiate(request, reply, self._wanted_init_flags)
        self.init_flags = granted
        self._init_flags_granted(granted)
        return changed

    def _refused(self, request: Request) -> None:
        self.refused(request)

    # -- requests with handlers of ours -------------------------------------------------------

    async def run(self) -> None:
        """Run the tasks of requests that wait, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def _begin(self, handle: AsyncHandler, request: Request, nursery: trio.Nursery) -> None:
        """Handle a request: here if it does not have to wait, else in a task (``eager``)."""
        set_current(request)
        handling = handle(request, self._native.body())
        try:
            reply = eager.start(handling)
        except FUSEError as exc:
            self._end(request, exc.errno, b"")
            return
        if reply is eager.UNFINISHED:
            self._in_progress += 1
            nursery.start_soon(self._finish, handling, request)
        else:
            self._end(request, 0, reply)

    async def _finish(self, handling: Coroutine[Any, Any, bytes], request: Request) -> None:
        number, reply = 0, b""
        try:
            reply = await eager.finish(handling)
        except FUSEError as exc:
            number = exc.errno
        finally:
            self._in_progress -= 1
            self._one_ended.set()
        self._end(request, number, reply)

    def _end(self, request: Request, number: int, reply: bytes) -> None:
        """Reply to a request: with an errno, or 0. If the reply is refused, undo what it gave."""
        # ENOSYS would make the kernel send no such request any more. A source may say it of a file.
        error = -errno.EOPNOTSUPP if number == errno.ENOSYS else -number
        self._native.ended(request.unique)
        with contextlib.suppress(OSError):  # the connection has ended
            if not self.reply(request, error, reply):
                self.refused(request)

    # -- pyfuse3's wait -----------------------------------------------------------------------

    def make_lock(self) -> "ReaderLock | trio.Lock":
        """Make pyfuse3's reader lock, the first that it makes. Any further lock is trio's."""
        if self._lock_made:
            return trio.Lock()
        self._lock_made = True
        return self._lock

    async def wait_readable(self, fd: int) -> None:
        """Return when libfuse has something to read: a message, or the end of the connection.

        Raises trio.ClosedResourceError once the device is being closed.
        """
        scheduler = self._scheduler
        scheduler.ran()
        while not self._closing:
            while self._in_progress >= MAX_REQUESTS:
                self._one_ended = trio.Event()
                await self._one_ended.wait()
            if scheduler.runnable > self._lock.woken or self._has_events():
                await self._yield()
                continue
            received = self._receive()
            if received is Received.FOR_LIBFUSE:
                return
            if received is Received.NOTHING and scheduler.fd < 0:
                await trio.lowlevel.wait_readable(fd)
            elif received is Received.NOTHING:
                await self._yield()
        raise trio.ClosedResourceError

    def _has_events(self) -> bool:
        """Tell whether the scheduler may have something to do, by a look every ``LOOK_NS``."""
        now = time.perf_counter_ns()
        if now < self._looked_ns + LOOK_NS:
            return False
        self._looked_ns = now
        return now > self._yielded_ns + MAX_UNYIELDING_NS or self._scheduler.has_events

    async def _yield(self) -> None:
        """Let other tasks run."""
        await trio.lowlevel.checkpoint()
        self._scheduler.ran()
        self._yielded_ns = self._looked_ns = time.perf_counter_ns()

    def _receive(self) -> Received:
        """Receive a message that the native half does not serve, unless the scheduler must run."""
        try:
            request = self._native.receive_now()
            if request is None:
                request = self._native.receive(self._scheduler.seconds_to_next_deadline)
        except OSError:  # the end of the connection, which libfuse must see itself
            set_current(None)
            return Received.FOR_LIBFUSE
        if request is None:
            return Received.NOTHING
        handle = self.handlers.get(request.opcode)
        if handle is not None:
            handle(request, self._native.body())
            return Received.HANDLED
        if request.file_flags & os.O_DIRECT:
            self.direct_came()
        handle_async = self.async_handlers.get(request.opcode)
        if handle_async is not None and self._nursery is not None:
            self._begin(handle_async, request, self._nursery)
            return Received.HANDLED
        self._native.leave_to_libfuse()
        set_current(request)
        return Received.FOR_LIBFUSE

    def notify_closing(self, fd: int) -> None:
        """End waits because ``fd`` is about to be closed, also one that polls."""
        self._closing = True
        trio.lowlevel.notify_closing(fd)


LOST: Final = (
    "no busy polling; a process that is killed while the source hangs waits for it; an append may "
    "overwrite what others appended in the source"
)
"""What works less well without the channel."""


def roll_back(request: Request) -> None:
    """Undo what a refused reply gave."""
    rollback, request.rollback = request.rollback, None
    if rollback is not None:
        rollback()


class _Trio:
    """Is trio, except for the lock and ``lowlevel``."""

    def __init__(self, channel: Channel) -> None:
        self.Lock = channel.make_lock
        self.lowlevel = _Lowlevel(channel)

    def __getattr__(self, name: str) -> object:
        return cast(object, getattr(trio, name))


class _Lowlevel:
    """Is trio.lowlevel, except for the waits."""

    def __init__(self, channel: Channel) -> None:
        self.wait_readable = channel.wait_readable
        self.notify_closing = channel.notify_closing

    def __getattr__(self, name: str) -> object:
        return cast(object, getattr(trio.lowlevel, name))
