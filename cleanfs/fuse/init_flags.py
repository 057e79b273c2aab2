"""Words of our own in the first exchange with the kernel.

The kernel asks for ``security.capability`` before each write, one request for every write, unless the
file system says in its answer to FUSE_INIT that it takes care of privileges itself: that a write takes
capabilities and set-id bits away (FUSE_HANDLE_KILLPRIV_V2, Linux 5.11). Then it asks once for a file,
and again only when attributes were refreshed, or before each write if there are set-id bits. libfuse
3.14 cannot say it, and does not tell whether a write is to take the bits: see ``Inode.asked_for``.

And it applies the umask to the mode of what is made, unless the file system says that it does so
itself (FUSE_DONT_MASK), as it must: in a directory with a default ACL the umask does not apply
(``Actor.mode``). pyfuse3 cannot say that.

And it drops all pages of a file as soon as it is told of another mtime (FUSE_AUTO_INVAL_DATA), which
each write of ours brings about: who reads and writes a file in turn would find nothing of it in the
kernel. Where we tell it ourselves (see ``Notifier.explicit``), it should leave them alone until then
(FUSE_EXPLICIT_INVAL_DATA, Linux 5.2). pyfuse3 cannot ask for that, and libfuse sets the other flag.

So for the length of that exchange libfuse reads and writes a socket in place of the device, and we are
the other end of it: the question goes in as it came, the answer goes out with some bits more. pyfuse3
waits for its descriptor through its global ``trio``, which is where we get to run: at its first wait
the question is there, at its second the answer.
"""

import logging
import os
import select
import socket
import struct
from collections.abc import Callable
from typing import Final

import trio

from cleanfs.fuse.wait_hook import WaitHook

log = logging.getLogger(__name__)

DEVICE: Final = "/dev/fuse"
FUSE_INIT: Final = 26
DONT_MASK: Final = 1 << 6
AUTO_INVAL_DATA: Final = 1 << 12
PARALLEL_DIROPS: Final = 1 << 18
EXPLICIT_INVAL_DATA: Final = 1 << 25
HANDLE_KILLPRIV_V2: Final = 1 << 28
WANTED: Final = DONT_MASK | PARALLEL_DIROPS | HANDLE_KILLPRIV_V2

QUESTION: Final = struct.Struct("<IIQQIIIIIIII")
"""fuse_in_header (length, opcode, unique, nodeid, uid, gid, pid, extensions) and the beginning of
fuse_init_in: major, minor, max_readahead, flags."""

ANSWER: Final = struct.Struct("<IiQIIII")
"""fuse_out_header (length, error, unique) and the beginning of fuse_init_out, as above."""

MAX_MESSAGE: Final = (1 << 20) + 4096
TIMEOUT_SECONDS: Final = 5
"""What question and answer get to arrive. They are there when they are looked for."""


class InitFlags(WaitHook):
    """One mount's. Use: made before ``pyfuse3.init``, ``begin`` right after it."""

    def __init__(self, more: int = 0, agreed: Callable[[int], None] = lambda flags: None) -> None:
        """Nothing is changed yet. ``more`` are flags to ask for beyond WANTED.

        ``agreed`` is called, before the first request comes, with those that the kernel has granted.
        """
        self._before = _devices()
        self._asked = WANTED | more
        self._agreed = agreed
        self._fd = self._device = -1
        self._ours: socket.socket | None = None
        self._wanted = 0

    def begin(self) -> None:
        """Be where pyfuse3 waits. A pyfuse3 that waits elsewhere never finds out, and loses nothing."""
        new = _devices() - self._before
        if len(new) == 1:
            [self._fd] = new
            self.hook()

    @property
    def device(self) -> int:
        """pyfuse3's descriptor of the FUSE device, once begun; -1 if it was not found."""
        return self._fd

    def _take_place(self) -> bool:
        """Put a socket with the question in place of the device. False if there is no question."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if not poll.poll(TIMEOUT_SECONDS * 1000):
            return False
        question = os.read(self._fd, MAX_MESSAGE)
        self._device = os.dup(self._fd)
        theirs, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.settimeout(TIMEOUT_SECONDS)
        with theirs:
            os.dup2(theirs.fileno(), self._fd, inheritable=False)
        self._ours.send(question)
        self._wanted = offered(question) & self._asked
        return True

    def _end(self) -> None:
        """Libfuse has answered, and gets its device back."""
        assert self._ours is not None
        with self._ours as ours:
            answer = bytes(ours.recv(MAX_MESSAGE))
        changed = with_flags(answer, self._wanted)
        if changed is not None:
            self._agreed(self._wanted)
        os.write(self._device, changed or answer)
        os.dup2(self._device, self._fd, inheritable=False)
        os.close(self._device)

    # -- what pyfuse3 takes for trio meanwhile --------------------------------------------------

    async def wait_readable(self, fd: int) -> None:
        """pyfuse3 is about to read its descriptor: the first time the question, then what follows."""
        if self._ours is None and self._take_place():
            await trio.lowlevel.checkpoint()
            return
        if self._ours is not None:
            self._end()
        self.unhook()
        await self.behind.lowlevel.wait_readable(fd)


def offered(question: bytes) -> int:
    """The flags that a FUSE_INIT of the kernel offers; none if it is no such question."""
    if len(question) < QUESTION.size:
        return 0
    _, opcode, *_, flags = QUESTION.unpack_from(question)
    return int(flags) if opcode == FUSE_INIT else 0


def with_flags(answer: bytes, wanted: int) -> bytes | None:
    """An answer to FUSE_INIT with some flags more; None if it is no such answer.

    Of AUTO_INVAL_DATA and EXPLICIT_INVAL_DATA the kernel would take the first.
    """
    if len(answer) < ANSWER.size:
        return None
    *head, flags = ANSWER.unpack_from(answer)
    length, error, _, major, *_ = head
    if error or length != len(answer) or major != 7:
        return None
    if wanted & EXPLICIT_INVAL_DATA:
        flags &= ~AUTO_INVAL_DATA
    return ANSWER.pack(*head, flags | wanted) + answer[ANSWER.size :]


def _devices() -> set[int]:
    """Descriptors of FUSE devices of this process."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == DEVICE:
                found.add(int(name))
        except OSError:
            pass  # the one of the listing
    return found
