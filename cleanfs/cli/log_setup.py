"""Send the log to a file, to syslog or to stderr."""

import logging
import os
from typing import TextIO

from cleanfs.mount.config import MountError
from cleanfs.printable import printable

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def open_log(path: str) -> TextIO:
    """Open a log for appending. A fifo is non-blocking: we wait for neither its reader nor its space.

    Raises MountError.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)  # it contains names from the source
    except OSError as exc:
        directory = os.path.dirname(path) or "."
        missing = isinstance(exc, FileNotFoundError) and not os.path.isdir(directory)
        why = f"there is no directory {directory}" if missing else exc.strerror
        raise MountError(f"cannot write the log file {path}: {why}") from exc
    return os.fdopen(fd, "a", encoding="utf-8", errors="backslashreplace")


class LineFormatter(logging.Formatter):
    """Formats a message as one line, so that no name in it can forge another message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """Return the line; a traceback may follow it."""
        return printable(super().formatMessage(record))


def log_to(log_file: TextIO | None, level: str, *, daemon: bool) -> None:
    logging.raiseExceptions = False  # a full log must not put a traceback elsewhere
    handler: logging.Handler
    if log_file is not None:
        handler = logging.StreamHandler(log_file)
    elif not daemon:
        handler = logging.StreamHandler()
    elif os.path.exists("/dev/log"):
        from logging.handlers import SysLogHandler

        handler = SysLogHandler("/dev/log")
        handler.ident = "cleanfs: "
    else:
        handler = logging.NullHandler()
    handler.setFormatter(LineFormatter(LOG_FORMAT))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # At lower levels pyfuse3 logs its own internals.
    logging.getLogger("pyfuse3").setLevel(logging.WARNING)
