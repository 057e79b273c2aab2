"""Ends of a daemon: nothing that was confirmed is lost, nothing is left (check/kill_test)."""

import errno
import logging
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

from cleanfs.fuse.interrupts import Interrupts
from cleanfs.fuse.refused_replies import RefusedReplies
from cleanfs.linux.mounts import mount_points, mounted_at
from cleanfs.source.io import Backing
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

SEED = 11
LOAD_TIMEOUT = 30.0

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="this takes root")


@contextmanager
def clients(fs: MountedFs, said: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """All kinds of clients; each has done something. Ended by force if need be."""
    said.mkdir()
    running = {}
    try:
        for kind in load.CLIENTS:
            command = [sys.executable, "-I", "-S", load.__file__, kind, str(fs.path / "load")]
            running[kind] = subprocess.Popen(
                [*command, str(said / kind), str(SEED)],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        wait_until(
            lambda: all(load.read_progress(said / kind).done > 3 for kind in running), LOAD_TIMEOUT
        )
        yield running
    finally:
        for process in running.values():
            process.kill()
        for process in running.values():
            end_of(process, LOAD_TIMEOUT)


@pytest.mark.parametrize("writeback", [False, True], ids=["through", "writeback"])
def test_what_was_confirmed_is_there_after_a_kill_and_in_the_next_mount(
    source: Path, mountpoint: Path, tmp_path: Path, writeback: bool
) -> None:
    load.make_unchanged(source / "load")
    options = ["--page-cache", "64K", "--pool-limit", "2M"]
    options += ["--coherency", "none", "--writeback"] if writeback else []
    said = tmp_path / "said"
    with mounted(source, mountpoint, *options) as fs, clients(fs, said) as running:
        fs.kill()
        wait_until(lambda: all(p.poll() is not None for p in running.values()), LOAD_TIMEOUT)
        for kind in running:
            heard = load.read_progress(said / kind)
            assert heard.error is None or "wrong data" not in heard.error
            assert load.lost(kind, source / "load", heard, SEED, writeback) is None
        # What no cache of before may answer for: the content changes, the stamps do not.
        stale = source / "load" / "unchanged" / "3"
        st = stale.stat()
        stale.write_bytes(bytes(255 - byte for byte in stale.read_bytes()))
        os.utime(stale, ns=(st.st_atime_ns, st.st_mtime_ns))
        with pytest.raises(OSError, match="Transport endpoint"):
            os.statvfs(mountpoint)  # a stat may still find the attributes in the kernel
        assert is_mounted(mountpoint)
        # The command of a user, who finds the mount point dead.
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


def test_a_lie_of_the_source_would_be_found(tmp_path: Path) -> None:
    """The checks of this module can fail."""
    load.make_unchanged(tmp_path / "load")
    said = tmp_path / "append"
    directory = str(tmp_path / "load")
    for kind in ("append", "inplace", "replace", "names", "sqlite", "mapped"):
        client = load.CLIENTS[kind](directory, SEED)
        client.begin()
        for number in range(6):
            client.turn(number)
        if isinstance(client, load.Sqlite):
            client.db.close()
        said.write_text("".join(f"a {number}\n" for number in range(6)))
        assert load.lost(kind, tmp_path / "load", load.read_progress(said), SEED) is None
        said.write_text("".join(f"a {number}\n" for number in range(8)))
        assert load.lost(kind, tmp_path / "load", load.read_progress(said), SEED) is not None


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts(source: Path, mountpoint: Path, number: int) -> None:
    with mounted(source, mountpoint) as fs:
        fs.process.send_signal(number)
        assert end_of(fs.process, 20) == 0
        assert not is_mounted(mountpoint)


def test_who_was_started_to_ignore_hangups_ignores_them(source: Path, mountpoint: Path) -> None:
    with mounted(source, mountpoint, prefix=("nohup",)) as fs:
        fs.process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert fs.stats()["pid"] == fs.process.pid


def daemon_that(patch: str, source: Path, mountpoint: Path, *options: str) -> subprocess.Popen[str]:
    """``cleanfs mount`` with something changed in it."""
    return subprocess.Popen(
        [*patched_program(patch), "mount", *options, str(source), str(mountpoint)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_signal_that_comes_before_anybody_listens_is_not_lost(source: Path, mountpoint: Path) -> None:
    patch = (
        "run = trio.run\n"
        "def late(*args):\n    os.kill(os.getpid(), signal.SIGTERM)\n    run(*args)\n"
        "trio.run = late"
    )
    with daemon_that(patch, source, mountpoint, "-f") as process:
        try:
            process.communicate(timeout=30)
            assert process.returncode == 0
        finally:
            process.kill()
    assert not is_mounted(mountpoint)


def test_a_background_daemon_that_is_killed_while_it_starts_leaves_no_mount(
    source: Path, mountpoint: Path
) -> None:
    patch = (
        "async def die(*args):\n    os.kill(os.getpid(), signal.SIGKILL)\nmount.Mount._announce = die"
    )
    with daemon_that(patch, source, mountpoint) as process:
        _, error = process.communicate(timeout=30)
        assert process.returncode == 1
        assert error == "cleanfs: the daemon died before the mount was ready\n"
    assert not is_mounted(mountpoint)


@needs_root
def test_a_daemon_that_is_killed_while_it_asks_its_own_mount_leaves_no_mount_that_hangs(
    source: Path, mountpoint: Path
) -> None:
    patch = (
        "async def ponder(*args):\n    sys.stderr.write('asked\\n')\n    await trio.sleep_forever()\n"
        "mount.CleanFS.lookup = ponder"
    )
    with daemon_that(patch, source, mountpoint, "-f") as process:
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
def test_a_mount_that_is_severed_is_cleaned_up(source: Path, mountpoint: Path, tmp_path: Path) -> None:
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


def test_a_daemon_that_is_stopped_for_a_while_goes_on(source: Path, mountpoint: Path) -> None:
    (source / "f").write_bytes(b"x" * 5000)
    with mounted(source, mountpoint) as fs:
        fs.process.send_signal(signal.SIGSTOP)
        with subprocess.Popen(["cat", str(mountpoint / "f")], stdout=subprocess.PIPE) as cat:
            time.sleep(0.1)
            assert cat.poll() is None
            fs.process.send_signal(signal.SIGCONT)
            output, _ = cat.communicate(timeout=20)
        assert output == b"x" * 5000


def test_commands_do_not_wait_for_a_daemon_that_is_stopped(source: Path, mountpoint: Path) -> None:
    with mounted(source, mountpoint) as fs, ThreadPoolExecutor(2) as commands:
        fs.process.send_signal(signal.SIGSTOP)
        time.sleep(1.1)  # the kernel would have to ask whether the mount point is a directory still
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
            # A few tests list all mounts, this one too: they keep it busy until they give up.
            wait_until(lambda: cleanfs("umount", mountpoint).returncode == 0, LOAD_TIMEOUT)
            assert not is_mounted(mountpoint)
        finally:
            fs.process.send_signal(signal.SIGCONT)
        end_of(fs.process, 20)


async def test_however_the_kernel_says_that_the_mount_has_gone_it_is_the_end(
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


def test_an_answer_that_nobody_waits_for_is_not_logged() -> None:
    def record(message: str, *args: object) -> logging.LogRecord:
        return logging.LogRecord("pyfuse3", logging.ERROR, "", 0, message, args, None)

    logged = Interrupts(Backing(), RefusedReplies()).filter
    refused = "fuse_write(): fuse_reply_* failed with %s"
    assert not logged(record(refused, "No such file or directory"))
    assert logged(record(refused, "Invalid argument"))
    assert logged(record("No such file or directory"))


@needs_root
def test_a_carriage_return_in_somebodys_mount_point_ends_no_line(tmp_path: Path) -> None:
    odd = tmp_path / "a\rb\x0cc"
    odd.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "x\ry", str(odd)], check=True, timeout=10)
    try:
        assert str(odd) in [point.path for point in mount_points()]
    finally:
        subprocess.run(["umount", str(odd)], check=True, timeout=10)
