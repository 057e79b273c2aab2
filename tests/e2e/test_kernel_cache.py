"""Test the kernel's caches: pages across opens, attributes, names and absent names for a time."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter
from tests.harness.mounting import MountedFs, mounted, settle, wait_until

NONE = ("--coherency", "none")


def pages_requested(fs: MountedFs) -> int:
    """Return the number of pages that FUSE reads requested from the daemon."""
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
    before = pages_requested(fs)
    assert before >= 25
    for _ in range(3):
        assert (fs.path / "f").read_bytes() == b"x" * 100_000
    assert pages_requested(fs) == before


def test_written_pages_are_kept_with_coherency_none(mount: Mounter) -> None:
    fs = mount(*NONE)
    (fs.path / "f").write_bytes(b"x" * 100_000)
    assert (fs.path / "f").read_bytes() == b"x" * 100_000
    before = pages_requested(fs)
    for _ in range(3):
        assert (fs.path / "f").read_bytes() == b"x" * 100_000
    assert pages_requested(fs) == before


def test_the_default_attribute_timeout_depends_on_the_coherency(
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


def test_an_explicit_timeout_overrides_that_of_the_coherency(mount: Mounter) -> None:
    fs = mount(*NONE, "--attr-timeout", "0.2")
    (fs.source / "f").write_bytes(b"x")
    assert (fs.path / "f").stat().st_size == 1
    (fs.source / "f").write_bytes(b"longer")
    time.sleep(0.3)
    assert (fs.path / "f").stat().st_size == 6


def test_the_absence_of_a_name_is_cached_with_coherency_none(mount: Mounter) -> None:
    fs = mount(*NONE, "--attr-timeout", "2")
    assert not (fs.path / "f").exists()
    (fs.source / "f").touch()
    assert not (fs.path / "f").exists()
    time.sleep(2.1)
    assert (fs.path / "f").exists()


def test_otherwise_a_name_made_in_the_source_is_visible_at_once(mount: Mounter) -> None:
    fs = mount("--attr-timeout", "60")
    assert not (fs.path / "f").exists()
    (fs.source / "f").touch()
    assert (fs.path / "f").exists()


@pytest.mark.parametrize("operation", ["create", "mkdir", "symlink", "mknod", "link", "rename"])
def test_a_name_made_through_the_mount_ends_its_absence(mount: Mounter, operation: str) -> None:
    fs = mount(*NONE)
    (fs.source / "other").write_bytes(b"text")
    new = fs.path / "new"
    assert not new.exists()
    match operation:
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
    if operation not in ("mkdir", "mknod"):
        assert new.read_bytes() == b"text"
    (new.rmdir if operation == "mkdir" else new.unlink)()
    assert not new.exists()


def test_the_absence_of_control_files_is_never_cached(mount: Mounter) -> None:
    fs = mount(*NONE, "--backend", "none")
    zcache = fs.path / ".cleancache" / "zcache"
    assert not zcache.exists()
    fs.control("backend").write_text("zcache\n")
    assert zcache.exists()


def test_a_long_listing_stays_right_with_coherency_none(mount: Mounter) -> None:
    fs = mount(*NONE)
    for number in range(500):
        (fs.source / f"f{number}").write_bytes(b"x" * number)
    for _ in range(2):
        with os.scandir(fs.path) as entries:
            assert {e.name: e.stat().st_size for e in entries} == {f"f{n}": n for n in range(500)}
    (fs.path / "f7").write_bytes(b"y" * 1000)
    assert (fs.path / "f7").stat().st_size == 1000


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_files_forgotten_with_their_names_are_read_without_the_source(
    mount: Mounter,
) -> None:
    """Linux drops all pages of a closed FUSE file with its last dentry, even if memory is free."""
    fs = mount("--page-cache", "1M")
    data = b"".join(b"%07d\n" % i for i in range(1 << 19))
    (fs.source / "f").write_bytes(data)
    settle()
    assert (fs.path / "f").read_bytes() == data
    before = fs.stats()
    requested = pages_requested(fs)
    Path("/proc/sys/vm/drop_caches").write_text("2")  # names and inodes, not pages
    wait_until(lambda: fs.stats()["inodes"] < before["inodes"])
    assert (fs.path / "f").read_bytes() == data
    after = fs.stats()
    assert pages_requested(fs) - requested >= len(data) >> 12
    assert after["succ_gets"] > before["succ_gets"]
    assert after["source_read_bytes"] == before["source_read_bytes"]
