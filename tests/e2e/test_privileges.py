"""Test that data changes clear capabilities and set-id bits, without a getxattr before each write."""

import os
import platform
import shutil
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter
from tests.harness.mounting import MountedFs, as_user, settle
from tests.harness.unprivileged import open_to_all

CAPABILITY = "security.capability"
NET_BIND = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)

KERNEL = tuple(int(number) for number in platform.release().split(".")[:2])

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="acting as other users needs root")

CHANGES = {
    "write": "with open('f', 'r+b', buffering=0) as f: f.write(b'new')",
    "append": "with open('f', 'ab', buffering=0) as f: f.write(b'new')",
    "O_TRUNC": "open('f', 'wb').close()",
    "truncate": "os.truncate('f', 1)",
    "ftruncate": "with open('f', 'r+b') as f: f.truncate(1)",
    "mmap": ("with open('f', 'r+b') as f:\n    m = mmap.mmap(f.fileno(), 3); m[0] = 1; m.flush()"),
}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def fs(share: Mounter) -> MountedFs:
    """Return a mount with a directory that every user can reach."""
    fs = share("--allow-other")
    open_to_all(fs.source)
    return fs


@pytest.fixture
def file(fs: MountedFs) -> Path:
    """Make a file in it."""
    path = fs.source / "f"
    path.write_bytes(b"old")
    return path


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        *((change, 0o6777, 0o777) for change in CHANGES if change != "mmap"),
        ("write", 0o2777, 0o777),
        *((change, 0o2767, 0o767) for change in CHANGES if change != "mmap"),
    ],
)
def test_a_change_by_a_user_clears_set_id_bits(
    file: Path, fs: MountedFs, change: str, before: int, after: int
) -> None:
    file.chmod(before)
    assert mode(fs.path / "f") == before
    assert as_user(fs.path, CHANGES[change]) == ""
    assert mode(file) == after
    assert mode(fs.path / "f") == after
    assert as_user(fs.path, "print(oct(os.stat('f').st_mode & 0o7777))") == oct(after)


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "mmap"])
def test_a_member_of_the_group_keeps_the_set_gid_bit(file: Path, fs: MountedFs, change: str) -> None:
    os.chown(file, 0, 34567)
    file.chmod(0o2767)
    assert as_user(fs.path, CHANGES[change], groups=(34567,)) == ""
    assert mode(file) == mode(fs.path / "f") == 0o2767


@pytest.mark.parametrize(
    ("uid", "after", "ctime_changes"),
    [(0, 0o777, True), (12345, 0o777, True), (54321, 0o6777, False)],
    ids=["root", "owner", "other"],
)
def test_a_chown_without_a_new_owner_clears_set_id_bits(
    file: Path, fs: MountedFs, uid: int, after: int, ctime_changes: bool
) -> None:
    os.chown(file, 12345, 23456)
    file.chmod(0o6777)
    before = (fs.path / "f").stat().st_ctime_ns
    settle()
    assert as_user(fs.path, "os.chown('f', -1, -1)", uid=uid) == ""
    assert mode(file) == mode(fs.path / "f") == after
    assert ((fs.path / "f").stat().st_ctime_ns > before) == ctime_changes


def test_setting_an_access_control_list_clears_the_set_gid_bit_of_a_foreign_group(
    file: Path, fs: MountedFs
) -> None:
    os.chown(file, 12345, 34567)
    entries = ((1, 7), (4, 7), (32, 5))
    minimal = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e, 0xFFFFFFFF) for e in entries)
    code = f"os.setxattr('f', 'system.posix_acl_access', {minimal!r})"
    for groups, expected in ((34567,), 0o2775), ((), 0o775):
        file.chmod(0o2775)
        assert as_user(fs.path, code, groups=groups) == ""
        assert mode(file) == mode(fs.path / "f") == expected


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_clears_capabilities(file: Path, fs: MountedFs, change: str) -> None:
    file.chmod(0o777)
    try:
        os.setxattr(fs.path / "f", CAPABILITY, NET_BIND)
    except OSError as exc:
        pytest.skip(f"no capabilities here: {exc}")
    assert os.getxattr(file, CAPABILITY) == NET_BIND
    assert as_user(fs.path, CHANGES[change]) == ""
    with pytest.raises(OSError, match="No data"):
        os.getxattr(file, CAPABILITY)
    with pytest.raises(OSError, match="No data"):
        os.getxattr(fs.path / "f", CAPABILITY)


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "mmap"])
def test_a_change_by_root_keeps_set_id_bits(file: Path, fs: MountedFs, change: str) -> None:
    file.chmod(0o6755)
    assert as_user(fs.path, CHANGES[change], uid=0, gid=0) == ""
    assert mode(file) == mode(fs.path / "f") == 0o6755


def test_reads_clear_nothing(file: Path, fs: MountedFs) -> None:
    file.chmod(0o6777)
    look = f"try: os.getxattr('f', '{CAPABILITY}')\nexcept OSError: pass\nopen('f').read()"
    assert as_user(fs.path, look) == ""
    assert mode(file) == 0o6777


def test_after_a_getxattr_by_a_user_a_change_by_root_clears_the_bits(file: Path, fs: MountedFs) -> None:
    file.chmod(0o6777)
    look = f"try: os.getxattr('f', '{CAPABILITY}')\nexcept OSError: pass"
    assert as_user(fs.path, look) == ""
    assert as_user(fs.path, look, uid=0, gid=0) == ""
    assert as_user(fs.path, CHANGES["write"], uid=0, gid=0) == ""
    assert mode(file) == mode(fs.path / "f") == 0o777


@pytest.mark.skipif(KERNEL < (5, 11), reason="the kernel sends a getxattr before each write")
def test_the_kernel_does_not_send_a_getxattr_before_each_write(
    source: Path, mount: Mounter, tmp_path: Path
) -> None:
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    (source / "f").write_bytes(b"old")
    fs = mount("--attr-timeout", "60")
    trace = tmp_path / "trace"
    command = [
        "strace",
        "-f",
        "-e",
        "trace=getxattr,fgetxattr",
        "-o",
        str(trace),
        "-p",
        str(fs.process.pid),
    ]
    with (
        (fs.path / "f").open("r+b", buffering=0) as f,
        subprocess.Popen(command, stderr=subprocess.PIPE) as st,
    ):
        assert st.stderr is not None
        assert b"attached" in st.stderr.readline()
        for _ in range(100):
            f.write(b"x")
        st.terminate()
    assert trace.read_text().count(CAPABILITY) <= 2
