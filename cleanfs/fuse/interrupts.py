"""Release processes that are killed while they wait for a source that hangs.

A process waits in the kernel until our reply, even when it is killed. The kernel reports its signal by
a FUSE_INTERRUPT, which libfuse notes and pyfuse3 has no handler for. So while a call hangs, and now and
then before, we read the device ourselves: an interrupt is for us. Any other message goes to libfuse in
a file that replaces the device for one read. As in ``init_flags``, this runs in pyfuse3's wait.

A signal shortly before, which libfuse read, is not lost: the kernel repeats its interrupts
(``_request_interrupts_again``), if the request is one of the last two seconds.

An interrupt does not say which signal came. A process that continues (a timer, a child, a resized
window) must not get EINTR from a regular file, so only killed ones are released. /proc names them:
every fatal signal becomes a SIGKILL that is pending until the process has ended. We know the requester
of a request that we have read. Of other requests we only know that some killed thread, whose requests
we have not read, has made one.

No other thread may use libfuse's fd meanwhile: what it wrote there went into the message. Notifications
sent by the main thread could wait for a reply of the main thread (both were seen). So notifications
have an fd of their own (``Notifier.use_device``).

The kernel accepts the reply EINTR from us directly, as from any process that has the device. The
handler goes on until the source replies. Then its own reply is refused, and so we learn that nobody
owns the reference or open file in it (``RefusedReplies``). libfuse logs a refusal by the device. For a
reply that it wrote into the file, we see the refusal when we send it on.
"""

import contextlib
import errno
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

import trio

from cleanfs.fuse.protocol import (
    FUSE_BATCH_FORGET,
    FUSE_FORGET,
    FUSE_IN_HEADER,
    FUSE_INT_REQ_BIT,
    FUSE_INTERRUPT,
    FUSE_INTERRUPT_IN,
    FUSE_OUT_HEADER,
    MAX_REQUEST,
)
from cleanfs.fuse.refused_replies import UNDOABLE, RefusedReplies
from cleanfs.fuse.request_ids import RequestIds, unknown_ids_are_safe
from cleanfs.fuse.wait_hook import WaitHook
from cleanfs.linux.killed_threads import killed_threads
from cleanfs.source.io import Backing

log = logging.getLogger(__name__)

GUARD_SECONDS: Final = 0.2
"""How long a call must have waited before we read the device. A slow disk is no reason to come between
the kernel and libfuse."""

RELEASE_SECONDS: Final = 0.5
"""How long a call must have waited before its requester is released. A slow disk replies earlier."""

CHECK_SECONDS: Final = 0.2
"""How often to look for killed threads, while a requester has a signal."""

MAX_REQUESTERS: Final = 1 << 14
"""Requests, the newest that we have read, of which it is remembered who made them: 2.5 MB at most. Of
those that got a signal meanwhile it is remembered anyway."""

MAX_SIGNALLED: Final = 256
"""Requests that had a signal, before the kernel is asked which of them are left."""

IDS_PER_CHECKPOINT: Final = 256
"""Requests asked about before others get their turn."""


class Interrupts(WaitHook, logging.Filter):
    """Releases one mount's killed requesters.

    Call ``install`` after that of ``busypoll``, and ``run`` beside pyfuse3's loop.
    """

    def __init__(
        self,
        backing: Backing,
        refused_replies: RefusedReplies,
        before_release: Callable[[], None] = lambda: None,
    ) -> None:
        """Watch the calls of a source. ``before_release`` is called before a requester is
        released.
        """
        super().__init__()
        self._before_release = before_release
        self._backing = backing
        self._refused_replies = refused_replies
        self._fd = self._device = self._message_file = -1
        self._message_length = 0
        self._signalled: dict[int, int] = {}  # request ids, and their threads, 0 if unknown
        self._request_ids = RequestIds()
        self._unseen = False  # libfuse may have read interrupts
        self._requesters = OrderedDict[int, int]()  # threads, by unique; oldest first

    def install(self) -> None:
        """Hook pyfuse3's wait. Under a pyfuse3 that waits elsewhere, no process is released."""
        if self.hook():
            logging.getLogger("pyfuse3").addFilter(self)

    def uninstall(self) -> None:
        """Leave the device to libfuse alone."""
        self.unhook()
        logging.getLogger("pyfuse3").removeFilter(self)
        if self._device >= 0:
            self._restore_device()
            os.close(self._device)
            os.close(self._message_file)
            self._device = self._message_file = -1

    async def run(self) -> None:
        """Release killed requesters; never returns."""
        while True:
            await self._backing.thread_limiter.in_use()
            await trio.sleep(CHECK_SECONDS)
            if not self._hangs():
                if len(self._signalled) > MAX_SIGNALLED:
                    await self._request_interrupts_again(list(self._signalled))
            elif self._backing.thread_limiter.oldest_seconds > RELEASE_SECONDS:
                if self._unseen or len(self._signalled) > MAX_SIGNALLED:
                    recent = self._request_ids.recent() if self._unseen else ()
                    self._unseen = False
                    await self._request_interrupts_again([*self._signalled, *recent])
                if self._signalled:
                    await self._release_killed()

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop log records of refused replies whose requester, or the whole mount, is gone."""
        message = str(record.msg)
        if "fuse_reply" not in message or os.strerror(errno.ENOENT) not in record.getMessage():
            return True
        if self._backing.abandoned_calls:
            self._backing.abandoned_calls -= 1
            if UNDOABLE.match(message):
                self._refused_replies.refused()
        return False

    def _hangs(self) -> bool:
        return self._backing.thread_limiter.oldest_seconds > GUARD_SECONDS

    async def _release_killed(self) -> None:
        signalled = dict(self._signalled)
        killed = await trio.to_thread.run_sync(killed_threads, abandon_on_cancel=True)
        others = killed.difference(signalled.values())
        for unique, requester in signalled.items():
            if not (requester in killed if requester else others):
                continue
            self._signalled.pop(unique, None)
            self._before_release()
            with contextlib.suppress(OSError):  # ENOENT: it has had its reply
                os.write(self._device, FUSE_OUT_HEADER.pack(FUSE_OUT_HEADER.size, -errno.EINTR, unique))
                self._backing.abandoned_calls += 1

    async def _request_interrupts_again(self, request_ids: Sequence[int]) -> None:
        """Have the kernel tell once more of the signals of these, which libfuse, and not we, may have
        heard of; forget those that are answered.

        That is what the answer EAGAIN to an interrupt is for (``fuse_dev_do_write``), and the kernel
        takes it for any request: EINVAL if nothing interrupts it, ENOENT if there is none of that
        number (any more).
        """
        if not unknown_ids_are_safe():
            for unique in list(self._signalled)[:-MAX_SIGNALLED]:  # most of them were answered
                del self._signalled[unique]
            return
        for number, unique in enumerate(request_ids, 1):
            if not number % IDS_PER_CHECKPOINT:
                await trio.lowlevel.checkpoint()
            try:
                os.write(
                    self._device,
                    FUSE_OUT_HEADER.pack(
                        FUSE_OUT_HEADER.size, -errno.EAGAIN, unique | FUSE_INT_REQ_BIT
                    ),
                )
            except OSError:
                self._signalled.pop(unique, None)
            else:
                self._signalled.setdefault(unique, self._requesters.get(unique, 0))

    # -- the device -----------------------------------------------------------------------------

    def _pass_on(self, fd: int) -> bool:
        """Read a message for libfuse. False if there is none that it should read."""
        if self._device < 0:
            self._fd, self._device = fd, os.dup(fd)
            self._message_file = os.memfd_create("fuse")
        try:
            message = os.read(self._device, MAX_REQUEST)
        except OSError as exc:
            # ENOENT: the requester is gone. ENODEV: unmounted, which libfuse must see itself.
            return exc.errno not in (errno.EAGAIN, errno.EINTR, errno.ENOENT)
        _, opcode, unique, _, _, _, requester, *_ = FUSE_IN_HEADER.unpack_from(message)
        if opcode == FUSE_INTERRUPT:
            [unique] = FUSE_INTERRUPT_IN.unpack_from(message, FUSE_IN_HEADER.size)
            self._signalled[unique] = self._requesters.get(unique, 0)
            return False
        self._request_ids.saw(unique)
        if opcode not in (FUSE_FORGET, FUSE_BATCH_FORGET):  # these have no reply
            self._requesters[unique] = requester
            if len(self._requesters) > MAX_REQUESTERS:
                self._requesters.popitem(last=False)
        os.pwrite(self._message_file, message, 0)
        os.lseek(self._message_file, 0, os.SEEK_SET)
        os.dup2(self._message_file, fd, inheritable=False)
        self._message_length = len(message)
        self._refused_replies.write_to(self._message_file)
        return True

    def _restore_device(self) -> None:
        """Restore the device, and send the replies that were written behind the message."""
        if not self._message_length:
            return
        os.dup2(self._device, self._fd, inheritable=False)
        at, end = self._message_length, os.fstat(self._message_file).st_size
        self._message_length = 0
        while at < end:
            length, *_ = FUSE_OUT_HEADER.unpack(os.pread(self._message_file, FUSE_OUT_HEADER.size, at))
            self._send(os.pread(self._message_file, length, at), at)
            at += length
        os.ftruncate(self._message_file, 0)
        self._refused_replies.write_to(-1)

    def _send(self, reply: bytes, written_at: int) -> None:
        try:
            os.write(self._device, reply)
        except OSError as exc:
            # libfuse, which would have logged that, takes it for sent.
            if exc.errno == errno.ENOENT and self._backing.abandoned_calls:
                self._backing.abandoned_calls -= 1
                self._refused_replies.refused(written_at)
            elif exc.errno not in (errno.ENOENT, errno.ENODEV):
                log.warning("the kernel refused a reply: %s", exc)

    # -- the hook in pyfuse3's wait --------------------------------------------------------------

    async def wait_readable(self, fd: int) -> None:
        """Run before pyfuse3 reads the device."""
        self._restore_device()
        while True:
            await self.behind.lowlevel.wait_readable(fd)
            self._request_ids.messages += 1
            if (
                self._backing.thread_limiter.oldest_seconds <= GUARD_SECONDS
                and time.monotonic() < self._request_ids.due_at
            ):
                self._unseen = True
                return
            if self._pass_on(fd):
                return
