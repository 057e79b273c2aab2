"""Test that after a SIGKILL of the daemon its dead mount point is recognised and reused."""

import errno
import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.harness.mounting import cleanfs, is_mounted, mounted, wait_until


def test_the_next_mount_reuses_a_dead_mount_point_with_open_files(
    source: Path, mountpoint: Path
) -> None:
    (source / "f").write_bytes(b"x" * 10_000)
    with mounted(source, mountpoint) as fs:
        fd = os.open(mountpoint / "f", os.O_RDWR)
        try:
            fs.kill()
            with pytest.raises(OSError, match="Transport endpoint"):
                os.pread(fd, 1, 9_000)
            with mounted(source, mountpoint) as again:
                assert again.process.pid != fs.process.pid
                assert (mountpoint / "f").read_bytes() == b"x" * 10_000
                # The fd belongs to the dead mount for good.
                with pytest.raises(OSError, match="Transport endpoint"):
                    os.pwrite(fd, b"y", 0)
        finally:
            with suppress(OSError):  # close raises the error of flush; the fd is closed
                os.close(fd)
    assert (source / "f").read_bytes() == b"x" * 10_000


def test_a_dead_mount_point_is_recognised_while_the_kernel_still_has_its_attributes(
    source: Path, mountpoint: Path
) -> None:
    with mounted(source, mountpoint, "--attr-timeout", "60") as fs:
        os.stat(mountpoint)
        fs.kill()
        os.stat(mountpoint)
        with mounted(source, mountpoint):
            os.statvfs(mountpoint)


def test_a_mount_point_of_a_killed_background_daemon_is_reused(source: Path, mountpoint: Path) -> None:
    (source / "f").write_bytes(b"one")
    for _ in range(2):
        done = cleanfs("mount", source, mountpoint)
        try:
            assert done.returncode == 0, done.stderr
            assert (mountpoint / "f").read_bytes() == b"one"
            pid = json.loads((mountpoint / ".cleancache" / "stats.json").read_text())["pid"]
        except BaseException:
            cleanfs("umount", mountpoint)
            raise
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(mountpoint))
    done = cleanfs("umount", mountpoint)
    assert done.returncode == 0, done.stderr
    assert not is_mounted(mountpoint)


def is_alive(mountpoint: Path) -> bool:
    """Return whether a mount point is not dead."""
    try:
        os.statvfs(mountpoint)
    except OSError as exc:
        if exc.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            raise
        return False
    return True
