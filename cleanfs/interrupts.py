"""Letting go of programs that are killed while they wait for a source that hangs.

A program waits in the kernel until we answer, also when it is killed. The kernel tells us of its
signal by a FUSE_INTERRUPT, which libfuse takes note of and pyfuse3 has no handler for. So while a call
hangs, and now and then before, we read the device ourselves: an interrupt is for us, anything else
goes to libfuse, in a file that takes the device's place for the length of one read. As in
``handshake``, pyfuse3's wait is where we get to run.

A signal of the moment before, of which libfuse took note, is not lost: the kernel tells once more of
those that it has told of (``_ask_again``).

An interrupt tells of any signal, and not of which. A program that is to go on (a timer, a child, a
window that was resized) must not get EINTR from a regular file, so only those are let go that are
dying. Who is, /proc says: every signal that ends a program becomes a SIGKILL that is pending until it
has ended. Whose a request is, we know if we have read it; of others it is only known that somebody who
is dying has made one, unless that one has made one of the first kind.

Nobody else may use libfuse's descriptor meanwhile: what a thread wrote there went into the message, and
what was told to the kernel from here, by the main thread, could wait for an answer of the main thread
(both were seen). So notifications have a descriptor of their own (``Notifier.use_device``).

The kernel takes the answer EINTR to a request from us directly, as from anybody who has the device.
The handler goes on, until the source answers; then its own answer is refused, which is how we learn
that what it gave out (a reference, an open file) is nobody's (``Given``). Libfuse says so of what it
sends to the device; of what it wrote into a lent message we find out when we send that on.
"""

import contextlib
import errno
import logging
import os
import re
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

import trio

from cleanfs.backing import Backing
from cleanfs.standin import StandIn

log = logging.getLogger(__name__)

FUSE_INTERRUPT: Final = 36

HEADER: Final = struct.Struct("<IIQQIII")
"""The beginning of fuse_in_header: length, opcode, unique, node, uid, gid, thread id."""

HEADER_SIZE: Final = 40
INTERRUPTED: Final = struct.Struct("<Q")
"""fuse_interrupt_in: the request's unique."""

ANSWER: Final = struct.Struct("<IiQ")
"""fuse_out_header: length, error, unique."""

MAX_MESSAGE: Final = (1 << 20) + (1 << 16)

GUARD_SECONDS: Final = 0.2
"""How long a call must have been waiting, for us to read the device. A disk that is merely slow is no
reason to come between the kernel and libfuse."""

PATIENCE_SECONDS: Final = 0.5
"""How long a call must have been waiting, for its program to be let go. A disk that is merely slow
answers by then, and nobody is told of a signal."""

CHECK_SECONDS: Final = 0.2
"""How often it is looked who is dying, while somebody who waits has got a signal."""

SAMPLE_SECONDS: Final = 0.25
"""We also read a message that often, to know what number the requests have reached."""

SAMPLES_KEPT_SECONDS: Final = 2.0
"""A signal that was missed is looked for at the latest that long after its request was made."""

STEP: Final = 2
"""From one request's unique to the next one's (fs/fuse/dev.c, FUSE_REQ_ID_STEP; since Linux 4.20)."""

INTERRUPT_BIT: Final = 1
"""In the unique of an answer: it is one to the request's interrupt (FUSE_INT_REQ_BIT, ibid.)."""

ASKS_SINCE: Final = (5, 1)
"""The Linux that takes such an answer for requests that nothing interrupts, too, and refuses it."""

MAX_ASKED: Final = 1 << 18
"""The newest requests that are asked about. In two seconds there are less."""

MAX_ASKERS: Final = 4096
"""Requests, the newest that we have read, of which it is remembered who made them."""

UNREAD: Final = 1024
"""Requests that may have got a number and were taken back before anybody could read them."""

ASKED_AT_ONCE: Final = 256
"""Requests asked about before others get their turn."""

SIGKILL_PENDING: Final = 1 << 8
"""In the masks of /proc/PID/status."""

GIVING: Final = re.compile(r"fuse_(lookup|mknod|mkdir|symlink|link|open|create|opendir|readdirplus)\b")
"""Handlers whose answers give something out, as pyfuse3 names them when one is refused."""


class Given:
    """What the last handler gave out, and how to take that back if the kernel refuses the answer.

    Each of the GIVING ones says so as the last thing that it does, or that it gives nothing.
    """

    def __init__(self) -> None:
        """Nothing."""
        self._take_back: Callable[[], None] | None = None
        self._letter = -1
        self._written: dict[int, Callable[[], None]] = {}  # by where the answer is in the letter

    def hold(self, take_back: Callable[[], None] | None) -> None:
        """A handler is about to return; pyfuse3 sends its answer before anything else runs."""
        self._take_back = take_back
        if self._letter >= 0 and take_back is not None:
            self._written[os.lseek(self._letter, 0, os.SEEK_CUR)] = take_back

    def lent(self, letter: int) -> None:
        """Answers go into a file for now, -1 for no longer: whether they are refused is known later."""
        self._letter = letter
        self._written.clear()

    def refused(self, written_at: int | None = None) -> None:
        """The last answer was refused, or the one that begins there in the letter."""
        if written_at is None:
            take_back, self._take_back = self._take_back, None
        else:
            take_back = self._written.pop(written_at, None)
        if take_back is not None:
            take_back()


class Sample(NamedTuple):
    """What number the requests had reached."""

    at: float
    unique: int
    message: int
    """How many messages were read before."""


class Interrupts(StandIn, logging.Filter):
    """One mount's. Use: ``install`` after ``busypoll``'s, ``run`` along with pyfuse3's loop."""

    def __init__(self, backing: Backing, given: Given) -> None:
        """Watch over the calls of a source."""
        super().__init__()
        self._backing = backing
        self._given = given
        self._fd = self._device = self._letter = -1
        self._lent = 0
        self._signalled: dict[int, None] = {}
        self._messages = 0
        self._samples: deque[Sample] = deque()  # oldest first
        self._sample_due_at = 0.0
        self._unseen = False  # there may be signals that libfuse has read of, or we for nothing
        self._askers: dict[int, int] = {}  # threads, by unique; oldest first

    def install(self) -> None:
        """Be where pyfuse3 waits. A pyfuse3 that waits elsewhere lets nobody go."""
        if self.step_in():
            logging.getLogger("pyfuse3").addFilter(self)

    def uninstall(self) -> None:
        """The device is libfuse's alone again."""
        self.step_back()
        logging.getLogger("pyfuse3").removeFilter(self)
        if self._device >= 0:
            self._take_place_back()
            os.close(self._device)
            os.close(self._letter)
            self._device = self._letter = -1

    async def run(self) -> None:
        """Let go of who is dying; never ends."""
        while True:
            await self._backing.slots.in_use()
            await trio.sleep(CHECK_SECONDS)
            if not self._hangs():
                self._unseen |= bool(self._signalled)  # most will be answered
                self._signalled.clear()
            elif self._backing.slots.oldest_seconds > PATIENCE_SECONDS:
                if self._unseen:
                    self._unseen = False
                    await self._ask_again()
                if self._signalled:
                    await self._let_go_of_the_dying()

    def filter(self, record: logging.LogRecord) -> bool:
        """False for an answer that was refused, as who had asked is gone, or the whole mount."""
        message = str(record.msg)
        if "fuse_reply" not in message or os.strerror(errno.ENOENT) not in record.getMessage():
            return True
        if self._backing.orphans:
            self._backing.orphans -= 1
            if GIVING.match(message):
                self._given.refused()
        return False

    def _hangs(self) -> bool:
        return self._backing.slots.oldest_seconds > GUARD_SECONDS

    async def _let_go_of_the_dying(self) -> None:
        signalled = list(self._signalled)
        dying = await trio.to_thread.run_sync(dying_threads, abandon_on_cancel=True)
        others = dying.difference(self._askers.get(unique, 0) for unique in signalled)
        for unique in signalled:
            asker = self._askers.get(unique, 0)
            if not (asker in dying if asker else others):
                continue
            self._signalled.pop(unique, None)
            with contextlib.suppress(OSError):  # ENOENT: it was answered meanwhile
                os.write(self._device, ANSWER.pack(ANSWER.size, -errno.EINTR, unique))
                self._backing.orphans += 1

    async def _ask_again(self) -> None:
        """Have the kernel tell once more of the signals that libfuse, and not we, heard of.

        That is what the answer EAGAIN to an interrupt is for (``fuse_dev_do_write``), and the kernel
        takes it for any request: EINVAL if nothing interrupts it, ENOENT if there is none of that
        number (any more).
        """
        if not self._samples or kernel_version() < ASKS_SINCE:
            return
        newest = self._samples[-1]
        last = newest.unique + STEP * (self._messages - newest.message + UNREAD)
        first = max(self._samples[0].unique, last - STEP * MAX_ASKED)
        for asked, unique in enumerate(range(first, last, STEP), 1):
            if not asked % ASKED_AT_ONCE:
                await trio.lowlevel.checkpoint()
            with contextlib.suppress(OSError):
                os.write(self._device, ANSWER.pack(ANSWER.size, -errno.EAGAIN, unique | INTERRUPT_BIT))
                self._signalled[unique] = None

    # -- the device -----------------------------------------------------------------------------

    def _lend(self, fd: int) -> bool:
        """Read a message. True if libfuse may read, and gets it; False if there is none for it."""
        if self._device < 0:
            self._fd, self._device = fd, os.dup(fd)
            self._letter = os.memfd_create("fuse")
        try:
            message = os.read(self._device, MAX_MESSAGE)
        except OSError as exc:
            # ENOENT: who had asked is gone. ENODEV: unmounted, which libfuse wants to see itself.
            return exc.errno not in (errno.EAGAIN, errno.EINTR, errno.ENOENT)
        _, opcode, unique, *_, asker = HEADER.unpack_from(message)
        if opcode == FUSE_INTERRUPT:
            [unique] = INTERRUPTED.unpack_from(message, HEADER_SIZE)
            self._signalled[unique] = None
            return False
        self._sample(unique)
        self._askers[unique] = asker
        if len(self._askers) > MAX_ASKERS:
            del self._askers[next(iter(self._askers))]
        os.pwrite(self._letter, message, 0)
        os.lseek(self._letter, 0, os.SEEK_SET)
        os.dup2(self._letter, fd, inheritable=False)
        self._lent = len(message)
        self._given.lent(self._letter)
        return True

    def _take_place_back(self) -> None:
        """Libfuse has read. Whatever was answered meanwhile stands behind the message."""
        if not self._lent:
            return
        os.dup2(self._device, self._fd, inheritable=False)
        at, end = self._lent, os.fstat(self._letter).st_size
        self._lent = 0
        while at < end:
            length, *_ = ANSWER.unpack(os.pread(self._letter, ANSWER.size, at))
            self._send(os.pread(self._letter, length, at), at)
            at += length
        os.ftruncate(self._letter, 0)
        self._given.lent(-1)

    def _send(self, answer: bytes, written_at: int) -> None:
        try:
            os.write(self._device, answer)
        except OSError as exc:
            # Libfuse, which would have said so, takes it for sent.
            if exc.errno == errno.ENOENT and self._backing.orphans:
                self._backing.orphans -= 1
                self._given.refused(written_at)
            elif exc.errno not in (errno.ENOENT, errno.ENODEV):
                log.warning("the kernel refused an answer: %s", exc)

    def _sample(self, unique: int) -> None:
        now = time.monotonic()
        if now < self._sample_due_at:
            return
        self._sample_due_at = now + SAMPLE_SECONDS
        self._samples.append(Sample(now, unique, self._messages))
        while len(self._samples) > 1 and self._samples[1].at < now - SAMPLES_KEPT_SECONDS:
            self._samples.popleft()

    # -- what pyfuse3 takes for trio ------------------------------------------------------------

    async def wait_readable(self, fd: int) -> None:
        """pyfuse3 is about to read the device."""
        self._take_place_back()
        while True:
            await self.behind.lowlevel.wait_readable(fd)
            self._messages += 1
            if (
                self._backing.slots.oldest_seconds <= GUARD_SECONDS
                and time.monotonic() < self._sample_due_at
            ):
                self._unseen = True
                return
            if self._lend(fd):
                return


def dying_threads() -> set[int]:
    """Threads on this machine that were killed and wait for something that no signal ends.

    Each wait for us is one. Of the others most are short.
    """
    found: set[int] = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            found.update(
                int(task)
                for task in os.listdir(f"/proc/{pid}/task")
                if _is_killed(f"/proc/{pid}/task/{task}/status")
            )
    return found


def kernel_version() -> tuple[int, ...]:
    """Its first two numbers."""
    return tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])


def _is_killed(status: str) -> bool:
    waits = False
    with contextlib.suppress(OSError), open(status, "rb") as lines:
        for line in lines:
            if line.startswith(b"State:"):
                waits = line.split()[1] == b"D"
            elif line.startswith(b"SigPnd:"):
                return waits and bool(int(line.split()[1], 16) & SIGKILL_PENDING)
    return False
