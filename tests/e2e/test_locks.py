"""Test where the locks of programs are held: in the kernel, or in the source (``--locks source``)."""

import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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


HOLDER = """
import errno, fcntl, struct, sys
f = open(sys.argv[1], "r+b")
def lock(command, start):
    fcntl.fcntl(f, command, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, start, 1, 0))
lock(fcntl.F_SETLK, int(sys.argv[2]))
print("holds", flush=True)
sys.stdin.readline()
try:
    lock(fcntl.F_SETLKW, int(sys.argv[3]))
    print("has it", flush=True)
except OSError as exc:
    print("deadlock" if exc.errno == errno.EDEADLK else exc, flush=True)
"""


@contextmanager
def holder(path: Path, held: int, wanted: int) -> Iterator["subprocess.Popen[str]"]:
    """Run a program that holds the lock of a byte. Upon a line it waits for another one, and ends."""
    words = [sys.executable, "-c", HOLDER, str(path), str(held), str(wanted)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert line_of(process) == "holds\n"
            yield process
        finally:
            process.kill()


def line_of(process: "subprocess.Popen[str]") -> str:
    """Return the next line that a program prints."""
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], 60)
    assert readable
    return process.stdout.readline()


def start_waiting(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.parametrize("number", [2, 3])
def test_a_wait_that_would_never_end_fails(fs: MountedFs, number: int) -> None:
    """Each program but one waits for the next one's lock; then the last waits for the first one's."""
    path = fs.path / "f"
    with ExitStack() as stack:
        programs = [stack.enter_context(holder(path, at, (at + 1) % number)) for at in range(number)]
        for process in programs[:-1]:
            start_waiting(process)
            time.sleep(0.3)
        start_waiting(programs[-1])
        assert line_of(programs[-1]) == "deadlock\n"
        for process in programs[:-1]:
            assert line_of(process) == "has it\n"


def test_waits_for_one_that_waits_for_nothing_go_on(fs: MountedFs) -> None:
    path = fs.path / "f"
    with holder(path, 0, 5) as first, holder(path, 1, 0) as second, holder(path, 2, 0) as third:
        for process in second, third:
            start_waiting(process)
        time.sleep(0.3)
        start_waiting(first)
        for process in first, second, third:
            assert line_of(process) == "has it\n"


@pytest.mark.parametrize("side", ["path", "source"])
def test_the_process_that_holds_a_lock_is_told(fs: MountedFs, side: str) -> None:
    with opened(fs.path / "f") as fd, holder(getattr(fs, side) / "f", 7, 0) as process:
        for start, pid in (7, process.pid), (6, 0):
            data = struct.pack("hhqqi4x", WRITE, os.SEEK_SET, start, 1, 0)
            found = struct.unpack("hhqqi4x", fcntl.fcntl(fd, GET, data))
            assert (found[0], found[4]) == (WRITE if pid else UNLOCK, pid)
        lock(fd, SET, READ, 8, 1)
        assert lock(fd, GET, READ, 8, 1) == UNLOCK
