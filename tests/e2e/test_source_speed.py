"""Test a mount with fast sources, and with one that hangs."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cleanfs.fuse.request_limits import MAX_BACKGROUND
from tests.e2e.conftest import Mounter
from tests.harness.mounting import MountedFs, is_mounted, mount_line, mounted, wait_until

MEMORY = Path("/dev/shm")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may set the kernel's limits")


def bdi(fs: MountedFs) -> Path:
    """Return the kernel's setting for the read-ahead of a mount."""
    line = mount_line(fs.path)
    assert line is not None
    return Path("/sys/class/bdi", line.split(" ")[2], "read_ahead_kb")


@as_root
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), 1024),
        (("--read-ahead", "256K"), 256),
        (("-o", "read_ahead=4M"), 4096),
        (("--read-ahead", "0"), 0),
    ],
)
def test_the_read_ahead_of_the_mount_is_set_and_reported(
    mount: Mounter, options: tuple[str, ...], expected: int
) -> None:
    fs = mount(*options)
    wait_until(lambda: fs.stats()["read_ahead_kb"] == expected)
    assert int(bdi(fs).read_text()) == expected


@as_root
def test_more_background_requests_are_allowed_than_by_default(mount: Mounter) -> None:
    fs = mount()
    wait_until(lambda: fs.stats()["max_background"] == MAX_BACKGROUND)
    assert "cleanfs_max_background" in fs.control("metrics").read_text()


@as_root
def test_sequential_reads_come_in_large_requests(source: Path, mount: Mounter) -> None:
    size = 16 << 20
    (source / "f").write_bytes(os.urandom(size))
    fs = mount()
    wait_until(lambda: fs.stats()["read_ahead_kb"] == 1024)
    assert len((fs.path / "f").read_bytes()) == size
    stats = fs.stats()
    assert stats["source_read_bytes"] == size
    assert stats["source_reads"] <= size // (512 << 10)


def test_a_source_in_memory_is_read_and_written_without_threads(tmp_path: Path) -> None:
    source, mountpoint = MEMORY / f"cleanfs-{os.getpid()}", tmp_path / "mnt"
    source.mkdir()
    mountpoint.mkdir()
    try:
        (source / "f").write_bytes(os.urandom(64 * 4096))
        with mounted(source, mountpoint, "--backend", "none", "--page-cache", "0") as fs:
            before = fs.stats()
            with (fs.path / "f").open("r+b", buffering=0) as file:

                def inline() -> bool:
                    for i in range(64):
                        os.pwrite(file.fileno(), b"x", i * 4096)
                        fs.drop_kernel(fs.path / "f")
                        os.pread(file.fileno(), 1, i * 4096)
                    now = fs.stats()
                    return all(
                        now[name] - before[name] > 16
                        for name in ("source_reads_inline", "source_writes_inline")
                    )

                wait_until(inline)
    finally:
        shutil.rmtree(source)


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """Mount a file system served by a process, and yield it with its pid."""
    if not shutil.which("bindfs"):
        pytest.skip("bindfs is not installed")
    real, path = tmp_path / "real", tmp_path / "served"
    real.mkdir()
    path.mkdir()
    (real / "slow").write_bytes(os.urandom(1 << 20))
    (real / "cached").write_bytes(b"cached" * 1000)
    with subprocess.Popen(["bindfs", "-f", real, path]) as server:
        try:
            wait_until(lambda: is_mounted(path))
            yield path, server.pid
        finally:
            server.send_signal(signal.SIGCONT)
            subprocess.run(["umount", "-l", path], check=False, timeout=10)
            server.terminate()


def test_a_hanging_source_blocks_no_other_request(hanging: tuple[Path, int], tmp_path: Path) -> None:
    source, server = hanging
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    with (
        mounted(source, mountpoint, "--attr-timeout", "60", "--read-ahead", "0") as fs,
        (fs.path / "slow").open("r+b", buffering=0) as slow,
        (fs.path / "cached").open("rb", buffering=0) as cached,
    ):
        for _ in range(40):  # fast so far
            os.pwrite(slow.fileno(), b"x", 0)
            os.pread(slow.fileno(), 1, 0)
        cached.read()
        os.posix_fadvise(cached.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.kill(server, signal.SIGSTOP)
        threads = [
            threading.Thread(target=os.pread, args=(slow.fileno(), 4096, 512 << 10)),
            threading.Thread(target=os.pwrite, args=(slow.fileno(), b"x", 0)),
        ]
        for thread in threads:
            thread.start()
        try:
            hits = fs.stats()["pagecache_hits"]
            assert os.pread(cached.fileno(), 6, 0) == b"cached"
            assert fs.stats()["pagecache_hits"] > hits
            assert all(thread.is_alive() for thread in threads)
        finally:
            os.kill(server, signal.SIGCONT)
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        stats = fs.stats()
        assert (stats["source_reads_inline"], stats["source_writes_inline"]) == (0, 0)
