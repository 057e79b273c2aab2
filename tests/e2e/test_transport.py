"""Test requests that come by FUSE over io_uring: what is served, what is handed over, and every end."""

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cleanfs.cache.state import native
from cleanfs.fuse.transport import PARAMETER
from cleanfs.linux.fusectl import open_connections
from cleanfs.linux.mounts import mounted_at
from tests.e2e.conftest import SMALL_CACHES, Mounter
from tests.e2e.faults.site import make_directories, on
from tests.harness import uring
from tests.harness.commands import complains
from tests.harness.faulty import faulty
from tests.harness.kernel_pages import read_uncached
from tests.harness.mounting import MountedFs, cleanfs, end_of, is_mounted, mounted, wait_until

pytestmark = pytest.mark.skipif(native is None, reason="the native modules are not in use")

URING = ("--transport", "uring")

FIRST_ENTRIES = 16
"""The entries of a queue before it needs more (``queues.cpp``)."""


def threads(fs: MountedFs) -> list[str]:
    """Return the names of the threads of the daemon's queues."""
    tasks = Path(f"/proc/{fs.process.pid}/task")
    names = [(task / "comm").read_text().strip() for task in tasks.iterdir()]
    return sorted(name for name in names if name.startswith("fuse-cpu-"))


@contextmanager
def disabled() -> Iterator[None]:
    """Have the kernel offer no queues during the block."""
    with uring.enabled():
        Path(PARAMETER).write_text("N")
        yield


def test_each_processor_has_a_queue_and_hits_need_no_python(source: Path, mount: Mounter) -> None:
    (source / "f").write_bytes(b"text" * 1024)
    fs = mount(*URING)
    assert threads(fs) == sorted(f"fuse-cpu-{cpu}" for cpu in os.sched_getaffinity(0))
    stats = fs.stats()
    assert (stats["transport"], stats["transport_reason"]) == ("uring", "asked for")
    read_uncached(fs.path / "f", 10)
    before = fs.stats()
    read_uncached(fs.path / "f", 500)
    after = fs.stats()
    assert after["served_natively"] - before["served_natively"] > 450
    assert after["requests"]["read"] - before["requests"]["read"] >= 500
    assert after["latency_pagecache_hit_count"] - before["latency_pagecache_hit_count"] >= 490


def test_all_sizes_of_requests_and_replies_pass(source: Path, mount: Mounter) -> None:
    fs = mount(*URING)
    data = os.urandom(3 << 20)
    with (fs.path / "f").open("wb", buffering=0) as file:
        for start, size in ((0, 1), (1, 4095), (4096, 70_000), (74_096, 1 << 20)):
            assert file.write(data[start : start + size]) == size
        file.write(data[74_096 + (1 << 20) :])
    assert (source / "f").read_bytes() == data
    fs.drop()
    for size in (1, 100, 4096, 5000, 131_072, 1 << 20):
        fs.drop_kernel(fs.path / "f")
        with (fs.path / "f").open("rb", buffering=0) as file:
            for start in (0, 1, 4096, 1_000_000, len(data) - size, len(data) - 1, len(data)):
                assert os.pread(file.fileno(), size, start) == data[start : start + size]


def test_the_obstacle_is_one_line(source: Path, mountpoint: Path) -> None:
    with disabled_or_skip():
        complains(cleanfs("mount", *URING, source, mountpoint), 1, f"echo Y > {PARAMETER}")
        complains(cleanfs("mount", "-o", "transport=uring", source, mountpoint), 1, "echo Y")
    complains(cleanfs("mount", "--transport", "pipe", source, mountpoint), 2, "pipe")


@contextmanager
def disabled_or_skip() -> Iterator[None]:
    """Do that, or skip the test."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(disabled())
        except uring.UnavailableError as exc:
            pytest.skip(str(exc))
        yield


def test_auto_takes_the_device(source: Path, mountpoint: Path) -> None:
    with mounted(source, mountpoint, "--transport", "auto") as fs:
        stats = fs.stats()
        assert stats["transport"] == "device"
        assert "--transport uring" in stats["transport_reason"]
        assert not threads(fs)
        assert "requests come by device" in fs.log.read_text()


def test_requests_that_hang_leave_entries_for_others(tmp_path: Path) -> None:
    hanging = 3 * FIRST_ENTRIES * len(os.sched_getaffinity(0))
    with faulty(*make_directories(tmp_path)) as source, on(source.path, tmp_path, *URING) as fs:
        source.fault("read", hang=True)
        with ThreadPoolExecutor(hanging) as pool:
            fds = [os.open(fs.path / "f", os.O_RDONLY) for _ in range(hanging)]
            # Each reads another page, so that none joins another one's read of the source.
            calls = [pool.submit(os.pread, fd, 10, number * 4096) for number, fd in enumerate(fds)]
            wait_until(lambda: fs.stats()["requests"].get("read", 0) >= hanging)
            assert fs.stats()["transport"] == "uring"
            source.heal()
            assert all(len(call.result(30)) == 10 for call in calls)
            for fd in fds:
                os.close(fd)


def test_the_memory_of_large_requests_is_given_back(source: Path, mount: Mounter) -> None:
    (source / "f").write_bytes(os.urandom(32 << 20))
    fs = mount(*URING, "--read-ahead", "0", "--backend", "none", "--page-cache", "0")

    def rss() -> int:
        return int(fs.stats()["rss_bytes"])

    read_uncached(fs.path / "f", 10)
    before = rss()
    with ThreadPoolExecutor(24) as pool:

        def read(number: int) -> None:
            fd = os.open(fs.path / "f", os.O_RDONLY | os.O_DIRECT)
            try:
                os.preadv(fd, [memoryview(bytearray(1 << 20))], number << 20)
            finally:
                os.close(fd)

        list(pool.map(read, range(24)))

    def has_shrunk() -> bool:
        time.sleep(1.5)  # each request of ours puts off what a queue does after a pause
        return rss() < before + (6 << 20)

    wait_until(has_shrunk)


def is_dead(mountpoint: Path) -> bool:
    """Return whether the connection has ended; a request that is in a queue meanwhile is cancelled."""
    try:
        os.statvfs(mountpoint)
    except OSError as exc:
        return exc.errno == errno.ENOTCONN
    return False


def stop(fs: MountedFs, how: str) -> None:
    """End a mount in one of the ways in which mounts end."""
    if how == "umount":
        assert cleanfs("umount", fs.path).returncode == 0
    elif how == "forced":
        os.spawnlp(os.P_WAIT, "umount", "umount", "-f", "-l", str(fs.path))
    elif how == "abort":
        point = mounted_at(str(fs.path))
        assert point is not None
        connections = open_connections()
        path = f"/proc/self/fd/{connections}/{os.minor(point.device)}/abort"
        Path(path).write_text("1")
        os.close(connections)
    else:
        fs.process.send_signal(getattr(signal, how))


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("how", ["umount", "forced", "abort", "SIGTERM", "SIGKILL"])
def test_every_end_leaves_nothing(source: Path, mountpoint: Path, how: str, busy: bool) -> None:
    if busy and how == "SIGKILL":
        pytest.skip("the kernel may keep a killed daemon until its requests end (docs/fast-path.md)")
    (source / "f").write_bytes(b"text" * 1024)
    over = threading.Event()

    def use() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):
                read_uncached(mountpoint / "f", 10)
                (mountpoint / "g").write_bytes(b"g")
                (mountpoint / "g").unlink()

    with mounted(source, mountpoint, *SMALL_CACHES, *URING) as fs:
        users = [threading.Thread(target=use) for _ in range(3)] if busy else []
        for user in users:
            user.start()
        try:
            time.sleep(0.3)
            if how == "umount" and busy:  # it is refused while files are open
                over.set()
                for user in users:
                    user.join(20)
            stop(fs, how)
            end_of(fs.process, 20)
        finally:
            over.set()
        for user in users:
            user.join(20)
            assert not user.is_alive()
        assert fs.process.returncode == (-signal.SIGKILL if how == "SIGKILL" else 0)
        if how == "SIGKILL":
            wait_until(lambda: is_dead(mountpoint))
        else:
            assert not is_mounted(mountpoint)


FORKING = """
import threading, time
def fork():
    while not os.path.exists({made!r}):
        time.sleep(0.01)
    if os.fork() == 0:
        time.sleep(6)
        os._exit(0)
    os.rename({made!r}, {forked!r})
threading.Thread(target=fork, daemon=True).start()
"""


@pytest.mark.parametrize("how", ["umount", "SIGTERM", "SIGKILL"])
def test_a_child_with_the_fds_of_the_daemon_keeps_no_mount(
    source: Path, mountpoint: Path, tmp_path: Path, how: str
) -> None:
    made, forked = tmp_path / "made", tmp_path / "forked"
    patch = FORKING.format(made=str(made), forked=str(forked))
    with mounted(source, mountpoint, *SMALL_CACHES, *URING, patch=patch) as fs:
        (fs.path / "f").write_bytes(b"text")
        made.touch()
        wait_until(forked.exists)
        assert (fs.path / "f").read_bytes() == b"text"
        stop(fs, how)
        end_of(fs.process, 5)
        if how == "SIGKILL":
            wait_until(lambda: is_dead(mountpoint))
        else:
            assert not is_mounted(mountpoint)


def test_programs_continue_when_a_stopped_daemon_does(source: Path, mount: Mounter) -> None:
    (source / "f").write_bytes(b"text" * 1024)
    fs = mount(*URING)
    fs.process.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(read_uncached, fs.path / "f", 20) for _ in range(8)]
        time.sleep(0.3)
        assert not any(call.done() for call in calls)
        fs.process.send_signal(signal.SIGCONT)
        for call in calls:
            call.result(20)
