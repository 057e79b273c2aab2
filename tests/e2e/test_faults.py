"""A source that fails, is slow, or hangs: who sees which error, and who sees nothing of it."""

import contextlib
import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL_CACHES
from tests.e2e.faulty import Faulty, faulty
from tests.e2e.mounting import MountedFs, cleanfs, is_mounted, mounted, settle, wait_until

PAGE = 4096
DATA = bytes(range(256)) * 4096
"""1 MiB, in which no two pages of 64 KiB are told apart, but their offsets within 256 bytes are."""

MANY = 150
"""More requests than the main loop of pyfuse3 has tasks by default (99), and than we have threads."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Faulty]:
    """A source that fails on command, with a file ``f`` and a file ``other``."""
    real, path = tmp_path / "real", tmp_path / "served"
    real.mkdir()
    path.mkdir()
    (real / "f").write_bytes(DATA)
    (real / "other").write_bytes(b"other" * 5000)
    with faulty(real, path) as source:
        yield source


@contextmanager
def on(source: Path, base: Path, *options: str) -> Iterator[MountedFs]:
    """A mount of it with small caches; the kernel believes nothing, and reads no more than asked."""
    mountpoint = base / "mnt"
    mountpoint.mkdir()
    words = (*SMALL_CACHES, "--attr-timeout", "0", "--read-ahead", "0", *options)
    with mounted(source, mountpoint, *words) as fs:
        yield fs


@pytest.fixture
def fs(served: Faulty, tmp_path: Path) -> Iterator[MountedFs]:
    """A mount of ``served``."""
    with on(served.path, tmp_path) as fs:
        yield fs


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


@contextmanager
def fails(number: int) -> Iterator[None]:
    """The block fails with this error."""
    with pytest.raises(OSError) as raised:  # noqa: PT011  # the number is what matters
        yield
    assert raised.value.errno == number


@contextmanager
def hung(source: Faulty, *calls: Callable[[], object]) -> Iterator[None]:
    """Calls that hang in the source, in threads, until the block ends; then all must return."""
    before = source.hanging()

    def call_it(call: Callable[[], object]) -> None:
        with contextlib.suppress(OSError):
            call()

    threads = [threading.Thread(target=call_it, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    try:
        source.wait_hanging(before + 1)
        yield
        assert all(thread.is_alive() for thread in threads)
    finally:
        source.heal()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def within(seconds: float, call: Callable[[], object]) -> None:
    """A call that must not wait for the source."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits"


# -- hanging --------------------------------------------------------------------------------------


def check_alive(fs: MountedFs) -> None:
    """Control files and statistics answer."""

    def use() -> None:
        assert fs.stats()["pid"] == fs.process.pid
        assert int(fs.control("puts").read_text()) >= 0
        fs.control("drop").write_text("3\n")
        fs.control("page_cache").write_text("2M\n")
        assert os.stat(fs.path / ".cleancache").st_mode

    within(10, use)


@pytest.mark.parametrize("op", ["lookup", "getattr", "opendir", "make", "statfs", "rename", "fsync"])
def test_control_files_answer_while_an_operation_hangs(served: Faulty, fs: MountedFs, op: str) -> None:
    fs.stats()
    calls: dict[str, Callable[[], object]] = {
        "lookup": lambda: os.stat(fs.path / "f"),
        "getattr": lambda: os.stat(fs.path / "f"),
        "opendir": lambda: os.listdir(fs.path),
        "make": lambda: os.mkdir(fs.path / "new"),
        "statfs": lambda: os.statvfs(fs.path),
        "rename": lambda: os.rename(fs.path / "f", fs.path / "g"),
    }
    with opened(fs.path / "other") as fd:
        calls["fsync"] = lambda: os.fsync(fd)
        served.fault(op, hang=True)
        with hung(served, calls[op]):
            check_alive(fs)


@pytest.mark.parametrize("op", ["getattr", "lookup"])
def test_names_that_the_source_has_cached_do_not_block_everybody(tmp_path: Path, op: str) -> None:
    """Its kernel knows the name still, and the attributes no more."""
    real, path = tmp_path / "real", tmp_path / "served"
    real.mkdir()
    path.mkdir()
    (real / "f").write_bytes(DATA)
    with faulty(real, path, entry_timeout=100) as source, on(path, tmp_path) as fs:
        os.stat(fs.path / "f")
        source.fault(op, hang=True)
        if op == "getattr":
            with hung(source, lambda: os.stat(fs.path / "f")):
                check_alive(fs)
        else:
            os.stat(fs.path / "f")


def test_a_file_system_below_the_source_that_hangs_does_not_block_everybody(tmp_path: Path) -> None:
    real, source = tmp_path / "real", tmp_path / "source"
    for path in (real, source, source / "sub"):
        path.mkdir()
    (source / "f").write_bytes(DATA)
    with faulty(real, source / "sub") as sub, on(source, tmp_path) as fs:
        sub.fault("opendir", hang=True)
        with hung(sub, lambda: os.stat(fs.path / "sub")):
            check_alive(fs)
            assert (fs.path / "f").read_bytes() == DATA
        os.listdir(fs.path / "sub")


def test_another_file_is_served_while_very_many_requests_of_one_hang(
    served: Faulty, fs: MountedFs
) -> None:
    fs.stats()
    with opened(fs.path / "f", os.O_RDWR) as fd, opened(fs.path / "other", os.O_RDWR) as other:
        served.fault("read", name="f", hang=True)
        served.fault("write", name="f", hang=True)
        calls: list[Callable[[], object]] = [
            lambda at=number * PAGE: os.pread(fd, 10, at)  # type: ignore[misc]
            for number in range(MANY)
        ]
        calls.append(lambda: os.pwrite(fd, b"x", 0))
        with hung(served, *calls):
            served.wait_hanging(64)
            check_alive(fs)

            def use() -> None:
                os.posix_fadvise(other, 0, 0, os.POSIX_FADV_DONTNEED)
                assert os.pread(other, 5, 8000) == b"other"
                os.pwrite(other, b"OTHER", 0)
                assert (fs.path / "other").read_bytes()[:10] == b"OTHERother"
                (fs.path / "new").write_bytes(b"new")

            within(20, use)
        assert os.pread(fd, PAGE, 5 * PAGE) == DATA[5 * PAGE : 6 * PAGE]


@contextmanager
def program(code: str, *args: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program, which says that it is about to do what may hang."""
    script = f"import os, sys, time\nprint(flush=True)\n{code}"
    words = [sys.executable, "-I", "-S", "-c", script, *map(str, args)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("op", "code"),
    [
        ("read", "f = os.open(sys.argv[1] + '/f', os.O_RDONLY); os.read(f, 10)"),
        ("write", "f = os.open(sys.argv[1] + '/f', os.O_RDWR); os.write(f, b'x')"),
        ("fsync", "f = os.open(sys.argv[1] + '/f', os.O_RDWR); os.fsync(f)"),
        ("open", "os.open(sys.argv[1] + '/f', os.O_RDONLY)"),
        ("lookup", "os.stat(sys.argv[1] + '/f')"),
        ("opendir", "os.listdir(sys.argv[1])"),
        ("readdir", "os.listdir(sys.argv[1])"),
        ("make", "os.mkdir(sys.argv[1] + '/new')"),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_program_that_is_killed_while_the_source_hangs_ends(
    served: Faulty, fs: MountedFs, op: str, code: str, number: int
) -> None:
    fs.stats()
    served.fault(op, hang=True)
    with program(code, fs.path) as process:
        served.wait_hanging(1)
        time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(10) == -number
        check_alive(fs)
    served.heal()
    wait_until(lambda: served.hanging() == 0)
    assert (fs.path / "f").read_bytes()[1:] == DATA[1:]
    wait_until(lambda: fs.stats()["open_files"] == 1)  # the one of the statistics
