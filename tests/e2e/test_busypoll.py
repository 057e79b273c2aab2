"""Test busy polling on a real mount: it finds requests and costs an idle mount nothing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cleanfs.cache.state import native
from cleanfs.fuse.channel import LOST
from tests.e2e.conftest import Mounter
from tests.harness.kernel_pages import read_uncached
from tests.harness.mounting import (
    MountedFs,
    as_user,
    cleanfs,
    cpu_ticks,
    end_of,
    unmount_by_force,
    wait_until,
)
from tests.harness.uring import with_device

COUNTING = """
from cleanfs.fuse.channel import Channel
counter = os.open("{path}", os.O_WRONLY | os.O_CREAT)
receive = Channel._receive
def counting(self):
    found = receive(self)
    os.pwrite(counter, b"%9d" % self._native.slept, 0)
    return found
Channel._receive = counting
"""
"""Makes a daemon report how often its main thread has slept for want of work. The kernel's count also
includes waits for locks, for example in /proc and /sys while other tests run."""


def sleeps_of_others(fs: MountedFs) -> int:
    """Return how often the daemon's other threads have slept."""
    total = 0
    for status in Path(f"/proc/{fs.process.pid}/task").glob("*/status"):
        try:
            lines = status.read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # trio ends idle threads
            continue
        for line in lines:
            if line.startswith("voluntary_ctxt_switches") and status.parent.name != str(fs.process.pid):
                total += int(line.split()[1])
    return total


@with_device
def test_the_installed_pyfuse3_uses_the_polling_wait(source: Path, mount: Mounter) -> None:
    """If this fails, pyfuse3 has changed, and ``cleanfs.fuse.channel`` must follow."""
    (source / "f").write_bytes(bytes(4096))
    fs = mount()
    assert fs.stats()["busy_poll_limit_us"] == 50

    def polls() -> bool:  # after a while, as other processes use the CPUs too
        read_uncached(fs.path / "f", 500)
        return bool(fs.stats()["busy_poll_polled"] > 100)

    wait_until(polls, 20)
    assert LOST not in fs.log.read_text()


@with_device
def test_0_never_polls(source: Path, mount: Mounter) -> None:
    (source / "f").write_bytes(bytes(4096))
    fs = mount("--busy-poll", "0")
    read_uncached(fs.path / "f", 100)
    stats = fs.stats()
    assert (stats["busy_poll_limit_us"], stats["busy_poll_polled"]) == (0, 0)


@pytest.mark.skipif(native is None, reason="the native modules are not in use")
def test_reads_and_writes_need_no_python(source: Path, mount: Mounter) -> None:
    """A change in pyfuse3, libfuse or the kernel could turn the fast path off, with nothing wrong."""
    fs = mount()
    with (fs.path / "f").open("wb", buffering=0) as file:
        for _ in range(500):
            file.write(bytes(4096))
    before = fs.stats()
    assert int(before["served_natively"]) > 300, before["served_natively"]
    read_uncached(fs.path / "f", 500)
    after = fs.stats()
    assert int(after["served_natively"]) - int(before["served_natively"]) > 450
    assert (fs.source / "f").stat().st_size == 500 * 4096


def test_an_idle_mount_sleeps(source: Path, mount: Mounter, tmp_path: Path) -> None:
    (source / "f").write_bytes(bytes(4096))
    fs = mount(patch=COUNTING.format(path=tmp_path / "sleeps"))

    def used() -> tuple[int, int, int]:
        return cpu_ticks(fs), int((tmp_path / "sleeps").read_text()), sleeps_of_others(fs)

    read_uncached(fs.path / "f", 1000)
    time.sleep(0.2)
    ticks, sleeps, others = used()
    assert sleeps > 3
    time.sleep(1.5)
    assert used()[0] - ticks <= 2, "a daemon that spins uses 150"
    assert used()[1] - sleeps + used()[2] - others <= 3


@with_device
def test_a_mount_can_be_unmounted_while_it_polls(source: Path, mount: Mounter) -> None:
    (source / "f").write_bytes(bytes(4096))
    fs = mount("--busy-poll", "10000")
    read_uncached(fs.path / "f", 500)
    assert cleanfs("umount", fs.path).returncode == 0
    end_of(fs.process, 10)
    assert fs.process.returncode == 0


@with_device
def test_a_signal_ends_a_daemon_that_polls(source: Path, mount: Mounter) -> None:
    (source / "f").write_bytes(bytes(4096))
    fs = mount("--busy-poll", "10000")
    read_uncached(fs.path / "f", 500)
    fs.process.terminate()
    end_of(fs.process, 10)
    assert fs.process.returncode == 0


def test_an_invalid_time_is_refused(tmp_path: Path) -> None:
    for wrong in ("-1", "nan", "10001", "x"):
        done = cleanfs("mount", "--busy-poll", wrong, tmp_path, tmp_path)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


ELSEWHERE = """
import pyfuse3
from cleanfs.fuse.channel import Channel
begin = Channel.begin
def begin_without_effect(self):
    begin(self)
    pyfuse3.trio = trio
Channel.begin = begin_without_effect
"""
"""Makes pyfuse3 ignore the replacement of its ``trio``."""

NO_MODULE = """
from cleanfs.fuse import channel
channel.native = None
"""
"""As ``session`` has it where the native module cannot be imported."""

NO_SESSION = """
from types import SimpleNamespace
from cleanfs.fuse import channel
channel.native = SimpleNamespace(session_fd=lambda: None)
"""
"""The native module does not see which session pyfuse3 mounts."""


@pytest.mark.parametrize("patch", [ELSEWHERE, NO_MODULE, NO_SESSION])
def test_without_the_channel_libfuse_serves_all_the_same(
    source: Path, tmp_path: Path, mount: Mounter, patch: str
) -> None:
    (source / "f").write_bytes(b"text" * 1024)
    fs = mount("--allow-other", patch=patch)
    assert (fs.path / "f").read_bytes() == b"text" * 1024
    (fs.path / "g").write_bytes(b"new")
    with (fs.path / "g").open("ab") as appended:
        appended.write(b"er")
    assert (source / "g").read_bytes() == b"newer"
    data = os.urandom(3_000_000)
    (fs.path / "big").write_bytes(data)
    fs.drop()
    assert (fs.path / "big").read_bytes() == data
    if os.geteuid() == 0:  # the kernel has them cleared itself
        os.chown(fs.path / "g", 12345, 23456)
        for code in "os.write(os.open('g', os.O_WRONLY), b'x')", "os.truncate('g', 1)":
            (fs.path / "g").chmod(0o6777)
            assert not as_user(fs.path, code)
            assert (source / "g").stat().st_mode & 0o7777 == 0o777
    (fs.path / "g").unlink()
    assert sorted(os.listdir(source)) == ["big", "f"]
    stats = fs.stats()
    assert (stats["busy_poll_polled"], stats["busy_poll_slept"]) == (0, 0)
    assert fs.log.read_text().count(LOST) == 1
    assert "the number of the connection is not known" not in fs.log.read_text()


def test_a_mount_uses_the_channel(source: Path, mount: Mounter) -> None:
    fs = mount()
    assert LOST not in fs.log.read_text()
    assert fs.stats()["busy_poll_slept"] > 0


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "cleanfs", "mount"],
        [Path(sys.executable).with_name("cleanfs"), "mount"],
        [Path(sys.executable).with_name("mount.cleanfs")],
    ],
    ids=["module", "cleanfs", "mount.cleanfs"],
)
def test_every_way_to_mount_loads_the_channel_first(
    source: Path, mountpoint: Path, tmp_path: Path, command: list[str | Path]
) -> None:
    """Loaded after pyfuse3 it would not see the session."""
    log = tmp_path / "log"
    try:
        done = subprocess.run(
            [*command, source, mountpoint, "-o", f"log_file={log}"],
            check=False,
            timeout=60,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        assert "mounted" in log.read_text()
        assert LOST not in log.read_text()
    finally:
        cleanfs("umount", mountpoint)
        unmount_by_force(mountpoint)
