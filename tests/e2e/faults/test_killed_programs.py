"""Test programs that are killed while the source hangs: they end, and their calls do no harm."""

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cleanfs.cache.fingerprint import COARSE_NS
from cleanfs.fs.opening import DROP_SECONDS
from cleanfs.fuse.interrupts import DIRECT_CHECK_SECONDS, RELEASE_SECONDS
from cleanfs.fuse.notify import REFRESH_SECONDS
from tests.e2e.faults.site import (
    DATA,
    PAGE,
    check_alive,
    make_directories,
    on,
    opened,
    program,
)
from tests.harness.faulty import Faulty, faulty
from tests.harness.mounting import (
    MountedFs,
    end_of,
    is_mounted,
    wait_until,
)


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
@pytest.mark.parametrize(
    ("number", "after"),
    [
        (signal.SIGKILL, 0),
        (signal.SIGKILL, 2 * RELEASE_SECONDS),
        (signal.SIGTERM, 2 * RELEASE_SECONDS),
    ],
)
def test_a_program_killed_while_the_source_hangs_ends(
    served: Faulty, fs: MountedFs, op: str, code: str, number: int, after: float
) -> None:
    served.fault(op, hang=True)
    with program(code, fs.path) as process:
        served.wait_hanging(1)
        time.sleep(after)
        process.send_signal(number)
        assert end_of(process, 10) == -number
        check_alive(fs)
    served.heal()
    wait_until(lambda: served.hanging() == 0)
    assert (fs.path / "f").read_bytes()[1:] == DATA[1:]
    wait_until(lambda: fs.stats()["open_files"] == 0)


DIRECT = """
import ctypes, mmap, struct
page = mmap.mmap(-1, 4096)
f = os.open(sys.argv[1] + '/f', os.O_RDWR | os.O_DIRECT)
def submit(opcode):
    libc, context = ctypes.CDLL(None, use_errno=True), ctypes.c_ulong()
    at = ctypes.addressof(ctypes.c_char.from_buffer(page))
    block = ctypes.create_string_buffer(
        struct.pack("=QIIHHIQQqQII", 0, 0, 0, opcode, 0, f, at, 4096, 0, 0, 0, 0)
    )
    pointer = ctypes.pointer(block)
    setup, submit = {"x86_64": (206, 209), "aarch64": (0, 2)}[os.uname().machine]
    assert libc.syscall(setup, 1, ctypes.byref(context)) == 0
    assert libc.syscall(submit, context, 1, ctypes.byref(pointer)) == 1
"""


SUBMIT_IN_A_THREAD = f"""
import threading
thread = threading.Thread(target=lambda: (submit(0), time.sleep({3 * DIRECT_CHECK_SECONDS})))
thread.start(); thread.join(); time.sleep(100)
"""


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("read", "os.preadv(f, [page], 0)"),
        ("write", "os.pwrite(f, page, 0)"),
        ("read", "submit(0); time.sleep(100)"),
        ("write", "submit(1); time.sleep(100)"),
        ("read", SUBMIT_IN_A_THREAD),
    ],
    ids=["read", "write", "io_submit read", "io_submit write", "io_submit in a thread that has ended"],
)
def test_a_program_killed_while_direct_io_hangs_ends(
    served: Faulty, fs: MountedFs, op: str, call: str
) -> None:
    """The kernel does not report that it was killed."""
    served.fault(op, hang=True)
    with program(DIRECT + call, fs.path) as process:
        served.wait_hanging(1)
        time.sleep(4 * DIRECT_CHECK_SECONDS)
        assert process.poll() is None
        process.kill()
        assert end_of(process, 10) == -signal.SIGKILL
        check_alive(fs)
    served.heal()
    wait_until(lambda: served.hanging() == 0)
    assert (fs.path / "f").read_bytes()[PAGE:] == DATA[PAGE:]
    wait_until(lambda: fs.stats()["open_files"] == 0)


def test_direct_io_that_lasts_is_not_ended_for_a_program_that_lives(
    served: Faulty, fs: MountedFs
) -> None:
    served.fault("read", hang=True)
    with program(DIRECT + "assert os.preadv(f, [page], 0) == 4096", fs.path) as process:
        served.wait_hanging(1)
        time.sleep(5 * DIRECT_CHECK_SECONDS)
        served.heal()
        assert end_of(process, 10) == 0


def test_a_program_with_an_earlier_signal_ends_when_it_is_killed(served: Faulty, fs: MountedFs) -> None:
    """The kernel reports only the first signal, and that one came before the hang was known."""
    code = (
        "import signal\nsignal.signal(signal.SIGUSR1, lambda *_: None)\n"
        "while True:\n"
        "    try: os.stat(sys.argv[1] + '/f')\n"
        "    except InterruptedError: pass  # another program on this machine was killed"
    )
    served.fault("lookup", hang=True)
    with program(code, fs.path) as process:
        served.wait_hanging(1)
        process.send_signal(signal.SIGUSR1)
        time.sleep(3)
        assert process.poll() is None
        process.kill()
        assert end_of(process, 10) == -signal.SIGKILL
    check_alive(fs)


def test_a_program_with_a_signal_continues_while_another_is_killed(
    served: Faulty, fs: MountedFs
) -> None:
    handled = "import signal\nsignal.signal(signal.SIGUSR1, lambda *_: None)\n"
    for op in ("read", "opendir", "make"):
        served.fault(op, hang=True)
    with program("f = os.open(sys.argv[1] + '/f', os.O_RDONLY); os.read(f, 10)", fs.path) as first:
        served.wait_hanging(1)
        time.sleep(2 * RELEASE_SECONDS)  # from now on, requesters are recorded
        with (
            program(f"{handled}os.listdir(sys.argv[1])", fs.path) as signalled,
            program("os.mkdir(sys.argv[1] + '/new')", fs.path) as killed,
        ):
            served.wait_hanging(3)
            signalled.send_signal(signal.SIGUSR1)
            killed.kill()
            assert end_of(killed, 10) == -signal.SIGKILL
            time.sleep(0.5)
            assert signalled.poll() is None
            assert first.poll() is None
            served.heal()
            assert end_of(signalled, 10) == 0


def test_a_program_among_many_requests_ends_when_it_is_killed(served: Faulty, fs: MountedFs) -> None:
    served.fault("read", hang=True)
    busy = "while True: os.stat(sys.argv[1])"
    reading = "f = os.open(sys.argv[1] + '/f', os.O_RDONLY); os.read(f, 10)"
    with program(busy, fs.path), program(busy, fs.path), program(reading, fs.path) as process:
        served.wait_hanging(1)
        process.kill()
        assert end_of(process, 10) == -signal.SIGKILL
    check_alive(fs)


@contextmanager
def killed_in(fs: MountedFs, code: str, until: Callable[[], object]) -> Iterator[None]:
    """Kill a program in a hanging call. Then open files: they reuse its fds in the daemon if closed."""
    with program(code, fs.path) as process:
        until()
        process.kill()
        assert end_of(process, 10) == -signal.SIGKILL
    time.sleep(0.5)  # the kernel sends RELEASE, and libfuse may still read earlier requests
    fds = [os.open(fs.path / "other", os.O_RDWR) for _ in range(8)]
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)


def test_a_read_by_a_killed_program_does_not_read_another_file(tmp_path: Path) -> None:
    """The read waits for a write. Its pages then go to the cache and to all readers."""
    reading = (  # a single page: read-ahead has no requester
        "import mmap; f = os.open(sys.argv[1] + '/f', os.O_RDONLY)\n"
        "pages = mmap.mmap(f, 4096, prot=mmap.PROT_READ)\npages.madvise(mmap.MADV_RANDOM)\npages[0]"
    )
    options = ("--coherency", "none")
    with faulty(*make_directories(tmp_path)) as source, on(source.path, tmp_path, *options) as fs:
        (fs.path / "other").read_bytes()
        page = mmap.mmap(-1, PAGE)
        page.write(DATA[:PAGE])
        with (
            opened(fs.path / "f", os.O_RDWR | os.O_DIRECT) as fd,
            ThreadPoolExecutor(1) as pool,
            contextlib.ExitStack() as at_last,
        ):
            at_last.callback(source.heal)
            source.fault("write", name="f", hang=True)
            writing = pool.submit(os.pwrite, fd, page, 0)
            source.wait_hanging(1)
            opens = source.served("open")

            def read_waits() -> None:
                wait_until(lambda: source.served("open") > opens)
                time.sleep(0.5)

            with killed_in(fs, reading, read_waits):
                source.heal()
                assert writing.result(10) == PAGE
                time.sleep(0.5)
                assert (fs.path / "f").read_bytes() == DATA


def test_a_truncation_by_a_killed_program_does_not_truncate_another_file(tmp_path: Path) -> None:
    truncating = (
        "f = os.open(sys.argv[1] + '/f', os.O_RDWR)\nos.mkdir(sys.argv[1] + '/opened')\n"
        "while not os.path.exists(sys.argv[1] + '/go'): time.sleep(0.1)\nos.ftruncate(f, 0)"
    )
    with faulty(*make_directories(tmp_path)) as source, on(source.path, tmp_path) as fs:
        (fs.path / "other").read_bytes()

        def hang() -> None:
            wait_until((source.real / "opened").exists)
            source.fault("getattr", name="f", hang=True, count=1)
            (source.real / "go").touch()
            source.wait_hanging(1)

        with killed_in(fs, truncating, hang):
            source.heal()
            wait_until(lambda: 0 in ((source.real / name).stat().st_size for name in ("f", "other")))
        assert (source.real / "other").read_bytes() == b"other" * 5000


CHANGES: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "truncate": ("setattr", "os.truncate(f, 10)", lambda root: (root / "f").stat().st_size),
    "chmod": ("setattr", "os.chmod(f, 0o600)", lambda root: (root / "f").stat().st_mode),
    "write": (
        "write",
        "d = os.open(f, os.O_WRONLY | os.O_APPEND); os.write(d, b'more')",
        lambda root: (root / "f").stat().st_size,
    ),
    "unlink": ("unlink", "os.unlink(f)", lambda root: (root / "f").exists()),
    "unlink, seen in its directory": ("unlink", "os.unlink(f)", lambda root: root.stat().st_mtime_ns),
    "rename over": (
        "rename",
        "os.rename(f, f[:-1] + 'other')",
        lambda root: (root / "other").stat().st_size,
    ),
    "mkdir": ("make", "os.mkdir(f + 'new')", lambda root: (root / "fnew").exists()),
    "rename": ("rename", "os.rename(f, f + 'g')", lambda root: (root / "f").exists()),
}


@pytest.mark.parametrize(("op", "code", "inspect"), CHANGES.values(), ids=CHANGES)
def test_a_change_by_a_killed_program_is_seen_when_it_is_done(
    served: Faulty, long_timeout_fs: MountedFs, op: str, code: str, inspect: Callable[[Path], object]
) -> None:
    """Another program looks before the change is done, and the kernel caches that state."""
    fs = long_timeout_fs
    served.fault(op, hang=True)
    with program(f"f = sys.argv[1] + '/f'\n{code}", fs.path) as process:
        served.wait_hanging(1)
        process.kill()
        assert end_of(process, 10) == -signal.SIGKILL
    before = inspect(fs.path)
    served.heal()
    wait_until(lambda: served.hanging() == 0)
    wait_until(lambda: inspect(served.real) != before)
    wait_until(lambda: inspect(fs.path) == inspect(served.real))


def test_an_append_after_one_by_a_killed_program_follows_it(served: Faulty, fs: MountedFs) -> None:
    """The kernel does not know the first append, and sends the next one to the old end."""
    with opened(fs.path / "f", os.O_WRONLY | os.O_APPEND) as fd:
        served.fault("write", name="f", hang=True)
        code = "d = os.open(sys.argv[1] + '/f', os.O_WRONLY | os.O_APPEND); os.write(d, b'first')"
        with program(code, fs.path) as process:
            served.wait_hanging(1)
            process.kill()
            assert end_of(process, 10) == -signal.SIGKILL
        served.heal()
        wait_until(lambda: (served.real / "f").stat().st_size > len(DATA))
        os.write(fd, b"second")
    assert (served.real / "f").read_bytes()[len(DATA) :] == b"firstsecond"


@pytest.mark.parametrize("long_timeout_fs", ["open"], indirect=True)
def test_a_change_found_by_an_open_of_a_killed_program_is_not_lost(
    served: Faulty, long_timeout_fs: MountedFs
) -> None:
    """Size and mtime do not show the change, so the kernel drops its pages only if notified."""
    fs = long_timeout_fs
    path = served.real / "f"
    assert (fs.path / "f").read_bytes() == DATA
    st = path.stat()
    with opened(path, os.O_RDWR) as fd:
        os.pwrite(fd, b"new", 0)
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))
    time.sleep(COARSE_NS / 1e9 + 0.1)  # a recent change would be checked again
    served.fault("open", name="f", hang=True)
    with program("os.open(sys.argv[1] + '/f', os.O_RDONLY)", fs.path) as process:
        served.wait_hanging(1)
        process.kill()
        assert end_of(process, 10) == -signal.SIGKILL
    served.heal()
    wait_until(lambda: served.hanging() == 0)
    time.sleep(DROP_SECONDS + 2 * REFRESH_SECONDS)
    assert (fs.path / "f").read_bytes()[:5] == b"new" + DATA[3:5]


@pytest.mark.parametrize("group", [False, True], ids=["alone", "with their process group"])
def test_killed_tests_leave_no_mount(tmp_path: Path, group: bool) -> None:
    code = (
        "import pathlib, sys, time\nfrom tests.harness.faulty import faulty\n"
        "from tests.e2e.faults.site import make_directories, on\nbase = pathlib.Path(sys.argv[1])\n"
        "with faulty(*make_directories(base)) as source, on(source.path, base) as fs:\n"
        "    with open(fs.path / 'f'): print(flush=True), time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    root = Path(__file__).parents[3]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=root, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert is_mounted(tmp_path / "served")
        assert is_mounted(tmp_path / "mnt")
        os.killpg(process.pid, signal.SIGTERM) if group else process.kill()
    wait_until(lambda: not is_mounted(tmp_path / "served") and not is_mounted(tmp_path / "mnt"))


@pytest.mark.parametrize(
    ("op", "code"),
    [
        ("open", "fcntl.lockf(f, fcntl.LOCK_EX)"),
        ("read", "os.copy_file_range(f, os.open(top + '/other', os.O_RDWR), 5000, 0, 0)"),
        ("getattr", "ctypes.CDLL(None).statx(f, b'', 0x1000, 0xfff, ctypes.create_string_buffer(256))"),
    ],
)
def test_a_program_killed_in_a_request_of_ours_ends(tmp_path: Path, op: str, code: str) -> None:
    """The source is a server that hangs. Others are not blocked, and all works once it replies."""
    code = (
        "import ctypes, fcntl\ntop = sys.argv[1]\nf = os.open(top + '/f', os.O_RDWR)\n"
        "print(flush=True)\n"
        f"while not os.path.exists(sys.argv[2]): time.sleep(0.01)\n{code}"
    )
    with (
        faulty(*make_directories(tmp_path)) as source,
        on(source.path, tmp_path, "--locks", "source") as fs,
        program(code, fs.path, tmp_path / "go") as process,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        source.fault(op, hang=True)
        (tmp_path / "go").touch()
        source.wait_hanging(1)
        check_alive(fs)
        process.kill()
        assert end_of(process, 10) == -signal.SIGKILL
        check_alive(fs)
        source.heal()
        wait_until(lambda: fs.stats()["open_files"] == 0)
        lock = (
            "import fcntl\nfcntl.lockf(open(sys.argv[1] + '/f', 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        )
        with program(lock, fs.path) as other:
            assert end_of(other, 10) == 0, "the lock of the killed program is gone"
        assert (fs.path / "f").read_bytes() == (source.real / "f").read_bytes()
