"""Serve a mount from a background process that the caller can wait for."""

import contextlib
import logging
import os
from collections.abc import Callable, Collection
from typing import NoReturn

from cleanfs.mount.config import MountConfig, MountError, OptionError
from cleanfs.mount.mount import serve
from cleanfs.mount.mountpoint import reuse_dead_mountpoint

log = logging.getLogger(__name__)

READY = "ready"
"""The daemon's message to the waiting process once the mount replies."""

WRONG_OPTION = "wrong option: "
"""The prefix that marks the message of an OptionError."""


def daemonise(config: MountConfig, setup_logging: Callable[[], None], *keep: int) -> None:
    """Serve from a background process; returns in the caller once the mount replies.

    Of the caller's fds the daemon keeps only ``keep``. Raises MountError with the daemon's reason if it
    fails to start.
    """
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        _wait_until_ready(reader, config.mountpoint)
        return
    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(0)
    _serve(config, setup_logging, writer, keep)


def _wait_until_ready(reader: int, mountpoint: str) -> None:
    """Wait for the daemon's message. Raises MountError if the daemon failed to start."""
    with os.fdopen(reader, "rb") as pipe:
        message = pipe.read().decode(errors="surrogateescape")
    if message == READY:
        return
    with contextlib.suppress(MountError):  # a killed daemon leaves its mount
        reuse_dead_mountpoint(mountpoint)
    if message.startswith(WRONG_OPTION):
        raise OptionError(message.removeprefix(WRONG_OPTION))
    raise MountError(message or "the daemon died before the mount was ready")


def _serve(
    config: MountConfig, setup_logging: Callable[[], None], writer: int, keep: Collection[int]
) -> NoReturn:
    """Serve in the daemon, and report to ``writer`` that the mount replies, or why it does not."""
    status = 1
    try:
        os.chdir("/")
        _leave_fds(writer, *keep)
        setup_logging()

        def ready() -> None:
            nonlocal writer
            os.write(writer, READY.encode())
            os.close(writer)
            writer = -1

        serve(config, ready)
        status = 0
    except (MountError, OSError) as exc:
        _report(writer, str(exc), WRONG_OPTION if isinstance(exc, OptionError) else "")
    except BaseException as exc:
        log.exception("the daemon failed")
        _report(writer, f"internal error: {exc!r}")
    finally:
        logging.shutdown()
        os._exit(status)


def _leave_fds(*keep: int) -> None:
    """Leave no inherited fd open but ``keep``, as another process may wait for the end of a pipe."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    first = 3
    for fd in sorted(keep):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


def _report(writer: int, message: str, prefix: str = "") -> None:
    log.error("%s", message)
    if writer >= 0:
        os.write(writer, (prefix + message).encode(errors="surrogateescape"))
