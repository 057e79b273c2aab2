"""A source that is full: who removes a file can use its space at once, as without the mount.

The daemon holds what it was asked for until the kernel forgets it, and a descriptor of a program's
(O_PATH, so that nothing is told of its close) makes that as late as a test wants.
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
PATIENT = "from cleanfs.source import space_retry as room; room.LATELY_SECONDS = 15"
"""However busy this machine is."""

SIZE = 1 << 20
INODES = 8


@pytest.fixture(params=[(), ("--coherency", "none", "--writeback")], ids=["through", "back"])
def small(
    request: pytest.FixtureRequest, source: Path, mount: Mounter
) -> Iterator[Callable[[str], MountedFs]]:
    """Mounts a small source."""
    options = f"size={SIZE},nr_inodes={INODES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", source], check=True, timeout=10)
    try:
        yield lambda patch: mount(*request.param, patch=patch)
    finally:
        subprocess.run(["umount", "-l", source], check=True, timeout=10)


@pytest.fixture
def fs(small: Callable[[str], MountedFs]) -> MountedFs:
    return small(PATIENT)


@contextmanager
def let_go_late(path: Path) -> Iterator[None]:
    """Around a removal: hold what is removed for a moment longer."""
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


def test_a_write_has_the_space_of_a_file_that_was_removed(fs: MountedFs) -> None:
    big = fill(fs)
    with let_go_late(big):
        big.unlink()
    (fs.path / "new").write_bytes(b"fits")
    assert (fs.source / "new").read_bytes() == b"fits"


def test_a_write_has_the_space_of_a_file_that_was_replaced(fs: MountedFs) -> None:
    (fs.path / "other").touch()
    big = fill(fs)
    with let_go_late(big):
        (fs.path / "other").rename(big)
    big.write_bytes(b"fits")
    assert (fs.source / "big").read_bytes() == b"fits"


def test_a_write_has_the_space_of_a_removed_file_that_is_closed(fs: MountedFs) -> None:
    """Long after it was removed."""
    big = fill(fs)
    with open(big, "rb"), let_go_late(big):
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
def test_what_is_made_has_the_inode_of_what_was_removed(
    fs: MountedFs, make: Callable[[Path], object], remove: Callable[[Path], None]
) -> None:
    first = fs.path / "0"
    make_first = Path.mkdir if remove is Path.rmdir else Path.touch
    for i in range(INODES - 1):  # and the root
        make_first(fs.path / str(i))
    with pytest.raises(OSError, match="No space"):
        make_first(fs.path / "more")
    with let_go_late(first):
        remove(first)
    make(fs.path / "new")
    assert os.path.lexists(fs.source / "new")


def test_a_file_that_stays_open_is_not_waited_for_long(small: Callable[[str], MountedFs]) -> None:
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
