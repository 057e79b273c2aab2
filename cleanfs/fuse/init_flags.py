"""Negotiate FUSE_INIT flags that libfuse 3.14 and pyfuse3 cannot set.

* FUSE_HANDLE_KILLPRIV_V2 (Linux 5.11): the file system itself clears capabilities and set-id bits on a
  write. Without the flag, the kernel requests ``security.capability`` before each write. With it, it
  does so once for a file, again after attributes were refreshed, and before each write if there are
  set-id bits. libfuse 3.14 does not pass on whether a write must clear the bits: see
  ``Inode.next_writer``.
* FUSE_DONT_MASK: the kernel leaves the umask to the file system. In a directory with a default ACL the
  umask must not apply (``Actor.mode``).
* FUSE_EXPLICIT_INVAL_DATA (Linux 5.2), where ``Notifier.explicit`` holds: the kernel drops pages only
  after an invalidation. libfuse sets FUSE_AUTO_INVAL_DATA instead, under which it drops all pages of a
  file upon another mtime. Each write through the mount changes that, so a program that reads and writes
  a file in turn would never hit the kernel's cache.

During FUSE_INIT, a socket takes the place of libfuse's device, and we are its other end. We pass on the
request unchanged and add bits to the reply. Our code runs in pyfuse3's wait, through its global
``trio``: before its first wait ends the request is there, at the second the reply.
"""

import logging
import os
import select
import socket
from collections.abc import Callable
from typing import Final

import trio

from cleanfs.fuse.protocol import (
    FUSE_AUTO_INVAL_DATA,
    FUSE_DONT_MASK,
    FUSE_EXPLICIT_INVAL_DATA,
    FUSE_HANDLE_KILLPRIV_V2,
    FUSE_IN_HEADER,
    FUSE_INIT,
    FUSE_INIT_IN,
    FUSE_INIT_OUT,
    FUSE_OUT_HEADER,
    FUSE_PARALLEL_DIROPS,
    MAX_REQUEST,
)
from cleanfs.fuse.wait_hook import WaitHook

log = logging.getLogger(__name__)

DEVICE: Final = "/dev/fuse"
WANTED: Final = FUSE_DONT_MASK | FUSE_PARALLEL_DIROPS | FUSE_HANDLE_KILLPRIV_V2

TIMEOUT_SECONDS: Final = 5
"""How long request and reply may take. They are there when they are read."""


class InitFlags(WaitHook):
    """Negotiates for one mount. Create it before ``pyfuse3.init``, and call ``begin`` right after."""

    def __init__(self, more: int = 0, granted: Callable[[int], None] = lambda flags: None) -> None:
        """Prepare to request WANTED and ``more``.

        ``granted`` is called with the flags in force, before the first other request.
        """
        self._before = _devices()
        self._requested = WANTED | more
        self._granted = granted
        self._fd = self._device = -1
        self._ours: socket.socket | None = None
        self._wanted = 0

    def begin(self) -> None:
        """Hook pyfuse3's wait. A pyfuse3 that waits elsewhere works without the flags."""
        new = _devices() - self._before
        if len(new) == 1:
            [self._fd] = new
            self.hook()

    @property
    def device(self) -> int:
        """pyfuse3's fd of the FUSE device, once begun; -1 if it was not found."""
        return self._fd

    def _replace_device(self) -> bool:
        """Put a socket with the request in place of the device. False if there is no request."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if not poll.poll(TIMEOUT_SECONDS * 1000):
            return False
        request = os.read(self._fd, MAX_REQUEST)
        self._device = os.dup(self._fd)
        theirs, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.settimeout(TIMEOUT_SECONDS)
        with theirs:
            os.dup2(theirs.fileno(), self._fd, inheritable=False)
        self._ours.send(request)
        self._wanted = offered(request) & self._requested
        return True

    def _restore_device(self) -> None:
        """Pass on libfuse's reply, and put its device back."""
        assert self._ours is not None
        with self._ours as ours:
            reply = bytes(ours.recv(MAX_REQUEST))
        changed = with_flags(reply, self._wanted)
        if changed is not None:
            self._granted(self._wanted)
        os.write(self._device, changed or reply)
        os.dup2(self._device, self._fd, inheritable=False)
        os.close(self._device)

    # -- hooks in pyfuse3's wait ------------------------------------------------------------------

    async def wait_readable(self, fd: int) -> None:
        """Run before pyfuse3 reads its fd: the first time the FUSE_INIT, then the next request."""
        if self._ours is None and self._replace_device():
            await trio.lowlevel.checkpoint()
            return
        if self._ours is not None:
            self._restore_device()
        self.unhook()
        await self.behind.lowlevel.wait_readable(fd)


def offered(request: bytes) -> int:
    """Return the flags that the kernel offers in a FUSE_INIT; none for any other request."""
    if len(request) < FUSE_IN_HEADER.size + FUSE_INIT_IN.size:
        return 0
    _, opcode, *_ = FUSE_IN_HEADER.unpack_from(request)
    *_, flags = FUSE_INIT_IN.unpack_from(request, FUSE_IN_HEADER.size)
    return int(flags) if opcode == FUSE_INIT else 0


def with_flags(reply: bytes, wanted: int) -> bytes | None:
    """Add flags to a reply to FUSE_INIT; None if it is no such reply.

    Of FUSE_AUTO_INVAL_DATA and FUSE_EXPLICIT_INVAL_DATA the kernel would take the first.
    """
    body = FUSE_OUT_HEADER.size
    if len(reply) < body + FUSE_INIT_OUT.size:
        return None
    length, error, _ = FUSE_OUT_HEADER.unpack_from(reply)
    *versions, flags = FUSE_INIT_OUT.unpack_from(reply, body)
    if error or length != len(reply) or versions[0] != 7:
        return None
    if wanted & FUSE_EXPLICIT_INVAL_DATA:
        flags &= ~FUSE_AUTO_INVAL_DATA
    changed = FUSE_INIT_OUT.pack(*versions, flags | wanted)
    return reply[:body] + changed + reply[body + len(changed) :]


def _devices() -> set[int]:
    """Return this process's fds of FUSE devices."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == DEVICE:
                found.add(int(name))
        except OSError:
            pass  # the fd of the listing itself
    return found
