"""Test a full source: the space of a removed file can be used at once, as without the mount.

The daemon holds an inode until the kernel forgets it. A program's fd delays this as long as a test
wants. It is opened with O_PATH, so the kernel sends no request at its close.
"""

import errno
import io
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter
from tests.harness.machine import Deadline
from tests.harness.mounting import MountedFs

LATE = 0.2
LONG_RETRY = "from cleanfs.source import space_retry as retry; retry.LATELY_SECONDS = 15"
"""Gives the retry enough time on a busy machine."""

SIZE = 1 << 20
INODES = 8


@pytest.fixture(params=[(), ("--coherency", "none", "--writeback")], ids=["through", "back"])
def small(
    request: pytest.FixtureRequest, source: Path, mount: Mounter
) -> Iterator[Callable[[str], MountedFs]]:
    """Return a function that mounts a small source."""
    options = f"size={SIZE},nr_inodes={INODES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", source], check=True, timeout=10)
    try:
        yield lambda patch: mount(*request.param, patch=patch)
    finally:
        subprocess.run(["umount", "-l", source], check=True, timeout=10)


@pytest.fixture
def fs(small: Callable[[str], MountedFs]) -> MountedFs:
    return small(LONG_RETRY)


@contextmanager
def released_late(path: Path) -> Iterator[None]:
    """Hold a file for a moment after the block, which removes it."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    timer = threading.Timer(LATE, os.close, [fd])
    try:
        yield
    except BaseException:
        os.close(fd)
        raise
    timer.start()


def fill(fs: MountedFs) -> Path:
    path = fs.path / "big"
    with open(path, "wb", buffering=0) as file:
        while file.tell() < SIZE // 4 * 3:
            file.write(bytes(SIZE // 4))
        with pytest.raises(OSError, match="No space"):
            write_through(file, bytes(SIZE))
    return path


def write_through(file: io.FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]
    os.fsync(file.fileno())


def test_a_write_can_use_the_space_of_a_removed_file(fs: MountedFs) -> None:
    big = fill(fs)
    with released_late(big):
        big.unlink()
    (fs.path / "new").write_bytes(b"fits")
    assert (fs.source / "new").read_bytes() == b"fits"


def test_a_write_can_use_the_space_of_a_replaced_file(fs: MountedFs) -> None:
    (fs.path / "other").touch()
    big = fill(fs)
    with released_late(big):
        (fs.path / "other").rename(big)
    big.write_bytes(b"fits")
    assert (fs.source / "big").read_bytes() == b"fits"


def test_a_write_can_use_the_space_of_a_removed_file_after_its_close(fs: MountedFs) -> None:
    """The close comes long after the removal."""
    big = fill(fs)
    with open(big, "rb"), released_late(big):
        big.unlink()
        time.sleep(1.2)
    (fs.path / "new").write_bytes(b"fits")
    assert (fs.source / "new").read_bytes() == b"fits"


MAKERS: dict[str, Callable[[Path], object]] = {
    "mkdir": Path.mkdir,
    "create": Path.touch,
    "mknod": os.mkfifo,
    "symlink": lambda path: path.symlink_to("x" * 200),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("remove", [Path.rmdir, Path.unlink], ids=["rmdir", "unlink"])
def test_a_creation_can_use_the_inode_of_a_removed_file(
    fs: MountedFs, make: Callable[[Path], object], remove: Callable[[Path], None]
) -> None:
    first = fs.path / "0"
    make_first = Path.mkdir if remove is Path.rmdir else Path.touch
    for i in range(INODES - 1):  # the root has one
        make_first(fs.path / str(i))
    with pytest.raises(OSError, match="No space"):
        make_first(fs.path / "more")
    with released_late(first):
        remove(first)
    make(fs.path / "new")
    assert os.path.lexists(fs.source / "new")


def test_the_wait_for_a_file_that_stays_open_is_short(small: Callable[[str], MountedFs]) -> None:
    fs = small("")
    big = fill(fs)
    with open(big, "rb"):
        big.unlink()
        for most in (5, 2):
            deadline = Deadline(most)
            with pytest.raises(OSError, match="No space") as raised:
                (fs.path / "new").write_bytes(b"does not fit")
            assert raised.value.errno == errno.ENOSPC
            assert not deadline.over()
