"""SIGKILL of the daemon under load: what fsync confirmed is there, and the mount point is reused."""

import errno
import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.harness.mounting import MountedFs, cleanfs, end_of, is_mounted, mounted, wait_until

CLIENTS = 3
ROUNDS = 3
CONFIRMED_BEFORE_KILL = 8
"""Confirmations of each client that a round waits for: the load is going."""

LOAD_TIMEOUT = 30.0


def block(number: int, kind: bytes) -> bytes:
    """What a client writes in its turn ``number``: never the same twice, of many lengths."""
    return (b"%s %d/" % (kind, number) * 2000)[: 500 + number * 7919 % 9000]


CLIENT = (
    f"""
import os
import sys

{inspect.getsource(block)}
"""
    r"""
# Write, fsync, rename, fsync the directory; only then say so. Ends at the first error.
directory, kind = sys.argv[1:]
path = f"{directory}/{kind}"
log = os.open(path + ".log", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
ring = os.open(path + ".ring", os.O_RDWR | os.O_CREAT, 0o644)
number = 0
while True:
    data = block(number, kind.encode())
    try:
        os.write(log, data)
        os.fsync(log)
        os.pwrite(ring, data.ljust(9500, b"."), number % 7 * 9500)
        os.fdatasync(ring)
        os.pread(ring, 9500 * 7, 0)
        new = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.write(new, data)
        os.fsync(new)
        os.close(new)
        os.rename(path + ".new", path + ".file")
        parent = os.open(directory, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)
    except OSError as exc:
        os.write(1, b"error %d\n" % exc.errno)
        break
    os.write(1, b"%d\n" % number)
    number += 1
"""
)


@contextmanager
def clients(directory: Path, outputs: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run the load; ended by force if need be."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(CLIENTS):
            with (outputs / f"client{number}").open("wb") as output:
                command = [sys.executable, "-c", CLIENT, str(directory), f"client{number}"]
                running.append(subprocess.Popen(command, stdout=output, stdin=subprocess.DEVNULL))
        yield running
    finally:
        for process in running:
            process.kill()
        for process in running:
            end_of(process, LOAD_TIMEOUT)


def confirmed(outputs: Path, number: int) -> int:
    """Turns that a client has confirmed."""
    return (outputs / f"client{number}").read_bytes().count(b"\n")


@contextmanager
def loaded(source: Path, mountpoint: Path, outputs: Path, fs: MountedFs) -> Iterator[None]:
    """Load the mount, kill its daemon in the middle, and let the clients notice."""
    source, mountpoint = source / "load", mountpoint / "load"
    source.mkdir()
    outputs.mkdir()
    with clients(mountpoint, outputs) as running:

        def going() -> bool:
            assert all(process.poll() is None for process in running), "a client failed by itself"
            return min(confirmed(outputs, n) for n in range(CLIENTS)) >= CONFIRMED_BEFORE_KILL

        wait_until(going, LOAD_TIMEOUT)
        fs.kill()
        for process in running:
            assert end_of(process, LOAD_TIMEOUT) == 0
    yield


def check_confirmed(source: Path, outputs: Path, number: int) -> None:
    """Everything that a client was told is in the source."""
    kind = f"client{number}"
    *told, last = (outputs / kind).read_text().split("\n")[:-1]
    assert last in (f"error {errno.ENOTCONN}", f"error {errno.ECONNABORTED}")
    assert told == [str(turn) for turn in range(len(told))]
    assert len(told) >= CONFIRMED_BEFORE_KILL
    blocks = [block(turn, kind.encode()) for turn in range(len(told) + 1)]
    *done, begun = blocks

    # One turn more than was confirmed may have been begun, and any part of it done.
    log = (source / f"{kind}.log").read_bytes()
    assert log.startswith(b"".join(done)), "confirmed appends are lost"
    assert b"".join(blocks).startswith(log), "the log has what nobody wrote"

    ring = (source / f"{kind}.ring").read_bytes()
    for turn in range(max(0, len(done) - 6), len(done)):
        at = turn % 7 * 9500
        assert ring[at : at + 9500] == done[turn].ljust(9500, b"."), "a confirmed write is lost"

    assert (source / f"{kind}.file").read_bytes() in (done[-1], begun), "a confirmed rename is lost"


def test_no_byte_that_fsync_confirmed_is_lost_with_the_daemon(
    source: Path, mountpoint: Path, tmp_path: Path
) -> None:
    for turn in range(ROUNDS):
        outputs = tmp_path / f"round{turn}"
        # A page cache of three pages has the load's reads go round through zcache meanwhile.
        with (
            mounted(source, mountpoint, "--page-cache", "14K", "--pool-limit", "1M") as fs,
            loaded(source, mountpoint, outputs, fs),
        ):
            for number in range(CLIENTS):
                check_confirmed(source / "load", outputs, number)
            with pytest.raises(OSError, match="Transport endpoint") as raised:
                os.statvfs(mountpoint)  # stat may still have the answer in the kernel
            assert raised.value.errno == errno.ENOTCONN
            assert is_mounted(mountpoint)

            # The command of a user, who finds the mount point dead.
            done = cleanfs("mount", source, mountpoint)
            try:
                assert done.returncode == 0, done.stderr
                for number in range(CLIENTS):
                    check_confirmed(mountpoint / "load", outputs, number)
                (mountpoint / "load" / "after").write_bytes(b"alive")
                assert (source / "load" / "after").read_bytes() == b"alive"
            finally:
                undone = cleanfs("umount", mountpoint)
            assert undone.returncode == 0, undone.stderr
            assert not is_mounted(mountpoint)
        for path in (source / "load").iterdir():
            path.unlink()
        (source / "load").rmdir()


def test_the_next_mount_reuses_a_mount_point_that_died_with_files_open(
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
                # What was open before belongs to the dead mount for good.
                with pytest.raises(OSError, match="Transport endpoint"):
                    os.pwrite(fd, b"y", 0)
        finally:
            with suppress(OSError):  # close has the error of flush; the descriptor is gone
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


def test_a_daemon_in_the_background_that_is_killed_leaves_a_mount_point_that_is_reused(
    source: Path, mountpoint: Path
) -> None:
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
        wait_until(lambda: not answers(mountpoint))
    done = cleanfs("umount", mountpoint)
    assert done.returncode == 0, done.stderr
    assert not is_mounted(mountpoint)


def answers(mountpoint: Path) -> bool:
    """Whether a mount point is not dead."""
    try:
        os.statvfs(mountpoint)
    except OSError as exc:
        if exc.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            raise
        return False
    return True
