"""Test where the locks of programs are held: in the kernel, or in the source (``--locks source``)."""

import fcntl
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter
from tests.harness.mounting import MountedFs, wait_until

READ, WRITE, UNLOCK = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
GET, SET, WAIT = fcntl.F_GETLK, fcntl.F_SETLK, fcntl.F_SETLKW
OFD_SET = 37


@pytest.fixture
def fs(share: Mounter) -> MountedFs:
    fs = share("--locks", "source")
    (fs.source / "f").write_bytes(b"some data")
    return fs


def lock(fd: int, command: int, kind: int, start: int = 0, length: int = 0) -> int:
    """Lock, and return the type of lock that the call returns."""
    data = struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)
    return int(struct.unpack_from("h", fcntl.fcntl(fd, command, data))[0])


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def is_locked(path: Path, start: int = 0, length: int = 0) -> bool:
    """Tell whether another process could not write-lock a range."""
    script = (
        "import fcntl, sys\n"
        f"f = open(sys.argv[1], 'r+b')\n"
        f"try: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, {length}, {start})\n"
        "except BlockingIOError: print('locked')"
    )
    words = [sys.executable, "-c", script, str(path)]
    return subprocess.run(words, stdout=subprocess.PIPE, check=True, timeout=30).stdout != b""


@contextmanager
def waiter(path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a program that waits for a write lock, and ends once it has it."""
    script = (
        "import fcntl, signal, sys\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))\n"
        "f = open(sys.argv[1], 'r+b')\nprint(flush=True)\nfcntl.lockf(f, fcntl.LOCK_EX)"
    )
    words = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.2)
            assert process.poll() is None
            yield process
        finally:
            process.kill()


def test_local_locks_are_not_seen_in_the_source(share: Mounter) -> None:
    fs = share()
    (fs.source / "f").write_bytes(b"some data")
    with opened(fs.path / "f") as fd:
        lock(fd, SET, WRITE)
        assert is_locked(fs.path / "f")
        assert not is_locked(fs.source / "f")


def test_record_locks_are_seen_on_both_sides(fs: MountedFs) -> None:
    with opened(fs.path / "f") as fd, opened(fs.source / "f") as outside:
        lock(fd, SET, WRITE, 10, 10)
        for path in (fs.path / "f", fs.source / "f"):
            assert is_locked(path)
            assert not is_locked(path, 0, 10)
            assert not is_locked(path, 20, 0)
        lock(fd, SET, UNLOCK, 10, 10)
        assert not is_locked(fs.source / "f")
        lock(outside, SET, WRITE, 5, 1)
        assert is_locked(fs.path / "f")
        assert lock(fd, GET, READ) == WRITE
        with pytest.raises(BlockingIOError):
            lock(fd, SET, READ)


def test_a_processs_locks_go_with_any_close_or_its_end(fs: MountedFs) -> None:
    with opened(fs.path / "f") as fd:
        lock(fd, SET, WRITE)
        assert is_locked(fs.source / "f")
        with opened(fs.path / "f", os.O_RDONLY):
            pass
        wait_until(lambda: not is_locked(fs.source / "f"))
    pid = os.fork()
    if not pid:
        try:
            lock(os.open(fs.path / "f", os.O_RDWR), SET, WRITE)
            time.sleep(30)
        finally:
            os._exit(0)
    wait_until(lambda: is_locked(fs.source / "f"))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_until(lambda: not is_locked(fs.source / "f"))


@pytest.mark.parametrize("side", ["path", "source"])
def test_a_wait_ends_with_the_lock(fs: MountedFs, side: str) -> None:
    with opened(getattr(fs, side) / "f") as fd:
        lock(fd, SET, WRITE)
        with waiter(fs.path / "f") as process:
            lock(fd, SET, UNLOCK)
            assert process.wait(20) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 7), (signal.SIGKILL, -9)])
def test_a_signal_ends_a_wait_and_leaves_no_lock(
    fs: MountedFs, number: signal.Signals, status: int
) -> None:
    with opened(fs.path / "f") as fd:
        lock(fd, SET, WRITE)
        with waiter(fs.path / "f") as process:
            process.send_signal(number)
            assert process.wait(20) == status
        lock(fd, SET, UNLOCK)
        wait_until(lambda: not is_locked(fs.source / "f"))


def _by_flock(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _by_ofd(fd: int) -> None:
    lock(fd, OFD_SET, WRITE)


@pytest.mark.parametrize("take", [_by_flock, _by_ofd])
def test_locks_of_open_files_go_with_the_last_close(fs: MountedFs, take: Callable[[int], None]) -> None:
    with opened(fs.source / "f") as outside, opened(fs.path / "f") as other:
        fd = os.open(fs.path / "f", os.O_RDWR)
        again = os.dup(fd)
        take(fd)
        os.close(fd)
        for conflicting in (outside, other):
            with pytest.raises(BlockingIOError):
                take(conflicting)
        os.close(again)

        def is_free() -> bool:
            try:
                take(outside)
            except BlockingIOError:
                return False
            return True

        wait_until(is_free)
        with pytest.raises(BlockingIOError):
            take(other)
