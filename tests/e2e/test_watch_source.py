"""Test ``--coherency watch``: changes in the source are seen through the mount without a new open.

The attribute timeout is a minute, so that no change is seen by a refresh of the kernel's.
"""

import contextlib
import mmap
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cleanfs.linux import syscalls
from cleanfs.vfs.open_files import LOOK_SECONDS
from tests.e2e.conftest import SMALL_CACHES, Mounter
from tests.harness.mounting import MountedFs, cleanfs, mount_namespace, mounted, wait_until
from tests.harness.source_calls import CONTENTS, SIZE, held

SEEN_WITHIN = 15.0
"""The limit in seconds on a busy machine; a tenth of a second is usual."""

WATCH = ("--coherency", "watch", "--attr-timeout", "60")

UNPRIVILEGED = ("setpriv", "--bounding-set=-dac_read_search", "--inh-caps=-dac_read_search")
"""Runs a daemon that may not open files by handle, and so watches inodes one by one."""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
)


def noise(seed: int = 0, size: int = SIZE) -> bytes:
    return random.Random(seed).randbytes(size)


@dataclass(frozen=True)
class Spot:
    """Holds a directory for a test, in the source and through the mount."""

    fs: MountedFs
    source: Path
    path: Path

    def same_tree(self) -> bool:
        """Return whether names, types, sizes, modes and owners match the source."""
        return _tree(self.path) == _tree(self.source)


def _tree(top: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(top.iterdir()):
        st = path.lstat()
        size = 0 if path.is_dir() else st.st_size
        found[path.name] = (st.st_mode, st.st_uid, st.st_nlink, size, st.st_mtime_ns, st.st_ctime_ns)
    return found


@pytest.fixture(scope="module", params=["filesystem", "inode"])
def watched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MountedFs]:
    """Provide one mount for each kind of watch."""
    top = tmp_path_factory.mktemp(request.param)
    for name in ("source", "mnt"):
        (top / name).mkdir()
    prefix = UNPRIVILEGED if request.param == "inode" else ()
    with mounted(top / "source", top / "mnt", *SMALL_CACHES, *WATCH, prefix=prefix) as fs:
        assert fs.stats()["watcher"] == f"fanotify-{request.param}"
        yield fs


@pytest.fixture
def spot(watched: MountedFs) -> Spot:
    number = len(list(watched.source.iterdir()))
    made = Spot(watched, watched.source / str(number), watched.path / str(number))
    made.source.mkdir()
    (made.source / "f").write_bytes(noise())
    (made.source / "other").write_bytes(noise(1))
    return made


# -- each call --------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CONTENTS)
def test_a_change_of_the_contents_is_seen_through_an_open_file(spot: Spot, call: str) -> None:
    with held(spot.path / "f") as reader, held(spot.source / "f", os.O_RDWR) as writer:
        assert os.pread(reader, SIZE, 0) == noise()
        with mmap.mmap(reader, 8192, prot=mmap.PROT_READ) as area:
            assert area[:] == noise()[:8192]
            before = os.fstat(writer)
            CONTENTS[call](spot.source, writer)
            if call not in ("mmap", "io_submit"):  # these cause no event: mtime must show the change
                os.utime(writer, ns=(before.st_atime_ns, before.st_mtime_ns))
            expected = os.pread(writer, 2 * SIZE, 0)
            wait_until(lambda: os.pread(reader, 2 * SIZE, 0) == expected, SEEN_WITHIN)
            wait_until(lambda: os.fstat(reader).st_size == len(expected), SEEN_WITHIN)
            if len(expected) >= 8192:
                assert area[:] == expected[:8192]
    assert (spot.path / "f").read_bytes() == expected


def _set_xattr(directory: Path) -> None:
    os.setxattr(directory / "f", "user.cleanfs", b"1")


NAMES: dict[str, Callable[[Path], object]] = {
    "unlink": lambda directory: (directory / "f").unlink(),
    "rename over": lambda directory: (directory / "other").rename(directory / "f"),
    "rename away": lambda directory: (directory / "f").rename(directory / "moved"),
    "exchange": lambda directory: subprocess.run(
        ["sh", "-ec", "mv f x; mv other f; mv x other"], cwd=directory, check=True, timeout=10
    ),
    "link": lambda directory: (directory / "link").hardlink_to(directory / "f"),
    "symbolic link": lambda directory: (directory / "link").symlink_to("f"),
    "create": lambda directory: (directory / "new").write_bytes(b"new"),
    "mkdir": lambda directory: (directory / "dir").mkdir(),
    "rmdir": lambda directory: (directory / "empty").rmdir(),
    "rename a directory": lambda directory: (directory / "empty").rename(directory / "full"),
    "replace by a directory": lambda directory: ((directory / "f").unlink(), (directory / "f").mkdir()),
    "chmod": lambda directory: (directory / "f").chmod(0o640),
    "chown": lambda directory: os.chown(directory / "f", 1234, 1234),
    "chmod a directory": lambda directory: (directory / "empty").chmod(0o700),
    "utimensat": lambda directory: os.utime(directory / "f", ns=(10**18, 10**18)),
    "setxattr": _set_xattr,
}


@pytest.mark.parametrize("call", NAMES)
def test_a_change_of_names_and_attributes_is_seen(spot: Spot, call: str) -> None:
    (spot.source / "empty").mkdir()
    assert spot.same_tree()
    with held(spot.path / "f") as reader, held(spot.source / "f") as original:
        assert os.pread(reader, SIZE, 0) == noise()
        NAMES[call](spot.source)
        wait_until(spot.same_tree, SEEN_WITHIN)
        assert os.pread(reader, SIZE, 0) == noise()
        wait_until(lambda: os.fstat(reader).st_nlink == os.fstat(original).st_nlink, SEEN_WITHIN)
        for path in spot.source.iterdir():
            if path.is_file():
                assert (spot.path / path.name).read_bytes() == path.read_bytes()


def test_all_caches_are_flushed_even_if_mtime_is_restored(mount: Mounter) -> None:
    fs = mount(*WATCH)
    data = noise(2, 3_000_000)
    (fs.source / "f").write_bytes(data)
    settled_stats(fs)
    with held(fs.path / "f") as reader, held(fs.source / "f", os.O_RDWR) as writer:
        for _ in range(2):
            assert os.pread(reader, 1 << 22, 0) == data
            fs.drop_kernel()
        assert os.pread(reader, 1 << 22, 0) == data
        before = settled_stats(fs)
        assert before["pagecache_resident"] > 100
        assert before["backend_counters"]["eph_zpages"] > 100
        stamps = os.fstat(writer)
        for offset in range(0, len(data), 4096):
            os.pwrite(writer, b"!", offset)
        os.utime(writer, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
        expected = (fs.source / "f").read_bytes()
        wait_until(lambda: os.pread(reader, 1 << 22, 0) == expected, SEEN_WITHIN)
        # The check of open files, once a second, may have been faster than the events.
        counted = before["watch_invalidations"]
        wait_until(lambda: fs.stats()["watch_invalidations"] > counted, SEEN_WITHIN)


def settled_stats(fs: MountedFs) -> dict[str, Any]:
    """Wait until earlier changes in the source have been processed, and return the statistics.

    Other tests change files of the same file system, and their events come first.
    """
    counters = ("watch_invalidations", "changes_found", "doubtful_flushes", "watch_overflows")
    stats = fs.stats()
    while True:
        time.sleep(1)
        before, stats = stats, fs.stats()
        if all(before[name] == stats[name] for name in counters):
            return stats


# -- own changes ----------------------------------------------------------------------------


def test_own_changes_flush_nothing(spot: Spot) -> None:
    with held(spot.path / "f", os.O_RDWR) as fd:
        os.pread(fd, SIZE, 0)
        before = settled_stats(spot.fs)
        os.pwrite(fd, b"own!", 0)
        os.fchmod(fd, 0o600)
        (spot.path / "f").rename(spot.path / "g")
        (spot.path / "new").mkdir()
        wait_until(lambda: spot.fs.stats()["watch_events_own"] >= before["watch_events_own"] + 4)
        after = spot.fs.stats()
        assert after["watch_invalidations"] == before["watch_invalidations"]
        for name in ("changes_found", "doubtful_flushes"):
            assert after[name] == before[name], name
        fs_reads = spot.fs.stats()["source_reads"]
        spot.fs.drop_kernel(spot.path / "other")
        assert os.pread(fd, 4, 0) == b"own!"
        assert spot.fs.stats()["source_reads"] <= fs_reads + 1


@pytest.mark.parametrize("change", ["write", "rename"])
def test_an_own_change_in_progress_is_not_taken_for_a_change_without_an_event(
    spot: Spot, change: str
) -> None:
    path = spot.path / "f"
    with held(path, os.O_RDWR | os.O_DSYNC) as fd:
        os.pread(fd, SIZE, 0)
        before = settled_stats(spot.fs)
        end = time.monotonic() + 2.5 * LOOK_SECONDS
        while time.monotonic() < end:
            if change == "write":
                os.pwrite(fd, b"own!", 0)
            else:
                path.rename(path.with_name("g")).rename(path)
        after = spot.fs.stats()
        for name in ("changes_found", "doubtful_flushes"):
            assert after[name] == before[name], name


def test_two_mounts_of_one_source_see_changes_of_each_other(
    source: Path, mount: Mounter, tmp_path: Path
) -> None:
    (tmp_path / "second").mkdir()
    one = mount(*WATCH)
    (source / "f").write_bytes(noise())
    with (
        mounted(source, tmp_path / "second", *SMALL_CACHES, *WATCH) as two,
        held(one.path / "f", os.O_RDWR) as first,
        held(two.path / "f", os.O_RDWR) as second,
    ):
        for turn in range(4):
            writer, reader = (first, second) if turn % 2 else (second, first)
            data = b"%04d" % turn * 1000
            os.pwrite(writer, data, turn * 10_000)
            wait_until(
                lambda: os.pread(reader, 4000, turn * 10_000) == data,  # noqa: B023  # called at once
                SEEN_WITHIN,
            )


# -- directories in use stay connected --------------------------------------------------------


def test_a_directory_in_use_keeps_its_name_after_its_entry_was_in_doubt(spot: Spot) -> None:
    for name in "de":
        (spot.source / name).mkdir()
    with (
        held(spot.path / "d", os.O_RDONLY | os.O_DIRECTORY) as fd,
        held(spot.source, os.O_RDONLY | os.O_DIRECTORY) as top,
    ):
        before = settled_stats(spot.fs)["watch_invalidations"]
        for _ in range(2):  # the name exists at any time
            syscalls.renameat2(top, b"d", top, b"e", syscalls.RENAME_EXCHANGE)
        wait_until(lambda: spot.fs.stats()["watch_invalidations"] > before, SEEN_WITHIN)
        for _ in range(2):
            assert os.readlink(f"/proc/self/fd/{fd}") == str(spot.path / "d")
            time.sleep(0.1)
            assert os.listdir(spot.path / "d") == []


# -- lost events ---------------------------------------------------------------------------------


def test_lost_events_flush_everything(mount: Mounter) -> None:
    fs = mount(*WATCH)
    (fs.source / "f").write_bytes(noise())
    (fs.source / "names").mkdir()
    most = int(Path("/proc/sys/fs/fanotify/max_queued_events").read_text())
    if most > 1 << 15:
        pytest.skip("the queue of events is too long")
    with held(fs.path / "f") as reader, held(fs.source / "f", os.O_WRONLY) as writer:
        assert os.pread(reader, SIZE, 0) == noise()
        assert (fs.path / "f").stat().st_mode & 0o777 != 0o600
        fs.process.send_signal(signal.SIGSTOP)
        try:
            for i in range(most // 2 + 100):
                fd = os.open(fs.source / "names" / str(i), os.O_WRONLY | os.O_CREAT)
                os.close(fd)
            os.pwrite(writer, b"lost", 5000)
            os.fchmod(writer, 0o600)
            (fs.source / "late").write_bytes(b"late")
        finally:
            fs.process.send_signal(signal.SIGCONT)
        wait_until(lambda: os.pread(reader, 4, 5000) == b"lost", SEEN_WITHIN)
        wait_until(lambda: (fs.path / "f").stat().st_mode & 0o777 == 0o600, SEEN_WITHIN)
        wait_until(lambda: fs.stats()["watch_overflows"] > 0, SEEN_WITHIN)
    assert "events were lost" in fs.log.read_text()


# -- file systems below the source and beside it -------------------------------------------------


def test_a_file_of_another_file_system_mounted_on_a_name_is_watched(
    source: Path, mount: Mounter, tmp_path: Path
) -> None:
    """None of the other file system's directories is below the source."""
    other = tmp_path / "other"
    other.mkdir()
    (source / "f").touch()
    subprocess.run(["mount", "-t", "tmpfs", "none", other], check=True, timeout=10)
    try:
        (other / "f").write_bytes(noise())
        subprocess.run(["mount", "--bind", other / "f", source / "f"], check=True, timeout=10)
        fs = mount(*WATCH)
        with held(fs.path / "f") as reader:
            assert os.pread(reader, SIZE, 0) == noise()
            stats = fs.stats()
            assert (stats["watch_inodes"], stats["watch_unwatched"]) == (1, 0)
            with held(other / "f", os.O_RDWR) as writer:
                os.pwrite(writer, noise(1), 0)
            wait_until(lambda: os.pread(reader, SIZE, 0) == noise(1), SEEN_WITHIN)
    finally:
        subprocess.run(["umount", "-l", source / "f"], check=False, timeout=10)
        subprocess.run(["umount", "-l", other], check=True, timeout=10)


def test_a_file_system_mounted_below_the_source_is_also_watched(source: Path, mount: Mounter) -> None:
    (source / "below").mkdir()
    fs = mount(*WATCH)
    subprocess.run(["mount", "-t", "tmpfs", "none", source / "below"], check=True, timeout=10)
    try:
        (source / "below" / "f").write_bytes(noise())
        wait_until((fs.path / "below" / "f").exists, SEEN_WITHIN)
        with held(fs.path / "below" / "f") as reader:
            assert os.pread(reader, SIZE, 0) == noise()
            assert fs.stats()["watch_file_systems"] == 2
            (source / "below" / "f").write_bytes(noise(3))
            wait_until(lambda: os.pread(reader, SIZE, 0) == noise(3), SEEN_WITHIN)
    finally:
        subprocess.run(["umount", "-l", source / "below"], check=True, timeout=10)


def test_changes_by_another_path_to_the_file_system_are_seen(spot: Spot, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").hardlink_to(spot.source / "f")
    with held(spot.path / "f") as reader:
        assert os.pread(reader, SIZE, 0) == noise()
        script = (
            f"mount --make-rprivate /; mount --bind {spot.source} {tmp_path}/elsewhere;"
            f"printf elsewhere | dd of={tmp_path}/elsewhere/f conv=notrunc status=none"
        )
        subprocess.run([*mount_namespace(), "sh", "-ec", script], check=True, timeout=10)
        wait_until(lambda: os.pread(reader, 9, 0) == b"elsewhere", SEEN_WITHIN)
        with held(tmp_path / "link", os.O_WRONLY) as fd:
            os.pwrite(fd, b"by a link", 0)
        wait_until(lambda: os.pread(reader, 9, 0) == b"by a link", SEEN_WITHIN)


# -- clean-up, and sources that cannot be watched -----------------------------------------------


def _marks(fs: MountedFs) -> int:
    """Return the number of inodes that the daemon has marked."""
    marks = 0
    for info in Path(f"/proc/{fs.process.pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the fd may be closed meanwhile
            marks += info.read_text().count("fanotify ino:")
    return marks


def test_the_mark_of_a_removed_file_is_removed(mount: Mounter) -> None:
    fs = mount(*WATCH, prefix=UNPRIVILEGED)
    least = _marks(fs)
    for i in range(20):
        (fs.source / str(i)).write_bytes(b"x")
        assert (fs.path / str(i)).read_bytes() == b"x"
    assert _marks(fs) == fs.stats()["watch_inodes"] == least + 20
    for i in range(20):
        (fs.source / str(i)).unlink()
    wait_until(lambda: _marks(fs) == least, SEEN_WITHIN)
    wait_until(lambda: fs.stats()["watch_inodes"] == least, SEEN_WITHIN)


def test_a_source_that_cannot_be_watched_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    done = cleanfs("mount", "--coherency", "watch", "/proc", tmp_path / "mnt")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("cleanfs: cannot watch /proc: ")
    assert line.endswith("use --coherency open")


def test_without_a_watch_the_statistics_show_none(mount: Mounter) -> None:
    stats = mount().stats()
    assert stats["watcher"] == "none"
    assert stats["watch_events"] == 0
