"""Test sources that end, and mounts that end while the source hangs."""

import contextlib
import errno
import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.faults.site import (
    DATA,
    PAGE,
    check_alive,
    fails,
    make_directories,
    on,
    opened,
    program,
    within,
)
from tests.harness.faulty import faulty
from tests.harness.mounting import (
    MountedFs,
    cleanfs,
    end_of,
    is_mounted,
    wait_until,
)


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
