"""NowaitProbe a mount that may never answer, as its daemon may be stopped, or its source hang.

Who waits for a FUSE file system can not always be ended, not even by a signal that kills. So a child
asks, and is left behind if it gets no answer.
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
"""What a mount gets. Control files answer within a millisecond, or a second on a very busy machine."""

END_SECONDS: Final = 1.0
"""What a killed child gets to end, if its daemon has not taken its request yet."""

RETURNED: Final = b"+"
FAILED: Final = b"-"


def answer(call: Callable[[], bytes], path: str, seconds: float = REPLY_SECONDS) -> bytes:
    """What a call that waits for ``path`` returns. It is made in a child process.

    Raises OSError: what the call raised, with that path, or TimeoutError if it did not return in time.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    # An interrupt in one of Python's own hooks at a fork is lost. The child ends when we stop waiting.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with warnings.catch_warnings():  # the child takes no lock that another thread may have
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
    except BaseException:
        os.close(reader)
        os.close(writer)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise
    if child == 0:
        _ask(call, writer)
    os.close(writer)
    message = None
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        message = _read(reader, time.monotonic() + seconds)
    finally:
        os.close(reader)
        if message is None:
            _end(child)
        else:
            os.waitpid(child, 0)
    if message is None:
        raise TimeoutError(errno.ETIMEDOUT, "does not answer", path)
    if message[:1] == RETURNED:
        return message[1:]
    number, _, why = message[1:].decode(errors="surrogateescape").partition(" ")
    raise OSError(int(number or errno.EIO), why or os.strerror(errno.EIO), path)


def _end(child: int) -> None:
    """Kill it, and see it end if it can: it keeps the mount busy."""
    os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + END_SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.005)


def _ask(call: Callable[[], bytes], writer: int) -> None:
    """The child; does not return."""
    # Somebody may wait for the end of a pipe that we write to, and this process may never end.
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


def _read(reader: int, deadline: float) -> bytes | None:
    """Everything up to its end; None if that did not come in time."""
    message = b""
    while select.select([reader], [], [], max(deadline - time.monotonic(), 0))[0]:
        piece = os.read(reader, 1 << 16)
        if not piece:
            return message
        message += piece
    return None
