"""Test calls by a path on the mount after a change by the path in the source."""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cleanfs.linux.syscalls import AT_FDCWD
from tests.e2e.conftest import Mounter
from tests.harness.mounting import MountedFs

AT_STATX_FORCE_SYNC = 0x2000
LONG_TIMEOUT = ("--attr-timeout", "60")
libc = ctypes.CDLL(None, use_errno=True)

Call = Callable[[Path], object]


def stat_now(path: Path) -> None:
    """Make a stat that asks for attributes despite the kernel's cached ones."""
    if libc.statx(AT_FDCWD, os.fsencode(path), AT_STATX_FORCE_SYNC, 0x7FF, (ctypes.c_char * 256)()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def open_and_close(path: Path, flags: int) -> None:
    os.close(os.open(path, flags))


BY_NAME: dict[str, Call] = {
    "open to read": lambda p: open_and_close(p, os.O_RDONLY),
    "open to write": lambda p: open_and_close(p, os.O_WRONLY),
    "open to append": lambda p: open_and_close(p, os.O_WRONLY | os.O_APPEND),
    "open with O_TRUNC": lambda p: open_and_close(p, os.O_WRONLY | os.O_TRUNC),
    "truncate": lambda p: os.truncate(p, 0),
    "chmod": lambda p: os.chmod(p, 0o600),
    "chown": lambda p: os.chown(p, 1, 1),
    "setxattr": lambda p: os.setxattr(p, "user.x", b"1"),
    "removexattr": lambda p: os.removexattr(p, "user.there"),
    "link": lambda p: os.link(p, p.with_name("another")),
}

LOST: dict[str, Call] = {
    "removed": lambda p: p.unlink(),
    "moved": lambda p: p.rename(p.with_name("moved")),
    "one of two names removed": lambda p: (os.link(p, p.with_name("moved")), p.unlink()),
}


@pytest.fixture
def fs(share: Mounter) -> MountedFs:
    fs = share(*LONG_TIMEOUT)
    (fs.source / "f").write_text("text")
    os.setxattr(fs.source / "f", "user.there", b"1")
    assert (fs.path / "f").read_text() == "text"
    return fs


@pytest.mark.parametrize("call", BY_NAME.values(), ids=BY_NAME.keys())
@pytest.mark.parametrize("lose", LOST.values(), ids=LOST.keys())
def test_a_call_by_a_name_missing_in_the_source_fails(fs: MountedFs, lose: Call, call: Call) -> None:
    lose(fs.source / "f")
    with pytest.raises(FileNotFoundError):
        call(fs.path / "f")
    if (fs.source / "moved").exists():
        assert (fs.source / "moved").read_text() == "text"
        assert os.listxattr(fs.source / "moved") == ["user.there"]
        assert (fs.source / "moved").stat().st_mode & 0o777 == 0o644
        assert (fs.source / "moved").stat().st_nlink == 1


@pytest.mark.parametrize("call", BY_NAME.values(), ids=BY_NAME.keys())
def test_a_call_by_a_name_of_another_file_in_the_source_affects_that_file(
    fs: MountedFs, call: Call
) -> None:
    (fs.source / "f").rename(fs.source / "moved")
    (fs.source / "f").write_text("another")
    os.setxattr(fs.source / "f", "user.there", b"1")
    call(fs.path / "f")
    assert (fs.source / "moved").read_text() == "text"
    assert os.listxattr(fs.source / "moved") == ["user.there"]
    assert (fs.source / "moved").stat().st_mode & 0o777 == 0o644
    assert (fs.source / "moved").stat().st_nlink == 1


def test_a_write_by_the_name_of_a_removed_file_makes_a_new_file(fs: MountedFs) -> None:
    (fs.source / "f").unlink()
    (fs.path / "f").write_text("new")
    assert (fs.source / "f").read_text() == "new"


def test_a_removed_file_has_no_attributes_by_name(fs: MountedFs) -> None:
    (fs.source / "f").unlink()
    with pytest.raises(FileNotFoundError):
        stat_now(fs.path / "f")


def test_a_removed_directory_is_not_listed_by_name(mount: Mounter, source: Path) -> None:
    (source / "d").mkdir()
    fs = mount(*LONG_TIMEOUT)
    assert os.listdir(fs.path / "d") == []
    (source / "d").rmdir()
    with pytest.raises(FileNotFoundError):
        os.listdir(fs.path / "d")


def test_a_file_is_served_by_one_name_after_its_other_name_is_removed(
    mount: Mounter, source: Path
) -> None:
    (source / "f").write_text("text")
    os.link(source / "f", source / "g")
    fs = mount(*LONG_TIMEOUT)
    assert [(fs.path / name).read_text() for name in "fg"] == ["text", "text"]
    (source / "g").unlink()  # the name found last
    (fs.path / "f").write_text("new")
    assert (source / "f").read_text() == "new"


@pytest.mark.parametrize(
    "lose",
    [
        lambda fs: (fs.source / "f").unlink(),
        lambda fs: (fs.source / "f").rename(fs.source / "moved"),
        lambda fs: (fs.path / "f").unlink(),
        lambda fs: (fs.path / "f").rename(fs.path / "moved"),
    ],
    ids=["removed in the source", "moved in the source", "removed", "moved"],
)
def test_an_fd_still_works_after_any_change_of_the_name(
    fs: MountedFs, lose: Callable[[MountedFs], object]
) -> None:
    with open(fs.path / "f", "rb+", buffering=0) as file:
        lose(fs)
        fd = file.fileno()
        assert os.fstat(fd).st_size == 4
        assert os.pread(fd, 10, 0) == b"text"
        assert os.pwrite(fd, b"more text", 0) == 9
        os.ftruncate(fd, 6)
        os.fchmod(fd, 0o600)
        os.fchown(fd, 1, 1)
        os.setxattr(fd, "user.x", b"1")
        os.removexattr(fd, "user.x")
        os.utime(fd, (1, 1))
        with open(f"/proc/self/fd/{fd}", "rb+") as again:  # as by /dev/stdout
            assert again.read() == b"more t"
        os.truncate(f"/proc/self/fd/{fd}", 2)
        st = os.fstat(fd)
        assert (st.st_size, st.st_mode & 0o777, st.st_uid) == (2, 0o600, 1)


def test_a_path_fd_of_a_file_removed_on_the_mount_has_attributes(fs: MountedFs) -> None:
    fd = os.open(fs.path / "f", os.O_PATH)
    try:
        (fs.path / "f").unlink()
        assert os.fstat(fd).st_nlink == 0
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            assert file.read() == b"text"
    finally:
        os.close(fd)


def test_a_removed_directory_can_be_listed_through_an_fd(mount: Mounter, source: Path) -> None:
    (source / "d").mkdir()
    fs = mount(*LONG_TIMEOUT)
    fd = os.open(fs.path / "d", os.O_PATH)
    try:
        (fs.path / "d").rmdir()
        os.close(os.open(".", os.O_RDONLY, dir_fd=fd))
        assert os.stat(".", dir_fd=fd).st_ino
    finally:
        os.close(fd)


@pytest.mark.parametrize("second_link", [False, True])
def test_mv_of_a_file_onto_itself_fails_with_an_error(fs: MountedFs, second_link: bool) -> None:
    if second_link:
        os.link(fs.source / "f", fs.source / "g")
    done = subprocess.run(
        ["mv", fs.path / "f", fs.source / "f"], timeout=30, check=False, capture_output=True
    )
    assert done.returncode == 1
    assert b"No such file" in done.stderr
    assert not second_link or (fs.path / "g").read_text() == "text"


COPIES: dict[str, list[str]] = {
    "cp": ["cp", "{source}/f", "{mount}/f"],
    "cp -a": ["cp", "-a", "{source}/f", "{mount}/f"],
    "dd": ["dd", "if={source}/f", "of={mount}/f"],
    "python": [
        sys.executable,
        "-c",
        "import shutil, sys; shutil.move(*sys.argv[1:])",
        "{source}/f",
        "{mount}/f",
    ],
}


@pytest.mark.parametrize("command", COPIES.values(), ids=COPIES.keys())
def test_a_copy_onto_itself_is_refused_and_empties_nothing(fs: MountedFs, command: list[str]) -> None:
    arguments = [part.format(source=fs.source, mount=fs.path) for part in command]
    done = subprocess.run(arguments, timeout=30, check=False, capture_output=True)
    assert done.returncode == 1
    assert b"busy" in done.stderr
    assert (fs.source / "f").read_text() == (fs.path / "f").read_text() == "text"


def test_cp_with_force_replaces_the_file_by_a_copy(fs: MountedFs) -> None:
    subprocess.run(["cp", "-f", fs.source / "f", fs.path / "f"], timeout=30, check=True)
    assert (fs.source / "f").read_text() == (fs.path / "f").read_text() == "text"


def test_a_file_read_by_others_in_the_source_can_be_truncated(fs: MountedFs) -> None:
    with open(fs.source / "f", "rb") as file:
        reader = subprocess.Popen(["sleep", "60"], stdin=file)
    try:
        (fs.path / "f").write_text("new")
    finally:
        reader.kill()
        reader.wait()
    assert (fs.source / "f").read_text() == "new"


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_PATH])
def test_a_file_that_the_program_itself_does_not_read_there_can_be_truncated(
    fs: MountedFs, flags: int
) -> None:
    fd = os.open(fs.source / "f", flags)
    try:
        with open(fs.path / "f", "rb"):  # reads on the mount do not count
            (fs.path / "f").write_text("new")
    finally:
        os.close(fd)
    assert (fs.source / "f").read_text() == "new"


def test_another_file_can_be_copied_over_a_file(fs: MountedFs) -> None:
    (fs.source / "other").write_text("other")
    shutil.copyfile(fs.source / "other", fs.path / "f")
    assert (fs.source / "f").read_text() == "other"
    with pytest.raises(OSError, match="busy") as refused:
        shutil.copyfile(fs.source / "other", fs.path / "other")
    assert refused.value.errno == errno.EBUSY
