"""Test the messages for wrong calls and for calls that cannot succeed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cleanfs.linux.mounts import MountPoint
from cleanfs.mount import checks
from cleanfs.mount import mountpoint as mount_points
from cleanfs.mount.config import MountError
from tests.e2e.conftest import Mounter
from tests.harness.commands import complains
from tests.harness.mounting import MountedFs, cleanfs, mount_namespace, mounted, wait_until
from tests.harness.unprivileged import NOBODY, as_nobody, make_fuse_device, open_to_all

MOUNT_USAGE = "usage: cleanfs mount [OPTIONS] SOURCE MOUNTPOINT"

WRONG_CALLS = {
    "nothing to mount": (["mount"], "'SOURCE'", MOUNT_USAGE),
    "no mount point": (["mount", "S"], "'MOUNTPOINT'", MOUNT_USAGE),
    "too many arguments": (["mount", "S", "M", "x"], "(x)", MOUNT_USAGE),
    "nothing to unmount": (["umount"], "usage: cleanfs umount [OPTIONS] MOUNTPOINT"),
    "no mount for stats": (["stats"], "usage: cleanfs stats [OPTIONS] MOUNTPOINT"),
    "an unknown option": (["mount", "--frobnicate", "S", "M"], "cleanfs mount --help"),
    "an unknown command": (["frobnicate"], "cleanfs --help"),
    "seconds that are not a number": (
        ["mount", "--attr-timeout", "x", "S", "M"],
        "'x' is not a number of seconds from 0 to 86400",
    ),
    "no seconds": (["mount", "--attr-timeout", "", "S", "M"], "'' is not a number of seconds"),
    "too many seconds": (["mount", "--attr-timeout", "1e9", "S", "M"], "from 0 to 86400"),
    "negative microseconds": (
        ["mount", "--busy-poll", "-1", "S", "M"],
        "'-1' is not a number of microseconds from 0 to 10000",
    ),
    "an interval of nothing": (["stats", "--watch", "0", "M"], "seconds from 0.05 to 86400"),
    "zbud and poor pages": (["mount", "--allocator=zbud", "--poor=keep", "S", "M"], "--poor refuse"),
    "zbud uncompressed": (
        ["mount", "--allocator=zbud", "--compression=none", "S", "M"],
        "--compression",
    ),
    "drop_capability than zstd needs": (
        ["mount", "--compression=zstd", "--pool-limit=2M", "S", "M"],
        "4194304",
    ),
    "drop_capability than the pages need": (
        ["mount", "--page-size=1M", "--pool-limit=2M", "S", "M"],
        "4.0 MiB",
    ),
}


@pytest.mark.parametrize("case", WRONG_CALLS.values(), ids=WRONG_CALLS.keys())
def test_the_error_of_a_wrong_call_says_what_is_right(
    source: Path, mountpoint: Path, case: tuple[list[str], *tuple[str, ...]]
) -> None:
    args, *parts = case
    names = {"S": str(source), "M": str(mountpoint)}
    done = cleanfs(*(names.get(arg, arg) for arg in args))
    if "zstd" in done.stderr and "needs the native engine" in done.stderr:
        parts = []  # this error comes first
    complains(done, 2, *parts)
    assert ".." not in done.stderr


@pytest.mark.parametrize("foreground", [True, False], ids=["foreground", "background"])
def test_options_refused_by_the_backend_are_a_wrong_call(
    source: Path, mountpoint: Path, foreground: bool
) -> None:
    options = ["--compression", "zstd", "--pool-limit", "2M", *(["-f"] if foreground else [])]
    complains(cleanfs("mount", *options, source, mountpoint), 2)


@pytest.mark.parametrize("path", ["nowhere/log", "file/log", "."])
def test_a_log_that_cannot_be_written_is_named(
    source: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    done = cleanfs("mount", "--log-file", path, source, mountpoint)
    complains(done, 1, f"cannot write the log file {path}: ")
    assert ("no directory nowhere" in done.stderr) is (path == "nowhere/log")


def test_the_error_of_a_missing_mount_point_asks_for_the_directory(
    source: Path, tmp_path: Path
) -> None:
    complains(cleanfs("mount", source, tmp_path / "mnt"), 1, "mnt does not exist: make the directory")


def test_the_error_of_another_directory_refers_to_the_list(tmp_path: Path) -> None:
    for command in ("umount", "stats", "drop"):
        complains(cleanfs(command, tmp_path), 1, "not a cleanfs mount point (cleanfs list")


# -- a mount that is in use -----------------------------------------------------------------------


@contextmanager
def running(*command: str | Path, cwd: Path | None = None, stdin: Path | None = None) -> Iterator[int]:
    """Run a process that keeps a mount busy, and yield its pid."""
    with open(stdin or os.devnull, "rb") as file:
        process = subprocess.Popen(command, cwd=cwd, stdin=file)
    with process:
        try:
            name = os.path.basename(command[0])
            wait_until(lambda: Path(f"/proc/{process.pid}/comm").read_text().strip() == name)
            yield process.pid
        finally:
            process.kill()


def test_the_processes_that_keep_a_mount_busy_are_named(source: Path, mount: Mounter) -> None:
    shutil.copy("/bin/sleep", source / "slumber")
    (source / "f").write_bytes(b"text")
    fs = mount()
    with running("sleep", "100", cwd=fs.path) as pid:
        complains(
            cleanfs("umount", fs.path), 1, f"busy, in use by sleep (pid {pid}: working directory)"
        )
    with running("sleep", "100", stdin=fs.path / "f") as pid:
        complains(cleanfs("umount", fs.path), 1, f"sleep (pid {pid}: open file); --lazy detaches")
    with running(fs.path / "slumber", "100") as pid:
        complains(cleanfs("umount", fs.path), 1, f"slumber (pid {pid}: mapped file)")
    assert cleanfs("umount", fs.path).returncode == 0


def test_many_processes_that_keep_a_mount_busy_fit_on_one_line(source: Path, mount: Mounter) -> None:
    fs = mount()
    with ExitStack() as stack:
        pids = [stack.enter_context(running("sleep", "100", cwd=fs.path)) for _ in range(6)]
        complains(cleanfs("umount", fs.path), 1, f"(pid {min(pids)}: ", " and 3 more; ")


def test_a_mount_below_that_keeps_a_mount_busy_is_named(source: Path, mount: Mounter) -> None:
    (source / "d").mkdir()
    fs = mount()
    subprocess.run(["mount", "-t", "tmpfs", "none", fs.path / "d"], check=True, timeout=10)
    try:
        complains(cleanfs("umount", fs.path), 1, f"in use by the mount on {fs.path}/d")
    finally:
        subprocess.run(["umount", fs.path / "d"], check=True, timeout=10)


def test_the_processes_that_keep_a_mount_busy_are_found_without_its_daemon(
    source: Path, mount: Mounter
) -> None:
    (source / "f").write_bytes(b"text")
    fs = mount()
    with running("sleep", "100", stdin=fs.path / "f") as pid:
        fs.process.send_signal(signal.SIGSTOP)
        try:
            complains(cleanfs("umount", fs.path), 1, f"sleep (pid {pid}: open file)")
        finally:
            fs.process.send_signal(signal.SIGCONT)


# -- other users ----------------------------------------------------------------------------------


def run_as_nobody(*args: str | Path, device: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        as_nobody(*args, device=device), capture_output=True, text=True, timeout=30, check=False
    )


def test_the_owner_of_another_users_mount_is_named(
    fs_of_root: MountedFs,
) -> None:
    open_to_all(fs_of_root.path.parent)
    complains(run_as_nobody("umount", fs_of_root.path), 1, "was mounted by root: only root can unmount")
    complains(run_as_nobody("stats", fs_of_root.path), 1, "Permission denied", "--allow-other")
    listed = json.loads(run_as_nobody("list", "--json").stdout)
    shown = next(mount for mount in listed if mount["mountpoint"] == str(fs_of_root.path))
    assert (shown["state"], shown["backend"], shown["pid"]) == ("no access", None, None)


@pytest.fixture
def fs_of_root(mount: Mounter) -> MountedFs:
    return mount()


def test_a_user_without_a_name_is_shown_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    point = MountPoint(1, "/mnt", "fuse.cleanfs", "x", "rw", "rw,user_id=54321")
    monkeypatch.setattr(mount_points, "mounted_at", lambda _: point)
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    monkeypatch.setattr(os, "getuid", lambda: NOBODY)
    with pytest.raises(MountError, match="by user 54321: only user 54321 and root can unmount it"):
        mount_points.unmount("/mnt")


# -- a machine that does not allow the mount -------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOENT, "modprobe fuse"),
        (errno.ENODEV, "modprobe fuse"),
        (errno.ENXIO, "modprobe fuse"),
        (errno.EACCES, "chmod 666 /dev/fuse"),
        (errno.EPERM, "--device /dev/fuse"),
        (errno.EMFILE, "Too many open files"),
    ],
)
def test_the_error_of_a_device_that_cannot_be_opened_has_a_remedy(
    monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(MountError, match=f"^/dev/fuse: {os.strerror(number)}.*{remedy}|{remedy}$"):
        checks.check_device()


def test_the_error_of_a_device_closed_to_users_has_a_remedy(
    source: Path, mountpoint: Path, tmp_path: Path
) -> None:
    open_to_all(tmp_path)
    os.chown(mountpoint, NOBODY, NOBODY)
    device = make_fuse_device(tmp_path / "fuse", 0o600)
    done = run_as_nobody("mount", "--backend", "none", source, mountpoint, device=device)
    complains(done, 1, "/dev/fuse: Permission denied", "chmod 666 /dev/fuse")


@pytest.mark.parametrize("foreground", [True, False], ids=["foreground", "background"])
def test_the_error_of_root_without_a_capability_names_it(
    source: Path, mountpoint: Path, foreground: bool
) -> None:
    drop_capability = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    options = ["-f", "--log-level", "warning"] if foreground else []
    command = [*drop_capability, sys.executable, "-m", "cleanfs", "mount", *options]
    done = subprocess.run(
        [*command, source, mountpoint], capture_output=True, text=True, timeout=30, check=False
    )
    complains(done, 1, "lacks CAP_SYS_ADMIN", "--cap-add SYS_ADMIN")


def test_the_error_of_a_user_with_no_new_privs_names_it(
    source: Path, mountpoint: Path, tmp_path: Path
) -> None:
    open_to_all(tmp_path)
    os.chown(mountpoint, NOBODY, NOBODY)
    device = make_fuse_device(tmp_path / "fuse", 0o666)
    command = as_nobody("mount", "-f", "--log-level", "warning", source, mountpoint, device=device)
    command.insert(command.index(sys.executable), "--no-new-privs")  # for setpriv
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    complains(done, 1, "no_new_privs")


def test_the_error_without_fusermount_names_its_package(
    source: Path, mountpoint: Path, tmp_path: Path
) -> None:
    open_to_all(tmp_path)
    os.chown(mountpoint, NOBODY, NOBODY)
    device = make_fuse_device(tmp_path / "fuse", 0o666)
    command = as_nobody("mount", "-f", "--log-level", "warning", source, mountpoint, device=device)
    hide = 'mount --bind /dev/null "$(command -v fusermount3)" && exec "$@"'
    done = subprocess.run(
        [*mount_namespace(), "sh", "-c", hide, "sh", *command],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    complains(done, 1, "fusermount3", "package fuse3")


# -- the list -------------------------------------------------------------------------------------


def test_the_list_shows_live_and_dead_mounts(source: Path, mountpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with mounted(source, tmp_path / "other") as alive, mounted(source, mountpoint) as dead:
        dead.kill()
        lines = cleanfs("list").stdout.splitlines()
        assert lines[0].split() == [
            "MOUNT",
            "POINT",
            "SOURCE",
            "STATE",
            "BACKEND",
            "HIT",
            "RATIO",
            "PID",
        ]
        cells = {line.split()[0]: line.split()[1:] for line in lines[1:]}
        pid = alive.stats()["pid"]
        assert cells[str(alive.path)] == [str(source), "ok", "zcache", "0.0%", str(pid)]
        assert cells[str(dead.path)] == [str(source), "dead", "-", "-", "-"]
        complains(cleanfs("stats", dead.path), 1, "its daemon has ended, and cleanfs umount")
        found = {mount["mountpoint"]: mount for mount in json.loads(cleanfs("list", "--json").stdout)}
        assert found[str(alive.path)] == {
            "mountpoint": str(alive.path),
            "source": str(source),
            "state": "ok",
            "backend": "zcache",
            "hit_ratio": 0.0,
            "pid": pid,
        }
        assert (found[str(dead.path)]["state"], found[str(dead.path)]["pid"]) == ("dead", None)


def test_a_mount_that_does_not_reply_is_in_the_list(mount: Mounter) -> None:
    fs = mount()
    fs.process.send_signal(signal.SIGSTOP)
    try:
        begun = time.monotonic()
        listed = json.loads(cleanfs("list", "--json").stdout)
        assert next(m for m in listed if m["mountpoint"] == str(fs.path))["state"] == "no reply"
        complains(cleanfs("stats", fs.path), 1, "does not reply", "--lazy")
        assert time.monotonic() - begun < 25
    finally:
        fs.process.send_signal(signal.SIGCONT)


def test_a_machine_without_mounts_has_an_empty_list(tmp_path: Path) -> None:
    done = cleanfs("list")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    assert json.loads(cleanfs("list", "--json").stdout) == []
