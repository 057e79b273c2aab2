"""Test local file systems that are full, read-only, too short, frozen or leased."""

import contextlib
import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cleanfs.source.inline_policy import RECENT_SECONDS
from tests.e2e.faults.site import (
    DATA,
    PAGE,
    check_alive,
    fails,
    on,
    opened,
    program,
    within,
)
from tests.harness.mounting import (
    mounted,
    wait_until,
)
from tests.harness.ranges import fallocate


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


def test_lookups_do_not_show_that_changes_of_names_would_return(tmp_path: Path) -> None:
    with ext4(tmp_path, 32) as source, on(source, tmp_path) as fs:
        for number in range(50):
            (fs.path / f"d{number}").mkdir()
        time.sleep(2 * RECENT_SECONDS)
        thread = threading.Thread(target=(fs.path / "new").mkdir, daemon=True)
        with frozen(source):
            for number in range(20):
                assert not (fs.path / f"absent{number}").exists()
            thread.start()
            time.sleep(0.3)
            within(5, lambda: check_alive(fs))
            assert thread.is_alive()
        thread.join(20)
        assert (source / "new").is_dir()


RANGE_CALLS: tuple[str, ...] = (
    "libc.fallocate(fd, 3, c_int64(0), c_int64(65536))",
    "libc.fallocate(fd, 0, c_int64(0), c_int64(1 << 20))",
    "os.copy_file_range(os.open(top + '/from', os.O_RDONLY), fd, 65536, 0, 0)",
    "os.open(top, os.O_TMPFILE | os.O_RDWR, 0o600)",
    "os.setxattr(fd, 'user.a', b'1', os.XATTR_CREATE)",
    "fcntl.ioctl(fd, 0x40086602, (0x80040).to_bytes(8, sys.byteorder))",
)
"""Changes of the file ``fd`` in the directory ``top``."""


@pytest.mark.parametrize("call", RANGE_CALLS)
def test_a_program_that_is_killed_while_the_source_is_frozen_ends(tmp_path: Path, call: str) -> None:
    """Its call goes on, and the kernel refuses the reply. What the call did must be seen then."""
    code = (
        "import ctypes, fcntl\nfrom ctypes import c_int64\nlibc, top = ctypes.CDLL(None), sys.argv[1]\n"
        f"fd = os.open(top + '/f', os.O_RDWR)\nprint(flush=True)\n"
        f"while not os.path.exists(sys.argv[2]): time.sleep(0.01)\n{call}"
    )
    with ext4(tmp_path, 32) as source, on(source, tmp_path, "--coherency", "none") as fs:
        for name in ("f", "from"):
            (source / name).write_bytes(name.encode() * 100_000)
        with opened(fs.path / "f") as reader, program(code, fs.path, tmp_path / "go") as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert os.pread(reader, 1 << 21, 0) == b"f" * 100_000
            with frozen(source):
                (tmp_path / "go").touch()
                time.sleep(0.5)
                assert process.poll() is None, "it hangs"
                within(5, lambda: check_alive(fs))
                process.kill()
                process.wait(10)
                within(5, lambda: check_alive(fs))
            wait_until(lambda: fs.stats()["open_files"] == 1)
            wait_until(lambda: os.pread(reader, 1 << 21, 0) == (source / "f").read_bytes())
            assert os.fstat(reader).st_size == (source / "f").stat().st_size
        assert os.listxattr(fs.path / "f") == os.listxattr(source / "f")


def test_fallocate_on_a_full_file_system(tmp_path: Path) -> None:
    with (
        ext4(tmp_path, 8) as source,
        on(source, tmp_path) as fs,
        opened(fs.path / "f", os.O_RDWR | os.O_CREAT) as fd,
    ):
        os.pwrite(fd, b"f" * 10_000, 0)
        with fails(errno.ENOSPC):
            fallocate(fd, 0, 0, 1 << 30)
        assert os.fstat(fd).st_size == (source / "f").stat().st_size
        os.ftruncate(fd, 10_000)
        os.pwrite(fd, b"g", 0)
        assert os.pread(fd, 20_000, 0) == (source / "f").read_bytes() == b"g" + b"f" * 9_999


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
