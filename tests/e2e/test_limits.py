"""Test sizes and numbers at their limits, briefly; scripts/run check/limits does the same at length."""

import contextlib
import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter, Place
from tests.harness.descriptors import many_files
from tests.harness.mounting import MountedFs, mount_namespace, wait_until

LARGEST = (1 << 63) - 1


@pytest.fixture
def tmpfs_source(source: Path) -> Iterator[Path]:
    """Mount a file system on the source that allows files of 2^63-1 bytes."""
    subprocess.run(["mount", "-t", "tmpfs", "none", source], check=True, timeout=20)
    yield source
    subprocess.run(["umount", "-l", source], check=True, timeout=20)


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def error_of(call: Callable[[], object]) -> str:
    """Return the name of the error that a call raises."""
    try:
        call()
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]
    return "none"


def proc(fs: MountedFs, name: str) -> int:
    return len(os.listdir(f"/proc/{fs.process.pid}/{name}"))


# -- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", ["4096", "1M"])
def test_the_largest_file_is_read_to_its_last_byte(
    tmpfs_source: Path, mount: Mounter, page_size: str
) -> None:
    with opened(tmpfs_source / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, LARGEST)
        os.pwrite(fd, b"the end", LARGEST - 7)
    fs = mount("--page-size", page_size, "--page-cache", "8M")
    with opened(fs.path / "f", os.O_RDWR) as fd:
        assert os.fstat(fd).st_size == LARGEST
        for at in (LARGEST - 7, LARGEST - 4096, LARGEST - 5000, LARGEST - (1 << 20)):
            assert os.pread(fd, LARGEST - at, at).endswith(b"the end")
            assert os.pread(fd, 3, at) == (b"the" if at == LARGEST - 7 else bytes(3))
        fs.control("drop").write_text("1\n")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        gets = fs.stats()["succ_gets"]
        assert os.pread(fd, 7, LARGEST - 7) == b"the end"
        assert fs.stats()["succ_gets"] > gets
        os.pwrite(fd, b"THE", LARGEST - 3)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, 7, LARGEST - 7) == b"the THE"
        assert os.lseek(fd, 0, os.SEEK_END) == LARGEST
        assert error_of(lambda: os.pwrite(fd, b"x", LARGEST)) == "EINVAL"
        os.ftruncate(fd, LARGEST - 3)
        assert os.pread(fd, 7, LARGEST - 7) == b"the "
    assert fs.stats()["source_errors"] == 0


# -- open files ---------------------------------------------------------------------------------


def test_open_files_leave_fds_for_other_calls(source: Path, mount: Mounter) -> None:
    for i in range(600):
        (source / f"f{i}").touch()
    (source / "d").mkdir()
    for i in range(150):
        (source / "d" / f"f{i}").touch()
    fs = mount("--attr-timeout", "0", prefix=("prlimit", "--nofile=600:600"))
    with many_files(), contextlib.ExitStack() as stack:
        open_all = [stack.enter_context(opened(fs.path / f"f{i}")) for i in range(450)]
        more = (opened(fs.path / f"f{i}") for i in range(450, 600))
        assert error_of(lambda: [stack.enter_context(each) for each in more]) == "EMFILE"
        assert os.read(open_all[0], 1) == b""
        for i in range(150):  # each takes an fd
            (fs.path / "d" / f"f{i}").stat()
        assert proc(fs, "fd") < 550
        (fs.path / "d" / "new").mkdir()
        (fs.path / "d" / "new").rename(fs.path / "d" / "other")
        (fs.path / "d" / "other").rmdir()
        (fs.path / "d" / "link").symlink_to("x")
        os.link(fs.path / "d" / "f1", fs.path / "d" / "f1 too")
        (fs.path / "d" / "f2").unlink()
        os.truncate(fs.path / "d" / "f3", 10)
        assert error_of((fs.path / "d" / "not made").touch) == "EMFILE"
        assert not (source / "d" / "not made").exists()
    wait_until(lambda: fs.stats()["open_files"] == 0)
    assert len(os.listdir(fs.path / "d")) == 151


# -- names --------------------------------------------------------------------------------------


def test_names_of_255_bytes_of_any_kind(place: Place) -> None:
    allowed = [bytes([value]) for value in range(1, 256) if value != ord("/")]
    choose = random.Random(1)
    names = {byte * 255 for byte in allowed[::2]} | {byte for byte in allowed[1::2] if byte != b"."}
    names |= {b"".join(choose.choices(allowed, k=255)) for _ in range(20)} | {b".cleancache"}
    top = os.fsencode(place.path)
    for name in names:
        os.mknod(top + b"/" + name)
    assert set(os.listdir(top)) == names == set(os.listdir(os.fsencode(place.source)))
    for name in names:
        os.rename(top + b"/" + name, top + b"/" + name[:254] + b"!")
        os.unlink(top + b"/" + name[:254] + b"!")
    assert os.listdir(place.source) == []
    assert error_of(lambda: os.mknod(top + b"/" + b"x" * 256)) == "ENAMETOOLONG"


def test_directories_deeper_than_any_path(place: Place) -> None:
    fd = os.open(place.path, os.O_RDONLY)
    for _ in range(40):
        os.mkdir("d" * 255, dir_fd=fd)
        below = os.open("d" * 255, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    with open("f", "wb", opener=lambda name, flags: os.open(name, flags, dir_fd=fd)) as file:
        file.write(b"deep")
    with open("f", "rb", opener=lambda name, flags: os.open(name, flags, dir_fd=fd)) as file:
        assert file.read() == b"deep"
    os.close(fd)
    subprocess.run(["rm", "-rf", place.path / ("d" * 255)], check=True, timeout=30)
    assert os.listdir(place.source) == []


# -- numbers ------------------------------------------------------------------------------------


def test_64_processes_read_one_file(place: Place) -> None:
    data = random.Random(1).randbytes(1 << 20) * 3
    (place.source / "f").write_bytes(data)
    script = (
        "import os, random, sys\n"
        "mount, source = (os.open(p, os.O_RDONLY) for p in sys.argv[1:])\n"
        "for i in range(64):\n"
        "    if os.fork() == 0:\n"
        "        choose = random.Random(i)\n"
        "        for _ in range(40):\n"
        "            at = choose.randrange(3 << 20)\n"
        "            assert os.pread(mount, 50_000, at) == os.pread(source, 50_000, at)\n"
        "            os.posix_fadvise(mount, 0, 0, os.POSIX_FADV_DONTNEED)\n"
        "        os._exit(0)\n"
        "sys.exit(sum(os.wait()[1] != 0 for i in range(64)))\n"
    )
    command = [sys.executable, "-I", "-S", "-c", script, str(place.path / "f"), str(place.source / "f")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_repeated_operations_leave_nothing_behind(place: Place) -> None:
    fs = place.fs

    def operate() -> None:
        for i in range(150):
            path = place.path / f"f{i}"
            path.write_bytes(b"x" * 5000)
            os.setxattr(path, "user.a", b"b")
            path = path.rename(place.path / f"g{i}")
            with path.open("rb") as file:
                path.unlink()
                assert len(file.read()) == 5000
            fs.control("puts").read_text()

    def left() -> tuple[int, int, int, int]:
        stats = fs.stats()
        return (stats["inodes"], stats["pagecache_files"], stats["open_files"], proc(fs, "fd"))

    operate()
    wait_until(lambda: fs.stats()["open_files"] == 0)
    before = left()
    operate()
    wait_until(lambda: all(now <= then for now, then in zip(left(), before, strict=True)))


def test_several_mounts_in_one_process_leave_nothing_behind(source: Path, mountpoint: Path) -> None:
    (source / "f").write_text("hello")
    script = (
        "import gc, os, subprocess, sys, threading\n"
        "from cleanfs.mount.config import MountConfig\n"
        "from cleanfs.mount.mount import serve\n"
        "source, point = sys.argv[1:]\n"
        "def use():\n"
        "    subprocess.run(['cat', point + '/f'], check=True, timeout=20)\n"
        "    subprocess.run(['umount', point], check=True, timeout=20)\n"
        "def ready():\n"
        "    threading.Thread(target=use).start()\n"
        "fds = []\n"
        "for _ in range(3):\n"
        "    serve(MountConfig(source, point), ready)\n"
        "    fds.append(len(os.listdir('/proc/self/fd')))\n"
        "    assert not gc.get_freeze_count()\n"
        "assert fds[1] == fds[2], fds\n"
    )
    command = [
        "timeout",
        "-s",
        "KILL",
        "60",
        sys.executable,
        "-c",
        script,
        str(source),
        str(mountpoint),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=70, check=False)
    assert (done.returncode, done.stdout) == (0, "hello" * 3), done.stderr


def test_other_mounts_may_have_any_names(tmp_path: Path) -> None:
    """The mount is in a namespace of its own, so that no other test sees it."""
    (tmp_path / "a\rb\x0b\x85\u2028c").mkdir()
    script = (
        "import os, subprocess\n"
        "from cleanfs.linux.mounts import mounted_at\n"
        "path = os.path.abspath(os.listdir()[0])\n"
        "subprocess.run(['mount', '-t', 'tmpfs', 'none', path], check=True)\n"
        "print(mounted_at(path).fs_type)\n"
    )
    command = [*mount_namespace(), sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout.strip() == "tmpfs", done.stderr
