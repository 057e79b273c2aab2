"""Write to the standard streams, whatever they are."""

import contextlib
import io
import os
import sys

from rich.console import Console

from cleanfs.printable import printable


def prepare_streams() -> None:
    """Ensure that all three standard streams exist and accept any text.

    If we were started without one of these fds, the next opened file would get its number, and messages
    to the user would be written there.
    """
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):  # a write to 1 fails
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest free number: this one
    sys.stdout = sys.stdout or io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
    sys.stderr = sys.stderr or io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def complain(message: str) -> None:
    say("cleanfs: " + printable(" ".join(message.split())))


def say(text: str) -> None:
    """Print to stderr. If that fails, the status must suffice."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def make_console() -> Console:
    """Make a console that folds and cuts nothing on a pipe, which has no width."""
    return Console(width=None if sys.stdout.isatty() else 1000, markup=False, emoji=False)
