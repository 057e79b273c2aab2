"""Call a mount that may never reply, because its daemon is stopped or its source hangs.

A process that waits for a FUSE file system cannot always be ended, not even by SIGKILL. So a forked
child makes the call, and is left behind if it does not return.
"""

import errno
import os
import select
import signal
import time
import warnings
from collections.abc import Callable
from typing import Final

REPLY_SECONDS: Final = 5.0
"""How long a call may take. Control files reply within a millisecond, or a second on a very busy
machine."""

END_SECONDS: Final = 1.0
"""How long to wait for a killed child. It ends if the daemon has not read its request yet."""

RETURNED: Final = b"+"
FAILED: Final = b"-"


def forked_call(call: Callable[[], bytes], path: str, seconds: float = REPLY_SECONDS) -> bytes:
    """Make a call that waits for ``path`` in a child process, and return its result.

    Raises the call's OSError, with that path, or TimeoutError if it did not return in time.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    # Python loses an interrupt that arrives in its hooks at a fork.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with warnings.catch_warnings():  # the child takes no lock that another thread may hold
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
    except BaseException:
        os.close(reader)
        os.close(writer)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise
    if child == 0:
        _run_child(call, writer)
    os.close(writer)
    message = None
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        message = _read_all(reader, time.monotonic() + seconds)
    finally:
        os.close(reader)
        if message is None:
            _kill(child)
        else:
            os.waitpid(child, 0)
    if message is None:
        raise TimeoutError(errno.ETIMEDOUT, "does not reply", path)
    if message[:1] == RETURNED:
        return message[1:]
    number, _, why = message[1:].decode(errors="surrogateescape").partition(" ")
    raise OSError(int(number or errno.EIO), why or os.strerror(errno.EIO), path)


def _kill(child: int) -> None:
    """Kill a child and wait a moment for its end, since it keeps the mount busy."""
    os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + END_SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.005)


def _run_child(call: Callable[[], bytes], writer: int) -> None:
    """Send the call's result to the parent. Does not return."""
    # Another process may wait for the end of an inherited pipe, and this one may never end.
    os.closerange(0, writer)
    os.closerange(writer + 1, os.sysconf("SC_OPEN_MAX"))
    try:
        message = RETURNED + call()
    except OSError as exc:
        message = FAILED + f"{exc.errno or errno.EIO} {exc.strerror or exc}".encode(
            errors="surrogateescape"
        )
    except BaseException:
        message = FAILED
    try:
        with open(writer, "wb") as file:
            file.write(message)
    finally:
        os._exit(0)


def _read_all(reader: int, deadline: float) -> bytes | None:
    """Read up to the end of the pipe; None if it did not come in time."""
    message = b""
    while select.select([reader], [], [], max(deadline - time.monotonic(), 0))[0]:
        piece = os.read(reader, 1 << 16)
        if not piece:
            return message
        message += piece
    return None
