"""The kernel's end of a FUSE device, for tests without a mount: sends requests, receives replies."""

import contextlib
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

from cleanfs.fuse.protocol import FUSE_IN_HEADER, FUSE_OUT_HEADER
from cleanfs.fuse.request import Request, current, set_current

PID = 4242


def message(
    opcode: int,
    unique: int,
    body: bytes = b"",
    *,
    pid: int = PID,
    node: int = 1,
    uid: int = 1000,
    gid: int = 100,
) -> bytes:
    """Pack a request."""
    length = FUSE_IN_HEADER.size + len(body)
    return FUSE_IN_HEADER.pack(length, opcode, unique, node, uid, gid, pid, 0, 0) + body


class Device:
    """A pair of sockets that keep the bounds of messages, in place of /dev/fuse."""

    def __init__(self) -> None:
        """Open both ends."""
        self._daemon, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.fd = self._daemon.fileno()
        self.kernel.setblocking(False)

    def send(self, opcode: int, unique: int, body: bytes = b"", *, pid: int = PID) -> None:
        """Send a request."""
        self.kernel.send(message(opcode, unique, body, pid=pid))

    def replies(self) -> list[tuple[int, int, bytes]]:
        """Receive the replies so far: their uniques, errors and bodies."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while reply := self.kernel.recv(1 << 21):
                length, error, unique = FUSE_OUT_HEADER.unpack_from(reply)
                assert length == len(reply)
                found.append((unique, error, reply[FUSE_OUT_HEADER.size :]))
        return found

    def close(self) -> None:
        """Close both ends."""
        self._daemon.close()
        self.kernel.close()


@contextlib.contextmanager
def handling(**fields: int) -> Iterator[Request]:
    """Let this task handle a request with these fields, and 0 in all others."""
    zeros = dict.fromkeys(("unique", "opcode", "nodeid", "uid", "gid", "pid", "flags", "file_flags"), 0)
    request = cast(Request, SimpleNamespace(**zeros | fields, rollback=None))
    before = current()
    set_current(request)
    try:
        yield request
    finally:
        set_current(before)
