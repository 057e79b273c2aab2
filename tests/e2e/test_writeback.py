"""Test ``--writeback``: the kernel writes later, without a difference that programs can see."""

import fcntl
import mmap
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter
from tests.harness.mounting import MountedFs, as_user, cleanfs, end_of, is_mounted, settle, wait_until

WRITEBACK = ("--coherency", "none", "--writeback")


@pytest.fixture
def fs(mount: Mounter) -> MountedFs:
    return mount(*WRITEBACK, "--allow-other")


@contextmanager
def held(path: Path, flags: int = os.O_RDONLY, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def test_writes_are_delayed_with_the_option(mount: Mounter, fs: MountedFs) -> None:
    with held(fs.path / "f", os.O_WRONLY | os.O_CREAT) as fd:
        for i in range(1000):
            os.pwrite(fd, b"%04d" % i, i * 4)
        assert fs.stats()["source_writes"] <= 4, "only a sync by another process adds writes"
        assert os.fstat(fd).st_size == 4000
        os.fsync(fd)
        assert 1 <= fs.stats()["source_writes"] <= 8
        assert (fs.source / "f").read_bytes() == b"".join(b"%04d" % i for i in range(1000))


def test_without_the_option_every_write_is_in_the_source_at_once(mount: Mounter) -> None:
    fs = mount("--coherency", "none")
    with held(fs.path / "f", os.O_WRONLY | os.O_CREAT) as fd:
        for i in range(10):
            os.pwrite(fd, b"%04d" % i, i * 4)
            assert (fs.source / "f").stat().st_size == i * 4 + 4


def test_a_part_of_a_page_is_written_through_a_write_only_fd(fs: MountedFs) -> None:
    data = bytearray(random.Random(1).randbytes(50_000))
    (fs.source / "f").write_bytes(data)
    settle()
    with held(fs.path / "f", os.O_WRONLY) as fd:
        for offset in (100, 4090, 20_000, 49_990):
            data[offset : offset + 20] = b"x" * 20
            os.pwrite(fd, b"x" * 20, offset)  # the kernel must read the rest of the page first
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pread(fd, 10, 0)
    assert (fs.source / "f").read_bytes() == data
    assert (fs.path / "f").read_bytes() == data


def test_two_appending_fds_take_turns(fs: MountedFs) -> None:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with held(fs.path / "log", flags) as one, held(fs.path / "log", flags) as two:
        for i in range(500):
            os.write(one, b"one %d\n" % i)
            os.write(two, b"two %d\n" % i)
    expected = b"".join(b"one %d\ntwo %d\n" % (i, i) for i in range(500))
    assert (fs.path / "log").read_bytes() == (fs.source / "log").read_bytes() == expected


def test_a_mapping_and_writes_are_coherent(fs: MountedFs) -> None:
    (fs.source / "f").write_bytes(b"a" * 10_000)
    with held(fs.path / "f", os.O_RDWR | os.O_APPEND) as fd, mmap.mmap(fd, 10_000) as area:
        area[100:110] = b"B" * 10
        os.write(fd, b"end")
        assert os.pread(fd, 20, 95) == b"a" * 5 + b"B" * 10 + b"a" * 5
        area.flush()
        os.fsync(fd)
        expected = b"a" * 100 + b"B" * 10 + b"a" * 9_890 + b"end"
        assert (fs.source / "f").read_bytes() == expected


def test_truncation_discards_unwritten_data(fs: MountedFs) -> None:
    with held(fs.path / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"x" * 10_000)
        os.ftruncate(fd, 5_000)
        os.pwrite(fd, b"y" * 10, 7_000)
        expected = b"x" * 5_000 + bytes(2_000) + b"y" * 10
        assert os.pread(fd, 20_000, 0) == expected
        os.fsync(fd)
        assert (fs.source / "f").read_bytes() == expected
    with held(fs.path / "f", os.O_WRONLY | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0
        os.write(fd, b"short")
    assert (fs.path / "f").read_bytes() == (fs.source / "f").read_bytes() == b"short"


def test_a_hole_not_yet_in_the_source_reads_as_zeros(fs: MountedFs) -> None:
    with held(fs.path / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"end", 100_000)
        assert os.pread(fd, 200_000, 0) == bytes(100_000) + b"end"
    assert (fs.source / "f").read_bytes() == bytes(100_000) + b"end"


def test_the_time_of_the_write_is_the_mtime_after_close(fs: MountedFs) -> None:
    (fs.source / "f").write_bytes(b"old")
    os.utime(fs.source / "f", (1, 1))
    before = time.time() - 1
    with held(fs.path / "f", os.O_WRONLY) as fd:
        os.write(fd, b"new")
        seen = os.fstat(fd).st_mtime_ns
    assert before < seen / 1e9 < time.time() + 1
    assert (fs.path / "f").stat().st_mtime_ns == seen
    wait_until(lambda: (fs.source / "f").stat().st_mtime_ns == seen)
    os.utime(fs.path / "f", (5, 5))
    assert (fs.path / "f").stat().st_mtime == (fs.source / "f").stat().st_mtime == 5


def test_a_write_only_file_is_written(fs: MountedFs) -> None:
    """The daemon runs as root, so it can read the file all the same."""
    (fs.source / "f").write_bytes(b"a" * 6_000)
    os.chmod(fs.source, 0o777)
    os.chmod(fs.source / "f", 0o200)
    os.chown(fs.source / "f", 12345, 23456)
    code = (
        "fd = os.open('f', os.O_WRONLY | os.O_APPEND); os.write(fd, b'end'); os.close(fd); print('ok')"
    )
    assert as_user(fs.path, code) == "ok"
    assert (fs.source / "f").read_bytes() == b"a" * 6_000 + b"end"


def test_a_daemon_that_may_not_read_a_file_writes_it_through(
    source: Path, mount: Mounter, tmp_path: Path
) -> None:
    """The daemon owns the file of mode 0200 and lacks the privileges of root."""
    os.chmod(source, 0o777)
    (source / "f").write_bytes(b"a" * 6_000)
    os.chmod(source / "f", 0o200)
    drop = "-dac_override,-dac_read_search"
    fs = mount(*WRITEBACK, prefix=("setpriv", "--inh-caps=" + drop, "--bounding-set=" + drop))
    with held(fs.path / "f", os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b"end")
        assert (source / "f").stat().st_size == 6_003  # at once
        os.pwrite(fd, b"!", 0)  # Linux appends this, too
        os.ftruncate(fd, 6_001)
    with held(fs.path / "f", os.O_WRONLY) as fd:
        os.pwrite(fd, b"b" * 10, 4_090)
    assert (source / "f").read_bytes() == b"a" * 4_090 + b"b" * 10 + b"a" * 1_900 + b"e"


def test_an_append_only_file_grows(fs: MountedFs) -> None:
    (fs.source / "f").write_bytes(b"start\n")
    made = subprocess.run(
        ["chattr", "+a", fs.source / "f"], capture_output=True, check=False, timeout=10
    )
    if made.returncode:
        pytest.skip("no append-only attribute here")
    try:
        for i in range(3):
            with held(fs.path / "f", os.O_WRONLY | os.O_APPEND) as fd:
                os.write(fd, b"line %d\n" % i)
                os.write(fd, b"more\n")
        expected = b"start\n" + b"".join(b"line %d\nmore\n" % i for i in range(3))
        assert (fs.source / "f").read_bytes() == (fs.path / "f").read_bytes() == expected
    finally:
        subprocess.run(["chattr", "-a", fs.source / "f"], check=True, timeout=10)


@pytest.mark.parametrize("ending", ["umount", "SIGTERM"])
def test_written_data_survives_the_end_of_the_mount(fs: MountedFs, ending: str) -> None:
    data = random.Random(2).randbytes(20_000_000)
    with (
        suppress(OSError),  # a close after the end of the daemon
        held(fs.path / "g", os.O_RDWR | os.O_CREAT) as other,
        suppress(OSError),
        held(fs.path / "f", os.O_WRONLY | os.O_CREAT) as fd,
    ):
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.write(other, b"held")
        if ending == "SIGTERM":  # while both are open, so that no close writes back
            fs.process.send_signal(signal.SIGTERM)
            end_of(fs.process, 30)
    if ending == "umount":
        assert cleanfs("umount", fs.path).returncode == 0
        end_of(fs.process, 30)
    assert not is_mounted(fs.path)
    assert (fs.source / "f").read_bytes() == data
    assert (fs.source / "g").read_bytes() == b"held"


def test_a_full_source_raises_enospc_at_fsync(source: Path, mount: Mounter) -> None:
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", source],
        capture_output=True,
        check=False,
        timeout=10,
    )
    if made.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        fs = mount(*WRITEBACK)
        with held(fs.path / "f", os.O_WRONLY | os.O_CREAT) as fd:
            os.write(fd, bytes(3 << 20))
            with pytest.raises(OSError, match="No space"):
                os.fsync(fd)
        (fs.path / "f").unlink()
        (fs.path / "g").write_bytes(b"fits")
        fs.process.send_signal(signal.SIGTERM)
        end_of(fs.process, 30)
        assert (source / "g").read_bytes() == b"fits"
    finally:
        subprocess.run(["umount", "-l", source], check=True, timeout=10)


def test_locks_renames_and_links_see_written_data(fs: MountedFs) -> None:
    with held(fs.path / "f", os.O_RDWR | os.O_CREAT) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.write(fd, b"text")
        os.link(fs.path / "f", fs.path / "l")
        os.rename(fs.path / "f", fs.path / "g")
        assert (fs.path / "l").read_bytes() == (fs.path / "g").read_bytes() == b"text"
    assert (fs.source / "l").read_bytes() == (fs.source / "g").read_bytes() == b"text"
