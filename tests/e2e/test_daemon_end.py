"""Test how a daemon ends, and what becomes of a mount point whose daemon is dead."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter
from tests.harness.commands import clean_up, complains
from tests.harness.machine import Deadline
from tests.harness.mounting import (
    STOP_TIMEOUT,
    cleanfs,
    end_of,
    is_mounted,
    mounted,
    wait_until,
)

ENDINGS = {
    "SIGINT": "kill -INT PID",
    "SIGTERM": "kill -TERM PID",
    "umount": "umount MNT",
    "fusermount3": "fusermount3 -u MNT",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_daemon_ends_cleanly(source: Path, mount: Mounter, ending: str) -> None:
    (source / "f").write_bytes(b"text" * 500_000)
    fs = mount()
    (fs.path / "f").read_bytes()
    script = ENDINGS[ending].replace("PID", str(fs.process.pid)).replace("MNT", f"'{fs.path}'")
    subprocess.run(["sh", "-ec", script], check=True, timeout=20)
    assert end_of(fs.process, 10) == 0
    assert not is_mounted(fs.path)
    assert "unmounted" in fs.log.read_text()
    assert os.listdir(fs.path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_repeated_signals_do_not_leave_a_dead_mount(mount: Mounter, number: int) -> None:
    fs = mount()
    deadline = Deadline(10)
    while fs.process.poll() is None:
        fs.process.send_signal(number)
        assert not deadline.over()
        time.sleep(0.001)  # lets the daemon run in between
    assert not is_mounted(fs.path)
    assert fs.process.returncode == 0
    assert "Traceback" not in fs.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_mount_that_is_in_use(source: Path, mount: Mounter, number: int) -> None:
    (source / "f").write_bytes(b"text")
    fs = mount()
    fd = os.open(fs.path / "f", os.O_RDONLY)
    try:
        fs.process.send_signal(number)
        assert end_of(fs.process, 10) == 0
        wait_until(lambda: not is_mounted(fs.path), 5)
    finally:
        with suppress(OSError):  # the daemon has ended
            os.close(fd)


def test_a_dead_mount_point_is_reused(source: Path, mountpoint: Path) -> None:
    (source / "f").write_bytes(b"text")
    with mounted(source, mountpoint) as fs:
        fs.kill()
        with pytest.raises(OSError, match="not connected"):
            os.listdir(mountpoint)
        assert "dead" in cleanfs("list").stdout
        with mounted(source, mountpoint) as again:
            assert (again.path / "f").read_bytes() == b"text"
            lines = Path("/proc/self/mountinfo").read_bytes().split()
            assert lines.count(os.fsencode(mountpoint)) == 1


def test_a_dead_mount_point_is_reused_through_a_symbolic_link(
    source: Path, mountpoint: Path, tmp_path: Path
) -> None:
    (source / "f").write_bytes(b"text")
    (tmp_path / "link").symlink_to(tmp_path)
    with mounted(source, mountpoint) as fs:
        fs.kill()
        done = cleanfs("mount", source, tmp_path / "link" / "mnt")
        try:
            assert (done.returncode, done.stderr) == (0, "")
            assert (mountpoint / "f").read_bytes() == b"text"
        finally:
            clean_up(mountpoint)


def test_a_dead_mount_point_can_be_unmounted(source: Path, mountpoint: Path) -> None:
    with mounted(source, mountpoint) as fs:
        fs.kill()
        done = cleanfs("umount", mountpoint)
        assert (done.returncode, done.stderr) == (0, "")
        assert not is_mounted(mountpoint)


def test_stats_of_a_dead_mount_is_an_error_of_one_line(source: Path, mountpoint: Path) -> None:
    with mounted(source, mountpoint) as fs:
        fs.kill()
        complains(cleanfs("stats", mountpoint), 1, "not connected")
        complains(cleanfs("drop", mountpoint), 1, "not connected")


def test_umount_does_not_wait_for_a_parent_to_reap_the_daemon(mount: Mounter) -> None:
    fs = mount()
    assert cleanfs("umount", fs.path, timeout=9).returncode == 0  # the wait would be 10 s
    assert end_of(fs.process, STOP_TIMEOUT) == 0
