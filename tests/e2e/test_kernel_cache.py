"""What the kernel keeps: pages across opens, attributes and names for a time, that a name is absent."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter
from tests.harness.mounting import MountedFs, mounted, settle, wait_until

NONE = ("--coherency", "none")


def pages_asked_for(fs: MountedFs) -> int:
    """Pages that FUSE reads asked the daemon for."""
    stats = fs.stats()
    hits, gets, failed = stats["pagecache_hits"], stats["succ_gets"], stats["failed_gets"]
    return int(hits + gets + failed)


@contextmanager
def held(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("options", [(), NONE, ("--read-only",), (*NONE, "--writeback")])
def test_an_unchanged_file_is_read_once(mount: Mounter, options: tuple[str, ...]) -> None:
    fs = mount(*options)
    (fs.source / "f").write_bytes(b"x" * 100_000)
    settle()
    assert (fs.path / "f").read_bytes() == b"x" * 100_000
    before = pages_asked_for(fs)
    assert before >= 25
    for _ in range(3):
        assert (fs.path / "f").read_bytes() == b"x" * 100_000
    assert pages_asked_for(fs) == before


def test_what_was_just_written_is_kept_with_coherency_none(mount: Mounter) -> None:
    fs = mount(*NONE)
    (fs.path / "f").write_bytes(b"x" * 100_000)
    assert (fs.path / "f").read_bytes() == b"x" * 100_000
    before = pages_asked_for(fs)
    for _ in range(3):
        assert (fs.path / "f").read_bytes() == b"x" * 100_000
    assert pages_asked_for(fs) == before


def test_attributes_are_believed_for_a_second_or_for_long(
    source: Path, mount: Mounter, tmp_path: Path
) -> None:
    (tmp_path / "second").mkdir()
    (source / "f").write_bytes(b"x")
    with mounted(source, tmp_path / "second", *NONE) as long:
        short = mount()
        for fs in (long, short):
            assert (fs.path / "f").stat().st_size == 1
        (source / "f").write_bytes(b"longer")
        time.sleep(1.1)
        assert (short.path / "f").stat().st_size == 6
        assert (long.path / "f").stat().st_size == 1


def test_a_timeout_that_is_given_counts_whatever_the_coherency(mount: Mounter) -> None:
    fs = mount(*NONE, "--attr-timeout", "0.2")
    (fs.source / "f").write_bytes(b"x")
    assert (fs.path / "f").stat().st_size == 1
    (fs.source / "f").write_bytes(b"longer")
    time.sleep(0.3)
    assert (fs.path / "f").stat().st_size == 6


def test_the_absence_of_a_name_is_believed_with_coherency_none(mount: Mounter) -> None:
    fs = mount(*NONE, "--attr-timeout", "2")
    assert not (fs.path / "f").exists()
    (fs.source / "f").touch()
    assert not (fs.path / "f").exists()
    time.sleep(2.1)
    assert (fs.path / "f").exists()


def test_a_name_made_in_the_source_is_there_at_once_otherwise(mount: Mounter) -> None:
    fs = mount("--attr-timeout", "60")
    assert not (fs.path / "f").exists()
    (fs.source / "f").touch()
    assert (fs.path / "f").exists()


@pytest.mark.parametrize("how", ["create", "mkdir", "symlink", "mknod", "link", "rename"])
def test_a_name_made_through_the_mount_ends_its_absence(mount: Mounter, how: str) -> None:
    fs = mount(*NONE)
    (fs.source / "other").write_bytes(b"text")
    new = fs.path / "new"
    assert not new.exists()
    match how:
        case "create":
            new.write_bytes(b"text")
        case "mkdir":
            new.mkdir()
        case "symlink":
            new.symlink_to("other")
        case "mknod":
            os.mkfifo(new)
        case "link":
            new.hardlink_to(fs.path / "other")
        case "rename":
            (fs.path / "other").rename(new)
            assert not (fs.path / "other").exists()
    assert new.exists()
    assert "new" in os.listdir(fs.path)
    if how not in ("mkdir", "mknod"):
        assert new.read_bytes() == b"text"
    (new.rmdir if how == "mkdir" else new.unlink)()
    assert not new.exists()


def test_control_files_are_never_believed_absent(mount: Mounter) -> None:
    fs = mount(*NONE, "--backend", "none")
    zcache = fs.path / ".cleancache" / "zcache"
    assert not zcache.exists()
    fs.control("backend").write_text("zcache\n")
    assert zcache.exists()


def test_a_long_listing_with_many_names_stays_right_with_coherency_none(mount: Mounter) -> None:
    fs = mount(*NONE)
    for number in range(500):
        (fs.source / f"f{number}").write_bytes(b"x" * number)
    for _ in range(2):
        with os.scandir(fs.path) as entries:
            assert {e.name: e.stat().st_size for e in entries} == {f"f{n}": n for n in range(500)}
    (fs.path / "f7").write_bytes(b"y" * 1000)
    assert (fs.path / "f7").stat().st_size == 1000


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
def test_files_that_the_kernel_forgets_with_their_names_come_back_without_the_source(
    mount: Mounter,
) -> None:
    """Linux drops all pages of a closed FUSE file with its last dentry, also while memory is plenty."""
    fs = mount("--page-cache", "1M")
    data = b"".join(b"%07d\n" % i for i in range(1 << 19))
    (fs.source / "f").write_bytes(data)
    settle()
    assert (fs.path / "f").read_bytes() == data
    before = fs.stats()
    asked = pages_asked_for(fs)
    Path("/proc/sys/vm/drop_caches").write_text("2")  # names and inodes, not pages
    wait_until(lambda: fs.stats()["inodes"] < before["inodes"])
    assert (fs.path / "f").read_bytes() == data
    after = fs.stats()
    assert pages_asked_for(fs) - asked >= len(data) >> 12
    assert after["succ_gets"] > before["succ_gets"]
    assert after["source_read_bytes"] == before["source_read_bytes"]
