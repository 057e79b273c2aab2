"""Test file handles of a mount: they lead to files that the kernel has forgotten."""

import ctypes
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cleanfs.fuse.size_sync import can_open_handles, file_handle
from cleanfs.linux import syscalls
from cleanfs.linux.syscalls import AT_FDCWD, name_to_handle, open_by_handle
from cleanfs.vfs.node_ids import generation_of
from tests.e2e.conftest import SMALL_CACHES, Mounter
from tests.harness.mounting import MountedFs, mounted, wait_until
from tests.harness.unprivileged import NO_DAC_READ_SEARCH

pytestmark = pytest.mark.skipif(not can_open_handles(), reason="file handles need CAP_DAC_READ_SEARCH")

AT_HANDLE_CONNECTABLE = 0x2
MS_NOSUID, MS_NODEV, MS_REMOUNT = 2, 4, 32
libc = ctypes.CDLL(None, use_errno=True)

SIZES = {"ext4": 8, "btrfs": 120, "xfs": 310}
"""The smallest sizes that mkfs accepts, in MiB."""


def handle_of(path: Path, flags: int = 0) -> bytes:
    try:
        return name_to_handle(AT_FDCWD, flags, os.fsencode(path))
    except OSError as exc:
        if flags and exc.errno == errno.EINVAL:  # before Linux 6.13
            pytest.skip("no connectable handles")
        raise


@contextmanager
def opened(fs: MountedFs, handle: bytes, flags: int = os.O_RDONLY) -> Iterator[int]:
    top = os.open(fs.path, os.O_RDONLY)
    try:
        fd = open_by_handle(top, handle, flags)
    finally:
        os.close(top)
    try:
        yield fd
    finally:
        os.close(fd)


def is_stale(fs: MountedFs, handle: bytes) -> bool:
    try:
        with opened(fs, handle, os.O_PATH):
            return False
    except OSError as exc:
        if exc.errno != errno.ESTALE:
            raise
        return True


def content(fs: MountedFs, handle: bytes) -> str | list[str]:
    with opened(fs, handle, os.O_PATH) as fd:
        path = Path(f"/proc/self/fd/{fd}")
        if path.is_dir():
            return sorted(entry for entry in os.listdir(path))
        if path.is_symlink() and os.fstat(fd).st_mode & 0o170000 == 0o120000:
            return os.readlink("", dir_fd=fd)
        return path.read_text()


def forget(fs: MountedFs) -> None:
    """Make the kernel forget all names of the mount, and so its inodes, by a remount."""
    flags = MS_REMOUNT | MS_NOSUID | MS_NODEV
    if libc.mount(None, os.fsencode(fs.path), None, flags, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    wait_until(lambda: fs.stats()["inodes"] == 1)


@contextmanager
def file_system(fs_type: str, path: Path) -> Iterator[None]:
    """Mount a small new file system on ``path``."""
    path.mkdir(exist_ok=True)
    if fs_type == "tmpfs":
        command = ["mount", "-t", "tmpfs", "none", str(path)]
    else:
        image = path.with_suffix(".image")
        with image.open("wb") as file:
            file.truncate(SIZES[fs_type] << 20)
        maker = shutil.which(f"mkfs.{fs_type}") or pytest.skip(f"mkfs.{fs_type} is not installed")
        subprocess.run([maker, "-q", image], check=True, timeout=60, capture_output=True)
        command = ["mount", "-o", "loop", str(image), str(path)]
    done = subprocess.run(command, check=False, timeout=60, capture_output=True)
    if done.returncode:
        pytest.skip(f"no {fs_type} can be mounted: {done.stderr!r}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True, timeout=60)


@pytest.fixture(
    params=["a part of this one", "ext4", "btrfs", "xfs", "tmpfs", "a part of tmpfs"],
)
def top(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Make a source that is a whole file system or a part of one."""
    path = tmp_path / "top"
    if request.param == "a part of this one":
        path.mkdir()
        yield path
        return
    with file_system(request.param.rpartition(" ")[2], path):
        if " " in request.param:
            path /= "part"
            path.mkdir()
        yield path


def is_whole(top: Path) -> bool:
    return top.is_mount()


def fill(top: Path) -> dict[str, str | list[str]]:
    """Make some files. Return their contents."""
    (top / "d" / "e").mkdir(parents=True)
    (top / "d" / "e" / "file").write_text("deep")
    (top / "file").write_text("text")
    (top / "link").symlink_to("file")
    return {"d": ["e"], "d/e": ["file"], "d/e/file": "deep", "file": "text", "link": "file"}


@pytest.mark.parametrize("flags", [0, AT_HANDLE_CONNECTABLE], ids=["plain", "connectable"])
def test_a_handle_leads_to_its_forgotten_file(top: Path, mountpoint: Path, flags: int) -> None:
    files = fill(top)
    with mounted(top, mountpoint, *SMALL_CACHES) as fs:
        for look in (lambda: None, lambda: subprocess.run(["ls", "-lR", fs.path], check=True)):
            look()
            handles = {name: handle_of(fs.path / name, flags) for name in files}
            for name, handle in handles.items():  # each alone, then each with the others
                forget(fs)
                assert content(fs, handle) == files[name]
            forget(fs)
            for name, handle in reversed(handles.items()):
                assert content(fs, handle) == files[name]
                with opened(fs, handle, os.O_PATH) as fd:
                    assert os.fstat(fd).st_ino == (fs.path / name).lstat().st_ino
                assert handle_of(fs.path / name, flags) == handle


def test_handles_survive_a_new_mount_where_the_source_allows(top: Path, mountpoint: Path) -> None:
    files = fill(top)
    with mounted(top, mountpoint, *SMALL_CACHES) as fs:
        handles = {name: handle_of(fs.path / name) for name in files}
    with mounted(top, mountpoint, *SMALL_CACHES) as fs:
        if "tmpfs" in subprocess.check_output(["stat", "-f", "-c", "%T", top], text=True):
            assert all(is_stale(fs, handle) for handle in handles.values())
            return
        for name in ("file", "link", "d/e/file"):
            if is_whole(top):
                assert content(fs, handles[name]) == files[name]
            else:
                assert is_stale(fs, handles[name])
        for name in ("d/e", "d"):
            assert content(fs, handles[name]) == files[name]
        assert {name: handle_of(fs.path / name) for name in files} == handles


@pytest.mark.parametrize("side", ["mount", "source"])
def test_a_handle_of_a_removed_file_is_stale(top: Path, mountpoint: Path, side: str) -> None:
    files = fill(top)
    with mounted(top, mountpoint, *SMALL_CACHES) as fs:
        handles = {name: handle_of(fs.path / name) for name in files}
        forget(fs)
        at = fs.path if side == "mount" else top
        shutil.rmtree(at / "d")
        (at / "file").unlink()
        (at / "link").unlink()
        forget(fs)
        assert [name for name, handle in handles.items() if not is_stale(fs, handle)] == []


def test_the_next_file_of_a_number_has_another_handle(tmp_path: Path, mountpoint: Path) -> None:
    top = tmp_path / "top"
    with file_system("ext4", top), mounted(top, mountpoint, *SMALL_CACHES) as fs:
        for by_listing in (False, True):
            (top / "old").write_text("old")
            if by_listing:
                subprocess.run(["ls", "-l", fs.path], check=True, timeout=20)
            old, number = handle_of(fs.path / "old"), (top / "old").stat().st_ino
            forget(fs)
            (top / "old").unlink()
            for i in range(100):
                (top / "new").write_text("new")
                if (top / "new").stat().st_ino == number:
                    break
                (top / "new").rename(top / f"not it {by_listing} {i}")
            assert (top / "new").stat().st_ino == number, "ext4 reuses the lowest free number"
            assert is_stale(fs, old)
            new = handle_of(fs.path / "new")
            assert new != old
            forget(fs)
            assert (is_stale(fs, old), content(fs, new)) == (True, "new")
            (top / "new").unlink()


def test_a_file_can_be_used_through_its_handle(top: Path, mountpoint: Path) -> None:
    fill(top)
    with mounted(top, mountpoint, *SMALL_CACHES) as fs:
        handle = handle_of(fs.path / "d" / "e" / "file")
        forget(fs)
        with opened(fs, handle, os.O_RDWR) as fd:
            assert os.pread(fd, 10, 0) == b"deep"
            assert os.pwrite(fd, b"written", 0) == 7
            os.fsync(fd)
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, 3)
            assert (top / "d" / "e" / "file").read_text() == "wri"
            (fs.path / "d" / "e" / "file").rename(fs.path / "moved")
            assert os.fstat(fd).st_nlink == 1
            (fs.path / "moved").unlink()
            assert os.fstat(fd).st_nlink == 0
            assert os.pread(fd, 10, 0) == b"wri"
        assert is_stale(fs, handle)
        directory = handle_of(fs.path / "d" / "e")
        forget(fs)
        with opened(fs, directory) as fd:
            os.close(os.open("made", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
            os.mkdir("below", dir_fd=fd)
            os.rename("made", "../../made", src_dir_fd=fd, dst_dir_fd=fd)
        assert sorted(os.listdir(top)) == sorted(os.listdir(fs.path))
        assert (top / "made").is_file()
        assert os.listdir(top / "d" / "e") == ["below"]


def test_a_moved_file_is_found_if_it_can_be_shown_to_be_below_the_source(
    top: Path, mountpoint: Path
) -> None:
    files = fill(top)
    with mounted(top, mountpoint, *SMALL_CACHES) as fs:
        handles = {name: handle_of(fs.path / name) for name in files}
        forget(fs)
        (top / "file").rename(top / "d" / "moved")
        (top / "d").rename(top / "other")
        assert is_stale(fs, handles["file"]) is not is_whole(top)
        assert content(fs, handles["d/e/file"]) == "deep"
        assert content(fs, handles["d/e"]) == ["file"]
        assert content(fs, handles["d"]) == ["e", "moved"]
        (fs.path / "other" / "moved").stat()
        forget(fs)
        assert content(fs, handles["file"]) == "text"
        (fs.path / "other" / "moved").rename(fs.path / "again")
        forget(fs)
        assert content(fs, handles["file"]) == "text"


@pytest.mark.parametrize("in_tmpfs", [False, True])
def test_no_handle_leads_outside_the_source(tmp_path: Path, mountpoint: Path, in_tmpfs: bool) -> None:
    top = tmp_path / "top"
    with file_system("tmpfs" if in_tmpfs else "ext4", top):
        source, outside = top / "source", top / "outside"
        for each in (source, outside):
            each.mkdir()
            (each / "dir").mkdir()
            (each / "file").write_text("text")
        with mounted(source, mountpoint, *SMALL_CACHES) as fs:
            inside = [handle_of(fs.path / name) for name in ("file", "dir")]
            for path in (top, outside, outside / "dir", outside / "file"):
                made = generation_of(name_to_handle(AT_FDCWD, 0, os.fsencode(path)))
                assert is_stale(fs, file_handle(path.stat().st_ino, made))
            forget(fs)
            assert content(fs, inside[0]) == "text"
            forget(fs)
            (source / "file").rename(outside / "moved")
            (source / "dir").rename(outside / "moved dir")
            assert [is_stale(fs, handle) for handle in inside] == [True, True]


def test_a_directory_that_left_the_source_has_no_parent(tmp_path: Path, mountpoint: Path) -> None:
    source, outside = tmp_path / "source", tmp_path / "outside"
    (source / "d" / "e").mkdir(parents=True)
    outside.mkdir()
    with mounted(source, mountpoint, *SMALL_CACHES) as fs:
        handle = handle_of(fs.path / "d" / "e")
        forget(fs)
        (source / "d").rename(outside / "d")
        assert is_stale(fs, handle)


def test_file_systems_below_the_source_have_handles(mount: Mounter, source: Path) -> None:
    (source / "tmpfs").mkdir()
    (source / "file").write_text("text")
    with file_system("ext4", source / "inner"), file_system("tmpfs", source / "tmpfs"):
        names = {"inner": fill(source / "inner"), "tmpfs": fill(source / "tmpfs")}
        fs = mount()
        found = {
            handle_of(fs.path / top / name): files[name]
            for top, files in names.items()
            for name in files
        }
        for handle, expected in found.items():
            forget(fs)
            assert content(fs, handle) == expected
        forget(fs)
        for top in names:
            fd = os.open(fs.path / top / "d", os.O_RDONLY)
            try:
                forgotten_parent = os.stat("..", dir_fd=fd)
                assert forgotten_parent.st_ino == (fs.path / top).stat().st_ino
            finally:
                os.close(fd)


def test_the_mounts_root_keeps_its_number(mount: Mounter, source: Path) -> None:
    (source / "d").mkdir()
    fs = mount()
    number = fs.path.stat().st_ino
    handle = handle_of(fs.path / "d")
    forget(fs)
    with opened(fs, handle) as fd:
        assert os.stat("..", dir_fd=fd).st_ino == number == source.stat().st_ino
        assert os.readlink(f"/proc/self/fd/{fd}") == str(fs.path / "d")


def test_unused_numbers_are_stale(mount: Mounter, source: Path) -> None:
    (source / "file").write_text("text")
    fs = mount()
    for node in (
        2,
        12,
        1 << 32,
        1 << 47,
        (1 << 48) + 12,
        1 << 62,
        (1 << 63) + 999,
        3 << 62,
        (1 << 64) - 1,
    ):
        for number in (0, 1, 0xFFFFFFFF):
            assert is_stale(fs, file_handle(node, number))
    assert (fs.path / "file").read_text() == "text"


def test_control_files_have_handles(mount: Mounter) -> None:
    fs = mount()
    handle = handle_of(fs.control("puts"))
    forget(fs)
    with opened(fs, handle) as fd:
        assert os.read(fd, 100) == b"0\n"


def test_the_number_of_remembered_inodes_is_bounded(tmp_path: Path, mountpoint: Path) -> None:
    top = tmp_path / "top"
    with file_system("tmpfs", top):
        for i in range(8):
            (top / f"{i}").write_text(f"{i}")
        patch = "from cleanfs.vfs import export; export.MAX_FORGOTTEN = 4"
        with mounted(top, mountpoint, *SMALL_CACHES, patch=patch) as fs:
            handles = [handle_of(fs.path / f"{i}") for i in range(8)]
            forget(fs)
            found = [handle for handle in handles if not is_stale(fs, handle)]
            assert len(found) == 4


def test_a_daemon_without_the_privilege_cannot_open_handles(mount: Mounter, source: Path) -> None:
    (source / "file").write_text("text")
    fs = mount(prefix=NO_DAC_READ_SEARCH)
    handle = handle_of(fs.path / "file")
    assert content(fs, handle) == "text"  # while the kernel has the inode
    forget(fs)
    assert is_stale(fs, handle)
    assert (fs.path / "file").read_text() == "text"
    assert syscalls.name_to_handle(AT_FDCWD, 0, os.fsencode(fs.path / "file"))
