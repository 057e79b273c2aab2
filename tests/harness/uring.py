"""Enable FUSE over io_uring while mounts are made that ask for it."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from cleanfs.fuse.transport import PARAMETER

TRANSPORT = os.environ.get("CLEANFS_TEST_TRANSPORT", "device")
"""The transport of the mounts of ``mounting.mounted``, unless a test names one: device or uring."""

with_device = pytest.mark.skipif(TRANSPORT == "uring", reason="this is about the FUSE device")

LOCK = Path(tempfile.gettempdir()) / "cleanfs-enable-uring.lock"


class UnavailableError(Exception):
    """Says why FUSE over io_uring cannot be enabled here."""


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """Have the kernel offer queues to new mounts during the block. Raises UnavailableError.

    A mount that has queues keeps them. Blocks of different processes take turns.
    """
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            before = Path(PARAMETER).read_text()
            Path(PARAMETER).write_text("Y")
        except OSError as exc:
            raise UnavailableError(f"{PARAMETER}: {os.strerror(exc.errno or 0)}") from exc
        try:
            yield
        finally:
            Path(PARAMETER).write_text(before)


@contextlib.contextmanager
def enabled_for(options: tuple[str, ...]) -> Iterator[None]:
    """Do the same if a mount with these options needs it. Skip the test where it is impossible."""
    chosen = [value for name, value in pairwise(options) if name == "--transport"]
    if chosen[-1] != "uring":
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(enabled())
        except UnavailableError as exc:
            pytest.skip(str(exc))
        yield
