"""Test which options a mount takes from whom, and whom an ordinary user's mount lets in."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from cleanfs.cli.commands import cli
from tests.e2e.conftest import Mounter
from tests.harness.mounting import (
    as_user,
    end_of,
    killed_after,
    mount_line,
    wait_until,
)
from tests.harness.unprivileged import NOBODY, as_nobody, make_fuse_device, open_to_all

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="acting as other users needs root")

UID, GID, EXTRA = 12345, 23456, 34567
"""A user; fusermount3 needs the user name."""

# -- mount options --------------------------------------------------------------------------------

INJECTED = [
    "allow_root", "max_read=4096", "fd=3", "rootmode=40000", "user_id=0", "group_id=0",
    "subtype=x", "nodefault_permissions", "no_default_permissions", "blkdev", "source=/",
    "mountpoint=/", "help", "suid=1", "dev=1\\,suid", "ro\nsuid",
    "drop_privileges", "clone_fd", "foreground=0", "allow_other=0",
]  # fmt: skip


@pytest.mark.parametrize("option", INJECTED)
def test_an_unknown_mount_option_is_refused(tmp_path: Path, option: str) -> None:
    nowhere = str(tmp_path / "nowhere")  # so that no call can mount
    assert CliRunner().invoke(cli, ["mount", "-o", option, nowhere, nowhere]).exit_code == 2
    assert CliRunner().invoke(cli, ["mount", "-o", "suid", nowhere, nowhere]).exit_code == 1


@pytest.mark.parametrize("option", ['fsname="x,suid,allow_other"', "fsname=x\\"])
def test_no_option_can_be_hidden_in_another(mount: Mounter, option: str) -> None:
    fs = mount("-o", option)
    line = mount_line(fs.path)
    assert line is not None
    assert line.split(" ")[-2] == option.removeprefix("fsname=").replace("\\", "\\134")
    assert {"nosuid", "nodev"} <= options_of(fs.path)
    assert "allow_other" not in options_of(fs.path)


def options_of(mountpoint: Path, proc: Path = Path("/proc/self")) -> set[str]:
    line = mount_line(mountpoint, proc)
    assert line is not None
    before, after = line.split(" - ")
    return {*before.split(" ")[5].split(","), *after.split(" ")[-1].split(",")}


SET_UID_PROBE = """
os.setresuid(12345, 12345, 12345)
try:
    print(os.popen('./id -u').read().strip())
    os.close(os.open('zero', os.O_RDONLY)); print('opened')
except OSError as exc:
    print(errno.errorcode[exc.errno])
"""


def furnish_with_privileges(source: Path) -> None:
    for parent in (*source.parents[:3], source):
        parent.chmod(parent.stat().st_mode | 0o011)
    source.chmod(0o755)
    shutil.copy("/usr/bin/id", source / "id")
    (source / "id").chmod(0o4755)
    os.mknod(source / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    (source / "zero").chmod(0o666)


def test_set_uid_programs_and_devices_have_no_effect_by_default(source: Path, mount: Mounter) -> None:
    furnish_with_privileges(source)
    fs = mount("--allow-other", "-o", "exec,default_permissions,rw,user,users,owner")
    assert {"nosuid", "nodev", "default_permissions", "user_id=0"} <= options_of(fs.path)
    assert as_user(fs.path, SET_UID_PROBE, uid=0).split() == ["12345", "EACCES"]
    assert stat.S_IMODE((fs.path / "id").stat().st_mode) == 0o4755


def test_root_can_allow_set_uid_programs_and_devices(source: Path, mount: Mounter) -> None:
    furnish_with_privileges(source)
    fs = mount("--allow-other", "-o", "suid,dev")
    assert not {"nosuid", "nodev"} & options_of(fs.path)
    assert as_user(fs.path, SET_UID_PROBE, uid=0).split() == ["0", "opened"]


# -- an ordinary user's mount ---------------------------------------------------------------------


@contextmanager
def mounted_by_user(source: Path, mountpoint: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Mount as an unprivileged user, in a mount namespace in which every user may open /dev/fuse.

    The mount is visible below /proc/PID/root.
    """
    device = make_fuse_device(mountpoint.with_name("fuse"), 0o666)
    command = as_nobody("mount", "-f", *options, "--", source, mountpoint, device=device)
    log = mountpoint.with_name("log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    with killed_after(60, process.pid):
        try:
            wait_until(lambda: "mounted" in log.read_text() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield process
        finally:
            process.terminate()
            end_of(process, 20)


def test_a_users_mount_goes_without_the_kernels_evictions(tmp_path: Path) -> None:
    if not shutil.which("fusermount3"):
        pytest.skip("fusermount3 is not installed")
    open_to_all(tmp_path)
    source, mountpoint = tmp_path / "source", tmp_path / "mnt"
    for path in (source, mountpoint):
        path.mkdir()
        path.chmod(0o777)
    with mounted_by_user(source, mountpoint):
        log = (tmp_path / "log").read_text()
    assert "evictions of the kernel are not used: " in log
    assert "Traceback" not in log


def test_a_users_mount_is_closed_to_all_others(tmp_path: Path) -> None:
    if not shutil.which("fusermount3"):
        pytest.skip("fusermount3 is not installed")
    open_to_all(tmp_path)
    source, mountpoint = tmp_path / "s,allow_other,user_id=0\\,suid", tmp_path / "mnt"
    for path in (source, mountpoint):
        path.mkdir()
        os.chown(path, NOBODY, NOBODY)
    (source / "f").write_text("content")
    os.chown(source / "f", NOBODY, NOBODY)
    (source / "roots").write_text("root's")
    with mounted_by_user(source, mountpoint, "--backend", "none") as process:
        proc = Path(f"/proc/{process.pid}")
        there = proc / "root" / mountpoint.parent.relative_to("/")
        options = options_of(mountpoint, proc)
        assert {"nosuid", "nodev", "default_permissions", f"user_id={NOBODY}"} <= options
        assert not {"allow_other", "suid", "dev", "user_id=0"} & options
        with pytest.raises(PermissionError):  # even for root
            os.listdir(there / mountpoint.name)
        assert as_user(there, "os.listdir('mnt')", uid=UID) == "EACCES"
        # The daemon is unprivileged and not dumpable, and still uses /proc/self/fd.
        code = (
            "os.chdir('mnt')\n"
            "with open('f', 'r+') as f: f.write('CON'); f.truncate(6)\n"
            "os.chmod('f', 0o640); os.link('f', 'g'); os.mkdir('d', 0o700); os.utime('g')\n"
            "os.setxattr('f', 'user.x', b'1')\n"
            "print(open('f').read(), sorted(os.listdir()), os.listxattr('f'))\n"
            "for call in (lambda: os.chown('f', 0, 0), lambda: os.chown('roots', 65534, -1),\n"
            "             lambda: os.open('roots', os.O_WRONLY), lambda: os.chmod('roots', 0o777)):\n"
            "    try: call()\n    except OSError as exc: print(errno.errorcode[exc.errno])"
        )
        output = as_user(there, code, uid=NOBODY, gid=NOBODY).splitlines()
        assert output == [
            "CONten ['d', 'f', 'g', 'roots'] ['user.x']", "EPERM", "EPERM", "EACCES", "EPERM",
        ]  # fmt: skip
        memory = f"os.open('/proc/{process.pid}/mem', os.O_RDONLY)"
        assert as_user(Path("/"), memory, uid=NOBODY, gid=NOBODY) == "EACCES"
    assert os.stat(source / "d")[4:6] == (NOBODY, NOBODY)


def as_owner(
    process: subprocess.Popen[bytes], *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run the mount helper as the user of the mount, in the mount's namespace."""
    script = (
        "import ctypes, os, sys\n"
        "import cleanfs.cli.commands, cleanfs.backends.zcache, encodings.idna, rich.console, difflib\n"
        f"fd = os.open('/proc/{process.pid}/ns/mnt', os.O_RDONLY)\n"
        f"root = os.open('/proc/{process.pid}/root', os.O_RDONLY)\n"
        "if ctypes.CDLL(None).setns(fd, 0): raise SystemExit('setns')\n"
        "os.fchdir(root); os.chroot('.'); os.chdir('/')\n"  # setns leaves a chroot
        f"os.setgroups([]); os.setresgid(*[{NOBODY}] * 3); os.setresuid(*[{NOBODY}] * 3)\n"
        "cleanfs.cli.commands.mount_helper()\n"
    )
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/", check=False)


def test_options_for_root_only_are_refused_to_users(tmp_path: Path) -> None:
    if not shutil.which("fusermount3"):
        pytest.skip("fusermount3 is not installed")
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o011)
    source, mountpoint, other = (tmp_path / name for name in ("s", "mnt", "other"))
    for path in (source, mountpoint, other):
        path.mkdir()
        os.chown(path, NOBODY, NOBODY)
    # The options that mount(8) passes on from an fstab line with "user".
    words = "rw,noexec,nosuid,nodev,strictatime,user,nofail"
    with mounted_by_user(source, mountpoint, "-o", words, "--pool-limit", "32M") as process:
        proc = Path(f"/proc/{process.pid}")
        assert {"noexec", "nosuid", "nodev"} <= options_of(mountpoint, proc)
        for word in ("suid", "dev", "allow_suid", "nosymfollow"):
            done = as_owner(process, source, other, "-o", f"rw,noexec,user,{word}")
            name = word.removeprefix("allow_")
            assert done.stderr == f"cleanfs: {name} not permitted: only root can mount with that\n"
            assert done.returncode == 1
        done = as_owner(process, source, mountpoint, "-o", "remount,rw,noexec,user,pool_limit=64M")
        assert (done.returncode, done.stderr) == (0, "")
        done = as_owner(process, source, mountpoint, "-o", "remount,ro,noexec,user,pool_limit=48M")
        assert done.returncode == 1
        assert done.stderr == "cleanfs: only root can change flags of a mount, such as ro and rw\n"
        code = "print(open('mnt/.cleancache/pool_limit').read())"
        there = proc / "root" / tmp_path.relative_to("/")
        assert as_user(there, code, uid=NOBODY, gid=NOBODY) == str(64 << 20)
