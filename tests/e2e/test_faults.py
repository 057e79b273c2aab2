"""Test sources that fail, are slow or hang: which calls get which error, and which are unaffected."""

import contextlib
import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cleanfs.cache.fingerprint import COARSE_NS
from cleanfs.fs.opening import DROP_SECONDS
from cleanfs.fuse.interrupts import RELEASE_SECONDS
from cleanfs.fuse.notify import REFRESH_SECONDS
from cleanfs.source.inline_policy import RECENT_SECONDS
from tests.e2e.conftest import SMALL_CACHES
from tests.harness.faulty import Faulty, faulty
from tests.harness.mounting import (
    MountedFs,
    as_user,
    cleanfs,
    end_of,
    is_mounted,
    mounted,
    settle,
    wait_until,
)

PAGE = 4096
DATA = bytes(range(256)) * 4096
"""1 MiB. All pages are equal; bytes differ within 256 bytes."""

MANY = 150
"""More requests than the default tasks of pyfuse3 (99) and than the threads of cleanfs."""


@contextmanager
def on(source: Path, base: Path, *options: str) -> Iterator[MountedFs]:
    """Mount a source with small caches, without attribute timeout and read-ahead."""
    mountpoint = base / "mnt"
    mountpoint.mkdir()
    words = (*SMALL_CACHES, "--attr-timeout", "0", "--read-ahead", "0", *options)
    with mounted(source, mountpoint, *words) as fs:
        yield fs


def make_directories(base: Path) -> tuple[Path, Path]:
    """Make a real directory with the files ``f`` and ``other``, and one to serve it on."""
    real, path = base / "real", base / "served"
    real.mkdir()
    path.mkdir()
    fill(real)
    return real, path


def fill(real: Path) -> None:
    for name in os.listdir(real):
        (real / name).rmdir() if (real / name).is_dir() else (real / name).unlink()
    (real / "f").write_bytes(DATA)
    (real / "other").write_bytes(b"other" * 5000)
    settle()


@dataclass(frozen=True)
class Site:
    """Holds a source that fails on command, and its mount."""

    source: Faulty
    fs: MountedFs


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Provide one site for all tests that do not end it."""
    base = tmp_path_factory.mktemp("faults")
    with faulty(*make_directories(base)) as source, on(source.path, base) as fs:
        fs.stats()
        yield Site(source, fs)


@pytest.fixture
def served(site: Site) -> Iterator[Faulty]:
    """Return the source of the site, without faults and with new files."""
    fill(site.source.real)
    wait_until(lambda: site.fs.stats()["open_files"] == 0)
    try:
        yield site.source
    finally:
        site.source.heal()


@pytest.fixture
def fs(site: Site) -> MountedFs:
    """Return the mount of the site."""
    return site.fs


@pytest.fixture(params=["none"])
def long_timeout_fs(
    served: Faulty, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[MountedFs]:
    """Mount the source once more, with long attribute and entry timeouts."""
    mountpoint = tmp_path / "long-timeout"
    mountpoint.mkdir()
    options = ("--coherency", request.param, "--attr-timeout", "1000")
    with mounted(served.path, mountpoint, *SMALL_CACHES, *options) as fs:
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
    """Check that the block raises this error."""
    with pytest.raises(OSError) as raised:  # noqa: PT011  # only the errno matters
        yield
    assert raised.value.errno == number


@contextmanager
def hung(source: Faulty, *calls: Callable[[], object]) -> Iterator[None]:
    """Let calls hang in the source, in threads, until the block ends. Then all must return."""
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
    """Make a call that must not wait for the source."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "the call waits"


# -- hanging --------------------------------------------------------------------------------------


def check_alive(fs: MountedFs) -> None:
    """Check that control files and statistics work."""

    def use() -> None:
        assert fs.stats()["pid"] == fs.process.pid
        assert int(fs.control("puts").read_text()) >= 0
        fs.control("drop").write_text("3\n")
        fs.control("page_cache").write_text("2M\n")
        assert os.stat(fs.path / ".cleancache").st_mode

    within(10, use)


@pytest.mark.parametrize("op", ["lookup", "getattr", "opendir", "make", "rename", "fsync"])
def test_control_files_work_while_an_operation_hangs(served: Faulty, fs: MountedFs, op: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "lookup": lambda: os.stat(fs.path / "f"),
        "getattr": lambda: os.stat(fs.path / "f"),
        "opendir": lambda: os.listdir(fs.path),
        "make": lambda: os.mkdir(fs.path / "new"),
        "rename": lambda: os.rename(fs.path / "f", fs.path / "g"),
    }
    with opened(fs.path / "other") as fd:
        calls["fsync"] = lambda: os.fsync(fd)
        served.fault(op, hang=True)
        with hung(served, calls[op]):
            check_alive(fs)


def test_a_hanging_close_after_a_refused_open_blocks_no_other_request(tmp_path: Path) -> None:
    """The permissions in the source are stricter than those that the kernel checked."""
    tmp_path.chmod(0o755)
    options = ("--allow-other", "--attr-timeout", "1000")
    with faulty(*make_directories(tmp_path)) as source, on(source.path, tmp_path, *options) as fs:
        (fs.path / "f").stat()
        (source.real / "f").chmod(0o600)
        source.fault("flush", name="f", hang=True)
        with hung(source, lambda: as_user(fs.path, "os.open('f', os.O_RDONLY)")):
            check_alive(fs)


@pytest.mark.parametrize("op", ["getattr", "lookup"])
def test_a_hanging_getattr_of_a_cached_name_blocks_no_other_request(tmp_path: Path, op: str) -> None:
    """In the source's kernel, the name is still valid, but the attributes have expired."""
    directories = make_directories(tmp_path)
    with faulty(*directories, entry_timeout=100) as source, on(source.path, tmp_path) as fs:
        os.stat(fs.path / "f")
        source.fault(op, hang=True)
        if op == "getattr":
            with hung(source, lambda: os.stat(fs.path / "f")):
                check_alive(fs)
        else:
            os.stat(fs.path / "f")


def test_a_hanging_file_system_below_the_source_blocks_no_other_request(tmp_path: Path) -> None:
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


def test_a_chmod_of_a_hanging_mount_point_blocks_no_other_request(
    tmp_path: Path,
) -> None:
    """The call that compares the name with the source runs in a thread of its own."""
    real, source = tmp_path / "real", tmp_path / "source"
    for path in (real, source, source / "sub"):
        path.mkdir()
    options = ("--attr-timeout", "1000")
    with faulty(real, source / "sub") as sub, on(source, tmp_path, *options) as fs:
        os.listdir(fs.path / "sub")
        os.stat(fs.path / "sub")
        sub.fault("getattr", hang=True)
        with hung(sub, lambda: os.chmod(fs.path / "sub", 0o700)):
            check_alive(fs)


def test_another_file_is_served_while_many_requests_of_one_hang(served: Faulty, fs: MountedFs) -> None:
    with opened(fs.path / "f", os.O_RDWR) as fd, opened(fs.path / "other", os.O_RDWR) as other:
        served.fault("read", name="f", hang=True)
        served.fault("write", name="f", hang=True)
        calls: list[Callable[[], object]] = [
            lambda at=number * PAGE: os.pread(fd, 10, at)  # type: ignore[misc]  # mypy does not infer it
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
    """Run a Python program that prints a line before the calls that may hang."""
    script = f"import os, sys, time\nprint(flush=True)\n{code}"
    words = [sys.executable, "-I", "-S", "-c", script, *map(str, args)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    with process.stdout:
        try:
            process.stdout.readline()
            yield process
        finally:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it ends with its mount
                end_of(process, 10)


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
        time.sleep(2 * RELEASE_SECONDS)
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


def test_killed_tests_leave_no_mount(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\nfrom tests.harness.faulty import faulty\n"
        "from tests.e2e.test_faults import make_directories, on\nbase = pathlib.Path(sys.argv[1])\n"
        "with faulty(*make_directories(base)) as source, on(source.path, base) as fs:\n"
        "    with open(fs.path / 'f'): print(flush=True), time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    root = Path(__file__).parent.parent.parent
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=root) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert is_mounted(tmp_path / "served")
        assert is_mounted(tmp_path / "mnt")
        process.kill()
    wait_until(lambda: not is_mounted(tmp_path / "served") and not is_mounted(tmp_path / "mnt"))


# -- errors ---------------------------------------------------------------------------------------


def test_an_error_in_the_middle_of_a_file_is_seen_only_there(served: Faulty, fs: MountedFs) -> None:
    served.fault("read", errno.EIO, "f", start=100_000, stop=100_001)
    bad = 100_000 // PAGE * PAGE
    with opened(fs.path / "f") as fd:
        assert os.pread(fd, bad, 0) == DATA[:bad]
        with fails(errno.EIO):
            os.pread(fd, 10, bad)
        assert os.pread(fd, bad + 1, 0) == DATA[:bad], "the readable part is returned"
        assert os.pread(fd, 1 << 20, bad + PAGE) == DATA[bad + PAGE :]
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapping:
            assert mapping[bad - 1] == DATA[bad - 1]
            served.heal()
            assert mapping[bad : bad + 10] == DATA[bad : bad + 10]
        assert os.pread(fd, 1 << 20, 0) == DATA


def test_access_to_an_unreadable_page_of_a_mapping_raises_sigbus(served: Faulty, fs: MountedFs) -> None:
    served.fault("read", errno.EIO, "f", start=100_000, stop=100_001)
    code = "import mmap; f = open(sys.argv[1] + '/f', 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1)\n"
    with program(code + "assert m[0] == 0 and m[200_000] == 200_000 % 256; m[100_000]", fs.path) as p:
        assert end_of(p, 10) == -signal.SIGBUS
    with program(code + "assert m[0] == 0 and m[200_000] == 200_000 % 256", fs.path) as p:
        assert end_of(p, 10) == 0


def test_an_error_of_read_ahead_is_not_seen(tmp_path: Path) -> None:
    source = make_directories(tmp_path)
    with faulty(*source) as served, on(served.path, tmp_path, "--read-ahead", "1M") as fs:
        served.fault("read", errno.EIO, "f", start=100_000, stop=100_001)
        with opened(fs.path / "f") as fd:
            for at in range(0, 90_000, 10_000):
                assert os.read(fd, 10_000) == DATA[at : at + 10_000]
            assert len(os.read(fd, 10_000)) == 100_000 // PAGE * PAGE - 90_000
            with fails(errno.EIO):
                os.read(fd, 10_000)
        served.heal()
        assert (fs.path / "f").read_bytes() == DATA


def test_an_error_beside_the_requested_bytes_is_not_seen(tmp_path: Path) -> None:
    """Pages of cleanfs are larger than the reads of the program."""
    source = make_directories(tmp_path)
    with faulty(*source) as served, on(served.path, tmp_path, "--page-size", "64K") as fs:
        served.fault("read", errno.EIO, "f", start=100_000, stop=100_001)
        with opened(fs.path / "f") as fd:
            assert os.pread(fd, PAGE, 65536) == DATA[:PAGE]
            assert os.pread(fd, PAGE, 31 * PAGE) == DATA[:PAGE]
            with fails(errno.EIO):
                os.pread(fd, PAGE, 24 * PAGE)
        served.heal()
        assert (fs.path / "f").read_bytes() == DATA


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_after_a_failed_write_the_mount_matches_the_source(
    served: Faulty, fs: MountedFs, number: int
) -> None:
    """Half of the write is done, and its pages were cached before."""
    assert (fs.path / "f").read_bytes() == DATA
    with opened(fs.path / "f", os.O_RDWR) as fd, mmap.mmap(fd, 0) as mapping:
        assert mapping[: 1 << 16] == DATA[: 1 << 16]
        served.fault("write", number, "f", start=20_000)
        with fails(number):
            os.pwrite(fd, b"x" * 40_000, 0)
        with fails(number):
            os.pwrite(fd, b"y" * 10, 30_000)
        os.pwrite(fd, b"z" * 10, 5_000)
        expected = bytearray(DATA)
        expected[:20_000] = b"x" * 20_000
        expected[5_000:5_010] = b"z" * 10
        assert (served.real / "f").read_bytes() == expected
        assert os.pread(fd, len(DATA), 0) == expected
        wait_until(lambda: mapping[:] == expected)
        assert (fs.path / "f").read_bytes() == expected


def test_an_append_that_is_cut_off_returns_the_bytes_written(served: Faulty, fs: MountedFs) -> None:
    served.fault("write", errno.ENOSPC, "other", start=30_000)
    with opened(fs.path / "other", os.O_WRONLY | os.O_APPEND) as fd:
        assert os.write(fd, b"x" * 20_000) == 5_000
        with fails(errno.ENOSPC):
            os.write(fd, b"x" * 15_000)
        served.heal()
        assert os.write(fd, b"x" * 15_000) == 15_000
    assert (fs.path / "other").read_bytes() == b"other" * 5000 + b"x" * 20_000


def test_a_write_of_no_bytes_by_the_source_is_an_error(served: Faulty, fs: MountedFs) -> None:
    served.fault("write", short=0)
    with opened(fs.path / "f", os.O_WRONLY) as fd, fails(errno.EIO):
        os.pwrite(fd, b"x", 0)
    assert (fs.path / "f").read_bytes() == DATA


def test_short_reads_and_writes_are_completed(served: Faulty, fs: MountedFs) -> None:
    served.fault("read", short=1000)
    served.fault("write", short=1000)
    assert (fs.path / "f").read_bytes() == DATA
    (fs.path / "f").write_bytes(DATA[::-1])
    assert (served.real / "f").read_bytes() == DATA[::-1]
    assert (fs.path / "f").read_bytes() == DATA[::-1]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("op", ["fsync", "flush"])
def test_an_error_of_fsync_or_close_is_reported_once(
    served: Faulty, fs: MountedFs, op: str, number: int
) -> None:
    served.fault(op, number, "f", count=1)
    fd = os.open(fs.path / "f", os.O_RDWR)
    os.write(fd, b"x")
    with fails(number):
        os.fsync(fd) if op == "fsync" else os.close(os.dup(fd))
    os.fsync(fd)
    os.close(fd)
    assert (fs.path / "f").read_bytes() == b"x" + DATA[1:]


@pytest.mark.parametrize(
    "op", ["lookup", "getattr", "open", "read", "opendir", "readdir", "statfs", "rename", "unlink"]
)
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_an_error_has_no_effect_afterwards(served: Faulty, fs: MountedFs, op: str, number: int) -> None:
    calls: dict[str, Callable[[], object]] = {
        "opendir": lambda: os.listdir(fs.path),
        "readdir": lambda: os.listdir(fs.path),
        "statfs": lambda: os.statvfs(fs.path),
        "rename": lambda: os.rename(fs.path / "f", fs.path / "g"),
        "unlink": lambda: os.unlink(fs.path / "f"),
    }
    call = calls.get(op, (fs.path / "f").read_bytes)
    served.fault(op, number)
    with fails(number):
        call()
    check_alive(fs)
    served.heal()
    assert (fs.path / "f").read_bytes() == DATA, "an error is not a deletion"
    assert sorted(os.listdir(fs.path)) == ["f", "other"]
    call()


def test_an_error_of_the_source_is_not_cached_as_absence(tmp_path: Path) -> None:
    """This holds even with long timeouts for absent names."""
    source = make_directories(tmp_path)
    options = ("--coherency", "none", "--attr-timeout", "1000")
    with faulty(*source) as served, on(served.path, tmp_path, *options) as fs:
        for op, number in (("lookup", errno.EIO), ("lookup", errno.ESTALE), ("getattr", errno.EIO)):
            served.fault(op, number)
            with fails(number):
                (fs.path / "f").read_bytes()
            served.heal()
        assert (fs.path / "f").read_bytes() == DATA
        # These operations are done and then reported as failed.
        served.fault("make", errno.EIO, late=True)
        served.fault("rename", errno.EIO, late=True)
        served.fault("unlink", errno.EIO, late=True)
        assert not (fs.path / "new").exists()
        with fails(errno.EIO):
            (fs.path / "new").mkdir()
        with fails(errno.EIO):
            os.rename(fs.path / "f", fs.path / "g")
        with fails(errno.EIO):
            os.unlink(fs.path / "other")
        served.heal()
        wait_until((fs.path / "new").is_dir)
        wait_until(lambda: (fs.path / "g").exists() and not (fs.path / "f").exists())
        wait_until(lambda: not (fs.path / "other").exists())


def test_a_failing_getattr_after_a_change_does_not_fail_the_change(
    served: Faulty, fs: MountedFs
) -> None:
    with opened(fs.path / "f") as fd:
        served.fault("getattr", errno.EIO, "f", count=1)
        with contextlib.suppress(OSError):
            os.fstat(fd)
    (fs.path / "f").rename(fs.path / "g")
    assert (fs.path / "g").read_bytes() == DATA


def test_a_file_with_a_new_handle_in_the_source_is_found_again(served: Faulty, fs: MountedFs) -> None:
    """After a restart of a server, held inodes stay stale, but the name leads to the file."""
    assert (fs.path / "f").read_bytes() == DATA
    os.stat(fs.path / "f")
    served.replace_inodes()
    os.listdir(served.path)  # the source's kernel finds this out
    os.stat(served.path / "f")

    def reads() -> bool:
        try:
            return (fs.path / "f").read_bytes() == DATA
        except OSError:
            return False

    wait_until(reads, 5)
    assert os.stat(fs.path / "f").st_size == len(DATA)


@pytest.mark.parametrize("size", [0, 10, 20_000, 30_000])
def test_a_wrong_size_has_no_lasting_effect(served: Faulty, fs: MountedFs, size: int) -> None:
    data = b"other" * 5000
    assert (fs.path / "other").read_bytes() == data
    served.fault("attributes", name="other", size=size)
    with opened(fs.path / "other") as fd:
        assert os.pread(fd, 100_000, 0) in (data[:size], data)
    served.heal()
    wait_until(lambda: (fs.path / "other").read_bytes() == data, 5)


def test_stamps_that_go_backwards_are_a_change(served: Faulty, fs: MountedFs) -> None:
    assert (fs.path / "f").read_bytes() == DATA
    with (served.real / "f").open("r+b") as file:
        file.write(b"new")
    served.fault("attributes", name="f", backwards_ns=10**10)
    assert (fs.path / "f").read_bytes() == b"new" + DATA[3:]
    served.heal()
    with (served.real / "f").open("r+b") as file:
        file.write(b"NEW")
    assert (fs.path / "f").read_bytes() == b"NEW" + DATA[3:]


# -- the end of a source or daemon ---------------------------------------------------------------


def test_a_source_whose_server_was_killed_does_not_make_the_mount_look_dead(
    tmp_path: Path,
) -> None:
    source = make_directories(tmp_path)
    with faulty(*source) as served, on(served.path, tmp_path) as fs:
        with opened(fs.path / "f") as fd:
            served.kill()
            for number in range(2):
                with fails(errno.ENOTCONN):
                    os.pread(fd, 10, 100 * PAGE * number)
        with fails(errno.ENOTCONN):
            os.listdir(fs.path)
        check_alive(fs)
        listed = cleanfs("list").stdout
        assert str(fs.process.pid) in listed
        # The mount point is not taken for a dead one.
        again = cleanfs("mount", served.path, fs.path)
        assert again.returncode == 1
        assert fs.stats()["pid"] == fs.process.pid
        done = cleanfs("umount", fs.path)
        assert done.returncode == 0, done.stderr
        assert not is_mounted(fs.path)
        assert end_of(fs.process, 20) == 0


@pytest.mark.parametrize("ending", ["umount", "lazy", "SIGTERM"])
def test_a_mount_whose_source_hangs_can_be_unmounted(tmp_path: Path, ending: str) -> None:
    source = make_directories(tmp_path)
    with faulty(*source) as served, on(served.path, tmp_path) as fs:
        for op in ("lookup", "getattr", "read", "statfs", "opendir", "flush"):
            served.fault(op, hang=True)
        if ending == "umount":
            done = cleanfs("umount", fs.path)
            assert done.returncode == 0, done.stderr
        else:
            with program("os.stat(sys.argv[1] + '/f')", fs.path) as process:
                served.wait_hanging(1)
                if ending == "lazy":
                    done = cleanfs("umount", "--lazy", fs.path)
                    assert done.returncode == 0, done.stderr
                else:
                    fs.process.terminate()
                    wait_until(lambda: not is_mounted(fs.path), 30)
                process.kill()
                end_of(process, 10)
        assert not is_mounted(fs.path)
        served.heal()  # before, a thread of the daemon may wait in the kernel
        end_of(fs.process, 20)


def test_a_notification_waiting_for_the_source_does_not_keep_requesters_waiting_at_the_end(
    tmp_path: Path,
) -> None:
    """The notification keeps the device open, and so the waits for replies that would never come."""
    source = make_directories(tmp_path)
    read, stat = "open(sys.argv[1] + '/f').read()", "os.stat(sys.argv[1] + '/f')"
    with faulty(*source) as served, on(served.path, tmp_path) as fs:
        served.fault("read", hang=True)
        with program(read, fs.path) as reading:
            served.wait_hanging(1)
            (served.real / "f").write_bytes(DATA[::-1])
            with program(stat, fs.path) as stat_caller:  # finds the change
                wait_until(lambda: "fuse_reverse_inval_inode" in stacks(fs))
                fs.process.terminate()
                assert end_of(reading, 30) == 1
                end_of(stat_caller, 10)
        assert not is_mounted(fs.path)
        served.heal()
        end_of(fs.process, 20)


def stacks(fs: MountedFs) -> str:
    """Return the kernel stacks of the daemon's threads."""
    found = ""
    for task in Path(f"/proc/{fs.process.pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # trio ends idle threads
            found += (task / "stack").read_text()
    return found


def test_a_killed_daemon_that_cannot_end_leaves_a_dead_mount(tmp_path: Path) -> None:
    """A thread of the daemon waits for the source and cannot be ended. The mount must not hang too."""
    source = make_directories(tmp_path)
    with faulty(*source) as served, on(served.path, tmp_path) as fs:
        served.fault("read", hang=True)
        with program("print(open(sys.argv[1] + '/f').read())", fs.path) as process:
            served.wait_hanging(1)
            fs.process.kill()
            assert end_of(process, 10) == 1

        def stat() -> None:
            with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
                os.stat(fs.path)

        within(10, stat)
        assert fs.process.poll() is None
        done = cleanfs("umount", fs.path)
        assert done.returncode == 0, done.stderr
        served.heal()
        end_of(fs.process, 20)


def test_a_detached_source_can_still_be_read(tmp_path: Path) -> None:
    source = make_directories(tmp_path)
    with faulty(*source) as served, on(served.path, tmp_path) as fs:
        subprocess.run(["umount", "-l", served.path], check=True, timeout=20)
        assert (fs.path / "f").read_bytes() == DATA
        check_alive(fs)


# -- local file systems --------------------------------------------------------------------------


def test_a_lease_delays_only_opens_of_the_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_bytes(DATA)
    (source / "other").write_bytes(b"other")
    code = (
        "import fcntl, signal\nsignal.signal(signal.SIGIO, signal.SIG_IGN)\n"
        "f = os.open(sys.argv[1] + '/f', os.O_RDWR)\n"
        "fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_WRLCK)\nprint(flush=True)\ntime.sleep(30)"
    )
    with on(source, tmp_path) as fs, program(code, source) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        reader = threading.Thread(target=(fs.path / "f").read_bytes, daemon=True)
        reader.start()
        time.sleep(0.2)
        check_alive(fs)
        assert (fs.path / "other").read_bytes() == b"other"
        assert reader.is_alive()
        holder.kill()
        reader.join(10)
        assert not reader.is_alive()


@contextmanager
def ext4(base: Path, megabytes: int, *options: str) -> Iterator[Path]:
    """Mount a small ext4 on a loop device. The image is ``base / "image"``."""
    image, path = base / "image", base / "ext4"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    made = subprocess.run(
        ["mkfs.ext4", "-q", "-m", "0", image], capture_output=True, check=False, timeout=60
    )
    words = ["mount", "-o", ",".join(("loop", *options)), str(image), str(path)]
    if (
        made.returncode
        or subprocess.run(words, check=False, capture_output=True, timeout=60).returncode
    ):
        pytest.skip("cannot mount ext4 on a loop device")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=False, timeout=60)


def test_a_full_file_system(tmp_path: Path) -> None:
    with ext4(tmp_path, 8) as source, on(source, tmp_path) as fs:
        chunk = os.urandom(100_000)
        written = 0
        with opened(fs.path / "f", os.O_RDWR | os.O_CREAT | os.O_APPEND) as fd:
            with fails(errno.ENOSPC):
                while True:
                    written += os.write(fd, chunk)
            assert os.fstat(fd).st_size == (source / "f").stat().st_size == written
            expected = (chunk * (written // len(chunk) + 1))[:written]
            assert os.pread(fd, written + 10, 0) == (source / "f").read_bytes() == expected
        with fails(errno.ENOSPC):
            (fs.path / "g").write_bytes(chunk * 3)
        assert (fs.path / "g").read_bytes() == (source / "g").read_bytes()
        os.unlink(fs.path / "f")
        wait_until(lambda: os.statvfs(source).f_bavail * os.statvfs(source).f_bsize > 3 << 20)
        (fs.path / "g").write_bytes(chunk * 3)
        assert (source / "g").read_bytes() == chunk * 3


def test_a_source_that_becomes_read_only(tmp_path: Path) -> None:
    with ext4(tmp_path, 8) as source, on(source, tmp_path) as fs:
        (fs.path / "f").write_bytes(b"f" * 10_000)
        # The kernel sends RELEASE late; until then the file is open for writing.
        read_only = ["mount", "-o", "remount,ro", str(source)]
        wait_until(
            lambda: (
                not subprocess.run(read_only, check=False, timeout=20, capture_output=True).returncode
            )
        )
        for change in (
            lambda: (fs.path / "f").write_bytes(b"g"),
            (fs.path / "new").mkdir,
            lambda: os.unlink(fs.path / "f"),
            lambda: os.rename(fs.path / "f", fs.path / "g"),
            lambda: os.truncate(fs.path / "f", 5),
        ):
            with fails(errno.EROFS):
                change()
        assert (fs.path / "f").read_bytes() == b"f" * 10_000
        subprocess.run(["mount", "-o", "remount,rw", source], check=True, timeout=20)
        (fs.path / "f").write_bytes(b"g")
        assert (source / "f").read_bytes() == b"g"


def loop_devices() -> set[str]:
    """Return the files behind loop devices."""
    files = set()
    for device in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            files.add(device.read_text().strip())
    return files


def test_a_disk_that_ends_early(tmp_path: Path) -> None:
    """Get a real EIO from a device that is shorter than its file system.

    It is mounted read-only: a write to its journal would extend the image with zeros.
    """
    with ext4(tmp_path, 16) as made:
        (made / "f").write_bytes(DATA * 10)
        subprocess.run(["umount", made], check=True, timeout=60)
        image = str(tmp_path / "image")
        # Another mount namespace may have a copy of the mount for a while.
        wait_until(lambda: image not in loop_devices(), 60)
        first = (tmp_path / "image").read_bytes().find(DATA)
        blocks = first // PAGE + 128
        subprocess.run(
            ["mount", "-o", "loop,ro,errors=continue", tmp_path / "image", made],
            check=True,
            timeout=60,
        )
        os.truncate(tmp_path / "image", blocks * PAGE)
        with on(made, tmp_path) as fs, opened(fs.path / "f") as fd:
            good = bad = 0
            for at in range(0, len(DATA) * 10, PAGE):
                try:
                    data = os.pread(fd, PAGE, at)
                except OSError as exc:
                    assert exc.errno == errno.EIO  # noqa: PT017  # other reads succeed
                    bad += 1
                else:
                    assert data == DATA[:PAGE]
                    good += 1
            assert good
            assert bad
            check_alive(fs)


@contextmanager
def frozen(file_system: Path) -> Iterator[None]:
    """Freeze a file system, as before a snapshot: writes wait."""
    subprocess.run(["fsfreeze", "-f", file_system], check=True, timeout=20)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "-u", file_system], check=True, timeout=20)


def test_a_frozen_file_system_blocks_only_writes(tmp_path: Path) -> None:
    with (
        ext4(tmp_path, 32) as source,
        on(source, tmp_path) as fs,
        opened(fs.path / "f", os.O_RDWR | os.O_CREAT) as fd,
        opened(fs.path / "second", os.O_RDWR | os.O_CREAT) as second,
    ):
        (fs.path / "directory").mkdir()
        for name in ("f", "other"):
            (fs.path / name).write_bytes(b"-" * 4000)
        wait_until(lambda: os.pwrite(fd, b"f", 0) > 0 and bool(fs.stats()["source_writes_inline"] > 5))
        time.sleep(2 * RECENT_SECONDS)
        calls: tuple[Callable[[], object], ...] = (
            lambda: os.pwrite(fd, b"g", 0),
            lambda: os.pwrite(second, b"g", 0),
            lambda: os.truncate(fs.path / "f", 100),
            (fs.path / "directory" / "new").mkdir,
        )
        threads = [threading.Thread(target=call, daemon=True) for call in calls]
        with frozen(source):
            for thread in threads:
                thread.start()
                time.sleep(RECENT_SECONDS / 3)  # so that each hangs on its own
            time.sleep(0.3)
            within(5, lambda: check_alive(fs))
            within(5, (fs.path / "other").read_bytes)
            within(5, lambda: os.listdir(fs.path))
            assert all(thread.is_alive() for thread in threads)
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert (fs.path / "f").read_bytes() == (source / "f").read_bytes() == b"g" + b"-" * 99
        assert (source / "directory" / "new").is_dir()


def test_a_file_size_limit_of_the_daemon(tmp_path: Path) -> None:
    source, mountpoint = tmp_path / "source", tmp_path / "mnt"
    source.mkdir()
    mountpoint.mkdir()
    (source / "f").write_bytes(b"f" * 10_000)
    with (
        mounted(source, mountpoint, prefix=("prlimit", "--fsize=20000000")) as fs,
        opened(fs.path / "f", os.O_RDWR) as fd,
    ):
        with fails(errno.EFBIG):
            os.pwrite(fd, b"x", 20_000_000)
        assert os.pread(fd, 20_000, 0) == b"f" * 10_000
        os.pwrite(fd, b"x", 0)
        assert (source / "f").read_bytes() == b"x" + b"f" * 9_999
