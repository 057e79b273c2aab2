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
  poll the scheduler says whether another task could run (a thread has finished, a deadline has passed);
  if so, that task runs. At the latest it runs after ``MAX_UNYIELDING_NS``.
* Polling releases the GIL, so worker threads make progress.
"""

import contextlib
import logging
import os
import stat as stat_module
import time
from collections.abc import Callable
from typing import Any, Final, cast

import pyfuse3
import trio

from cleanfs.fuse import init_flags
from cleanfs.fuse.busy_poll import BusyPollStats, Window
from cleanfs.fuse.reader_lock import ReaderLock
from cleanfs.fuse.request import Request, set_current
from cleanfs.fuse.session import native

log = logging.getLogger(__name__)

MAX_UNYIELDING_NS: Final = 100_000
"""The scheduler runs at least this often: it does not report tasks that it is about to run anyway."""

POLL_SLICE_NS: Final = 10_000
"""How long to poll before looking again whether another task could run."""

Handler = Callable[[Request, bytes], None]
"""Handles a message, given its body, without waiting."""


class Channel:
    """The channel of one mount. Call ``begin`` right after ``pyfuse3.init``."""

    def __init__(
        self,
        busy_poll_us: float,
        wanted_init_flags: int = 0,
        init_flags_granted: Callable[[int], None] = lambda flags: None,
    ) -> None:
        """Poll for at most ``busy_poll_us`` microseconds at a time.

        ``init_flags_granted`` is called with the FUSE_INIT flags in force, before any other request.
        """
        self.handlers: dict[int, Handler] = {}
        """The messages that are handled here, by opcode."""
        self.device = -1
        """The fd of the FUSE device; -1 if it is not known."""
        self.refused: Callable[[Request], None] = roll_back
        """Called when the kernel refuses a reply of libfuse, as the requester is gone."""
        self._wanted_init_flags = wanted_init_flags
        self._init_flags_granted = init_flags_granted
        self._window = Window(int(busy_poll_us * 1000))
        self._native: Any = None
        self._lock = ReaderLock()
        self._lock_made = False
        self._closing = False
        self._yielded_ns = 0
        self._polled = self._slept = 0

    def begin(self) -> None:
        """Take over the session that was just mounted, if this pyfuse3 lets us; else warn."""
        device = None if native is None else native.session_fd()
        self.device = find_device() if device is None else device
        if native is None or device is None:
            log.warning("libfuse reads the FUSE device by itself: %s", LOST)
            return
        if getattr(pyfuse3, "trio", None) is not trio:
            log.warning("this pyfuse3 has no wait that can be replaced: %s", LOST)
            return
        self.receive_from(device)
        self._native.attach()
        pyfuse3.trio = _Trio(self)  # type: ignore[attr-defined]  # an attribute of its C module

    def receive_from(self, device: int) -> None:
        """Receive messages from an open FUSE device, which becomes non-blocking."""
        assert native is not None
        self.device = device
        self._native = native.Channel(device, self._init_reply, self._refused)

    def confirm(self) -> None:
        """Warn if this pyfuse3 waits elsewhere. Call this once the mount has replied to a request."""
        if self._native is not None and not self._polled + self._slept:
            log.warning("this pyfuse3 does not use the wait that was replaced: %s", LOST)

    def close(self) -> None:
        """Leave the device to libfuse, and pyfuse3 its trio."""
        if self._native is not None:
            pyfuse3.trio = trio  # type: ignore[attr-defined]  # see begin
            self._native.close()

    def stats(self) -> BusyPollStats:
        """Return a snapshot."""
        return BusyPollStats(self._window.limit_ns / 1000, self._polled, self._slept)

    def request(self, unique: int) -> Request | None:
        """Return the request with that id, if it has no reply of its handler yet."""
        return cast(Request | None, self._native.request(unique))

    def reply(self, request: Request, error: int, body: bytes = b"") -> bool:
        """Reply to a request; ``error`` is 0 or a negative errno. False if its requester is gone.

        Raises OSError.
        """
        return cast(bool, self._native.reply(request.unique, error, body))

    def _init_reply(self, request: bytes, reply: bytes) -> bytes:
        changed, granted = init_flags.negotiate(request, reply, self._wanted_init_flags)
        self._init_flags_granted(granted)
        return changed

    def _refused(self, request: Request) -> None:
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
        began = time.perf_counter_ns()
        if await self._poll(began):
            self._polled += 1
            return
        if self._closing:
            raise trio.ClosedResourceError
        self._slept += 1
        await trio.lowlevel.wait_readable(fd)
        while not self._receive(0):
            await trio.lowlevel.wait_readable(fd)
        self._yielded_ns = time.perf_counter_ns()
        self._window.waited(self._yielded_ns - began)

    async def _poll(self, began: int) -> bool:
        """Receive until the window closes. Returns whether libfuse has something to read."""
        deadline = began + self._window.ns
        now = began
        while now < deadline:
            if now > self._yielded_ns + MAX_UNYIELDING_NS or self._others_can_run():
                await trio.lowlevel.checkpoint()
                self._yielded_ns = time.perf_counter_ns()
                if self._closing:
                    return False
            if self._receive(min(deadline - now, POLL_SLICE_NS)):
                return True
            now = time.perf_counter_ns()
        return False

    def _receive(self, poll_ns: int) -> bool:
        """Receive one message. Returns whether libfuse has something to read."""
        try:
            request = self._native.receive(poll_ns)
        except OSError:  # the end of the connection, which libfuse must see itself
            set_current(None)
            return True
        if request is None:
            return False
        handle = self.handlers.get(request.opcode)
        if handle is not None:
            handle(request, self._native.body())
            return False
        self._native.leave_to_libfuse()
        set_current(request)
        return True

    def _others_can_run(self) -> bool:
        scheduler = trio.lowlevel.current_statistics()
        return (
            scheduler.tasks_runnable > self._lock.woken
            or scheduler.run_sync_soon_queue_size > 0
            or scheduler.seconds_to_next_deadline <= 0
        )

    def notify_closing(self, fd: int) -> None:
        """End waits because ``fd`` is about to be closed, also one that polls."""
        self._closing = True
        trio.lowlevel.notify_closing(fd)


LOST: Final = (
    "no busy polling; a process that is killed while the source hangs waits for it; an append may "
    "overwrite what others appended in the source"
)
"""What works less well without the channel."""


FUSE_DEVICE: Final = os.makedev(10, 229)
"""The number of /dev/fuse (Documentation/admin-guide/devices.txt)."""


def find_device() -> int:
    """Return the fd of this process that is open on /dev/fuse; -1 if there is not exactly one."""
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # that of the list is closed by now
            st = os.fstat(fd)
            if stat_module.S_ISCHR(st.st_mode) and st.st_rdev == FUSE_DEVICE:
                found.append(fd)
    return found[0] if len(found) == 1 else -1


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
