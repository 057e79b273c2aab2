"""Test the end of a daemon: no confirmed change is lost, and nothing is left (check/kill_test)."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pyfuse3
import pytest

from cleanfs.linux.mounts import mount_points, mounted_at
from tests.harness import load
from tests.harness.mounting import (
    MountedFs,
    cleanfs,
    end_of,
    is_mounted,
    mounted,
    patched_program,
    unmount_by_force,
    wait_until,
)
from tests.harness.uring import with_device

SEED = 11
LOAD_TIMEOUT = 30.0

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="this takes root")


@contextmanager
def clients(fs: MountedFs, reports: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Run clients of all kinds, wait for the first turns of each, and kill them after the block."""
    reports.mkdir()
    running = {}
    try:
        for kind in load.CLIENTS:
            command = [sys.executable, "-I", "-S", load.__file__, kind, str(fs.path / "load")]
            running[kind] = subprocess.Popen(
                [*command, str(reports / kind), str(SEED)],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        wait_until(
            lambda: all(load.read_progress(reports / kind).done > 3 for kind in running), LOAD_TIMEOUT
        )
        yield running
    finally:
        for process in running.values():
            process.kill()
        for process in running.values():
            end_of(process, LOAD_TIMEOUT)


@pytest.mark.parametrize("writeback", [False, True], ids=["through", "writeback"])
def test_confirmed_changes_survive_a_kill_and_are_in_the_next_mount(
    source: Path, mountpoint: Path, tmp_path: Path, writeback: bool
) -> None:
    load.make_unchanged(source / "load")
    options = ["--page-cache", "64K", "--pool-limit", "2M"]
    options += ["--coherency", "none", "--writeback"] if writeback else []
    reports = tmp_path / "reports"
    with mounted(source, mountpoint, *options) as fs, clients(fs, reports) as running:
        fs.kill()
        wait_until(lambda: all(p.poll() is not None for p in running.values()), LOAD_TIMEOUT)
        for kind in running:
            progress = load.read_progress(reports / kind)
            assert progress.error is None or "wrong data" not in progress.error
            assert load.lost(kind, source / "load", progress, SEED, writeback) is None
        # No old cache may serve this file: its content changes, its stamps do not.
        stale = source / "load" / "unchanged" / "3"
        st = stale.stat()
        stale.write_bytes(bytes(255 - byte for byte in stale.read_bytes()))
        os.utime(stale, ns=(st.st_atime_ns, st.st_mtime_ns))
        with pytest.raises(OSError, match="Transport endpoint"):
            os.statvfs(mountpoint)  # a stat may still find the attributes in the kernel
        assert is_mounted(mountpoint)
        # A user who finds the mount point dead mounts again.
        done = cleanfs("mount", *options, source, mountpoint)
        try:
            assert done.returncode == 0, done.stderr
            for path in source.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    assert (mountpoint / path.relative_to(source)).read_bytes() == path.read_bytes()
            with (mountpoint / "after").open("wb") as file:
                file.write(b"alive")
                file.flush()
                os.fsync(file.fileno())
            assert (source / "after").read_bytes() == b"alive"
        finally:
            undone = cleanfs("umount", mountpoint)
        assert undone.returncode == 0, undone.stderr
        assert not is_mounted(mountpoint)


def test_losses_are_found(tmp_path: Path) -> None:
    """The checks of this module report a loss."""
    load.make_unchanged(tmp_path / "load")
    reports = tmp_path / "append"
    directory = str(tmp_path / "load")
    for kind in ("append", "inplace", "replace", "names", "sqlite", "mapped"):
        client = load.CLIENTS[kind](directory, SEED)
        client.begin()
        for number in range(6):
            client.turn(number)
        if isinstance(client, load.Sqlite):
            client.db.close()
        reports.write_text("".join(f"a {number}\n" for number in range(6)))
        assert load.lost(kind, tmp_path / "load", load.read_progress(reports), SEED) is None
        reports.write_text("".join(f"a {number}\n" for number in range(8)))
        assert load.lost(kind, tmp_path / "load", load.read_progress(reports), SEED) is not None


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts(source: Path, mountpoint: Path, number: int) -> None:
    with mounted(source, mountpoint) as fs:
        fs.process.send_signal(number)
        assert end_of(fs.process, 20) == 0
        assert not is_mounted(mountpoint)


def test_a_daemon_started_by_nohup_ignores_hangups(source: Path, mountpoint: Path) -> None:
    with mounted(source, mountpoint, prefix=("nohup",)) as fs:
        fs.process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert fs.stats()["pid"] == fs.process.pid


def patched_daemon(patch: str, source: Path, mountpoint: Path, *options: str) -> subprocess.Popen[str]:
    """Start ``cleanfs mount`` with a patch."""
    return subprocess.Popen(
        [*patched_program(patch), "mount", *options, str(source), str(mountpoint)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_signal_before_the_handler_is_installed_is_not_lost(source: Path, mountpoint: Path) -> None:
    patch = (
        "run = trio.run\n"
        "def late(*args):\n    os.kill(os.getpid(), signal.SIGTERM)\n    run(*args)\n"
        "trio.run = late"
    )
    with patched_daemon(patch, source, mountpoint, "-f") as process:
        try:
            process.communicate(timeout=30)
            assert process.returncode == 0
        finally:
            process.kill()
    assert not is_mounted(mountpoint)


def test_a_background_daemon_killed_at_its_start_leaves_no_mount(
    source: Path, mountpoint: Path
) -> None:
    patch = (
        "async def die(*args):\n    os.kill(os.getpid(), signal.SIGKILL)\nmount.Mount._announce = die"
    )
    with patched_daemon(patch, source, mountpoint) as process:
        _, error = process.communicate(timeout=30)
        assert process.returncode == 1
        assert error == "cleanfs: the daemon died before the mount was ready\n"
    assert not is_mounted(mountpoint)


@needs_root
def test_a_daemon_killed_during_a_call_on_its_own_mount_leaves_no_hanging_mount(
    source: Path, mountpoint: Path
) -> None:
    patch = (
        "async def hang(*args):\n    sys.stderr.write('asked\\n')\n    await trio.sleep_forever()\n"
        "mount.CleanFS.lookup = hang"
    )
    with patched_daemon(patch, source, mountpoint, "-f") as process:
        try:
            assert process.stderr is not None
            assert "asked\n" in iter(process.stderr.readline, "")
            process.kill()
            end_of(process, 10)
            with pytest.raises(OSError, match="not connected"):
                (mountpoint / "x").lstat()
        finally:
            unmount_by_force(mountpoint)


@needs_root
def test_an_aborted_mount_is_cleaned_up(source: Path, mountpoint: Path, tmp_path: Path) -> None:
    (source / "f").write_bytes(b"x")
    fusectl = tmp_path / "fusectl"
    fusectl.mkdir()
    with mounted(source, mountpoint) as fs, (mountpoint / "f").open("rb"):
        point = mounted_at(str(mountpoint))
        assert point is not None
        subprocess.run(["mount", "-t", "fusectl", "none", str(fusectl)], check=True, timeout=10)
        try:
            (fusectl / str(os.minor(point.device)) / "abort").write_text("1")
        finally:
            subprocess.run(["umount", "-l", str(fusectl)], check=True, timeout=10)
        assert end_of(fs.process, 20) == 0
        assert not is_mounted(mountpoint)


@needs_root
def test_a_forced_unmount_of_a_busy_mount_ends_it(source: Path, mountpoint: Path) -> None:
    (source / "f").write_bytes(b"x")
    with mounted(source, mountpoint) as fs, (mountpoint / "f").open("rb"):
        command = ["umount", "-f", str(mountpoint)]
        subprocess.run(command, check=False, timeout=20, capture_output=True)
        assert end_of(fs.process, 20) == 0
        assert not is_mounted(mountpoint)


def test_a_daemon_stopped_for_a_while_continues(source: Path, mountpoint: Path) -> None:
    (source / "f").write_bytes(b"x" * 5000)
    with mounted(source, mountpoint) as fs:
        fs.process.send_signal(signal.SIGSTOP)
        with subprocess.Popen(["cat", str(mountpoint / "f")], stdout=subprocess.PIPE) as cat:
            time.sleep(0.1)
            assert cat.poll() is None
            fs.process.send_signal(signal.SIGCONT)
            output, _ = cat.communicate(timeout=20)
        assert output == b"x" * 5000


@with_device  # a request in a queue waits for a stopped daemon, even if its requester is killed
def test_commands_do_not_wait_for_a_stopped_daemon(source: Path, mountpoint: Path) -> None:
    with mounted(source, mountpoint) as fs, ThreadPoolExecutor(2) as commands:
        fs.process.send_signal(signal.SIGSTOP)
        time.sleep(1.1)  # the kernel's attributes of the mount point have expired
        try:
            again = cleanfs("mount", source, mountpoint)
            assert again.returncode == 1
            assert "already a mount" in again.stderr
            listed, shown = commands.map(
                lambda words: cleanfs(*words), (("list",), ("stats", mountpoint))
            )
            assert re.search(rf"{mountpoint} .*no reply", listed.stdout), listed.stdout
            assert shown.returncode == 1
            assert shown.stderr.count("\n") == 1
            assert "does not reply" in shown.stderr
            # Some other tests list all mounts and keep this one busy until they time out.
            wait_until(lambda: cleanfs("umount", mountpoint).returncode == 0, LOAD_TIMEOUT)
            assert not is_mounted(mountpoint)
        finally:
            fs.process.send_signal(signal.SIGCONT)
        end_of(fs.process, 20)


async def test_an_aborted_connection_ends_the_session_without_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cleanfs.mount import mount

    async def main(**_: object) -> None:
        number = errno.ECONNABORTED
        raise ExceptionGroup("session", [ConnectionAbortedError(number, os.strerror(number))])

    monkeypatch.setattr(pyfuse3, "main", main)
    await mount.serve_until_the_end()

    async def other(**_: object) -> None:
        raise ExceptionGroup("session", [OSError(errno.EIO, "")])

    monkeypatch.setattr(pyfuse3, "main", other)
    with pytest.raises(ExceptionGroup):
        await mount.serve_until_the_end()


@needs_root
def test_a_carriage_return_in_a_mount_point_does_not_end_a_line_of_mountinfo(tmp_path: Path) -> None:
    odd = tmp_path / "a\rb\x0cc"
    odd.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "x\ry", str(odd)], check=True, timeout=10)
    try:
        assert str(odd) in [point.path for point in mount_points()]
    finally:
        subprocess.run(["umount", str(odd)], check=True, timeout=10)
