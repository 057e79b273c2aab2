"""Test sources that renumber forgotten files: pages are found again, and only for their own files."""

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL_CACHES
from tests.harness.faulty import faulty
from tests.harness.mounting import MountedFs, mounted, wait_until
from tests.harness.renumbering import Source, renumbering

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

SIZE = 300_123
OLD = 1_600_000_000
"""A stamp long ago, so that no fingerprint is racy."""


def noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(SIZE)


def write(path: Path, data: bytes) -> None:
    """Write a file with that stamp."""
    path.write_bytes(data)
    os.utime(path, (OLD, OLD))


@dataclass
class Site:
    """Holds a plain directory, the source that serves it, and the mount."""

    source: Source
    fs: MountedFs

    @property
    def real(self) -> Path:
        return self.source.real

    @property
    def path(self) -> Path:
        return self.fs.path

    def forget(self, directories: int = 0) -> None:
        """Make the mount and the source forget everything except directories."""

        def forgotten() -> bool:
            (self.path / "poke").stat()  # a lookup makes the daemon ask the kernel to forget inodes
            return bool(self.fs.stats()["inodes"] <= 2 + directories)

        wait_until(forgotten)
        self.source.forget()

    def read_bytes(self) -> int:
        return int(self.fs.stats()["source_read_bytes"])


Maker = Callable[..., Site]


@contextmanager
def sites(tmp_path: Path) -> Iterator[Maker]:
    with ExitStack() as stack:

        def make(numbers: str = "fresh", *options: str, timeout: float = 0.0, patch: str = "") -> Site:
            for name in ("real", "source", "mnt"):
                (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / "real/poke").touch()
            source = stack.enter_context(
                renumbering(tmp_path / "real", tmp_path / "source", numbers, *options, timeout=timeout)
            )
            fs = stack.enter_context(
                mounted(
                    tmp_path / "source",
                    tmp_path / "mnt",
                    *(*SMALL_CACHES, "--attr-timeout", "0.05"),
                    patch="mount.MAX_INODES = 0\n" + patch,
                )
            )
            return Site(source, fs)

        yield make


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Maker]:
    with sites(tmp_path) as make:
        yield make


@pytest.mark.parametrize("numbers", ["fresh", "again", "one"])
def test_files_read_once_are_not_read_again_from_a_source_that_forgot_them(
    site: Maker, numbers: str
) -> None:
    at = site(numbers, "--whole-seconds")
    (at.real / "below").mkdir()
    names = ["a", "b", "c", "below/a", "below/b"]
    for seed, name in enumerate(names):
        write(at.real / name, noise(seed))
    for seed, name in enumerate(names):
        assert (at.path / name).read_bytes() == noise(seed)
    before = at.read_bytes()
    assert before == len(names) * SIZE
    for order in (names[::-1], names):
        at.forget(directories=1)
        for name in order:
            assert (at.path / name).read_bytes() == noise(names.index(name)), name
    assert at.read_bytes() == before
    assert at.fs.stats()["identity"] == "path"
    assert "files on fuse.renumbering are known by their path" in at.fs.log.read_text()


def test_a_reused_number_does_not_lead_to_the_pages_of_its_former_file(site: Maker) -> None:
    # Size and stamps are equal, too: sshfs has whole seconds and no ctime.
    at = site("again", "--whole-seconds")
    write(at.real / "a", noise(1))
    write(at.real / "b", noise(2))
    at.forget()
    number = (at.source.path / "a").stat().st_ino
    at.source.forget()
    assert (at.path / "a").read_bytes() == noise(1)
    at.forget()
    held = os.open(at.source.path / "b", os.O_PATH)
    try:
        assert os.fstat(held).st_ino == number
        assert (at.path / "b").read_bytes() == noise(2)
    finally:
        os.close(held)


def test_files_with_one_inode_number_are_not_confused(site: Maker) -> None:
    at = site("one", "--whole-seconds")
    for seed in range(4):
        write(at.real / str(seed), noise(seed))
    fds = [os.open(at.path / str(seed), os.O_RDONLY) for seed in range(4)]
    try:
        for seed, fd in enumerate(fds):
            assert os.pread(fd, SIZE, 0) == noise(seed)
            assert (at.path / str(seed)).read_bytes() == noise(seed)
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("forgets", [False, True])
def test_two_names_swapped_in_the_source_are_told_apart(site: Maker, forgets: bool) -> None:
    at = site()
    write(at.real / "a", noise(1))
    write(at.real / "b", noise(2))
    assert (at.path / "a").read_bytes() == noise(1)
    assert (at.path / "b").read_bytes() == noise(2)
    if forgets:
        at.forget()
    for old, new in (("a", "t"), ("b", "a"), ("t", "b")):  # only ctime changes
        (at.real / old).rename(at.real / new)
    assert (at.path / "a").read_bytes() == noise(2)
    assert (at.path / "b").read_bytes() == noise(1)


def test_renames_through_the_mount_keep_the_pages(site: Maker) -> None:
    at = site("fresh", "--whole-seconds")
    (at.real / "d").mkdir()
    for seed, name in enumerate(["a", "b", "d/f"]):
        write(at.real / name, noise(seed))
        assert (at.path / name).read_bytes() == noise(seed)
    for old, new in (("a", "t"), ("b", "a"), ("t", "b"), ("d", "e")):
        (at.path / old).rename(at.path / new)
    before = at.read_bytes()
    at.forget(directories=1)
    for seed, name in enumerate(["b", "a", "e/f"]):
        assert (at.path / name).read_bytes() == noise(seed), name
    assert at.read_bytes() == before

    # New files with the old names get none of these pages, though their attributes are equal.
    (at.path / "d").mkdir()
    write(at.path / "d/f", noise(5))
    at.forget(directories=2)
    assert (at.path / "d/f").read_bytes() == noise(5)
    assert (at.path / "e/f").read_bytes() == noise(2)


@pytest.mark.parametrize("change", ["unlink", "rename over", "in place"])
@pytest.mark.parametrize("forgets", [False, True])
def test_other_content_under_a_name_is_seen_after_a_change_through_the_mount(
    site: Maker, change: str, forgets: bool
) -> None:
    at = site("again", "--whole-seconds")
    write(at.real / "a", noise(1))
    assert (at.path / "a").read_bytes() == noise(1)
    if forgets:
        at.forget()
    if change == "unlink":
        (at.path / "a").unlink()
    write(at.path / ("b" if change == "rename over" else "a"), noise(2))
    if change == "rename over":
        (at.path / "b").rename(at.path / "a")
    at.forget()
    assert (at.path / "a").read_bytes() == noise(2)


@pytest.mark.parametrize("change", ["unlink", "rename over", "in place"])
@pytest.mark.parametrize("forgets", [False, True])
def test_other_content_under_a_name_is_seen_after_a_change_in_the_source(
    site: Maker, change: str, forgets: bool
) -> None:
    at = site("again")
    write(at.real / "a", noise(1))
    assert (at.path / "a").read_bytes() == noise(1)
    if forgets:
        at.forget()
    if change == "unlink":
        (at.real / "a").unlink()
    write(at.real / ("b" if change == "rename over" else "a"), noise(2))  # ctime differs
    if change == "rename over":
        (at.real / "b").rename(at.real / "a")
    assert (at.path / "a").read_bytes() == noise(2)


def test_pages_of_a_removed_file_are_dropped_and_counted(site: Maker) -> None:
    at = site()
    write(at.real / "a", noise(1))
    assert (at.path / "a").read_bytes() == noise(1)
    at.forget()
    (at.real / "a").unlink()
    assert not (at.path / "a").exists()
    stats = at.fs.stats()
    assert stats["pagecache_lost_files"] == 1
    assert 0 < stats["pagecache_lost_pages"] <= SIZE // 4096 + 1
    assert stats["pagecache_resident"] + stats["backend_counters"]["eph_pagebytes"] // 4096 <= 1


def test_hard_links_seen_as_two_files_never_show_old_bytes(site: Maker) -> None:
    at = site("one")
    write(at.real / "a", noise(1))
    os.link(at.real / "a", at.real / "b")
    assert (at.path / "a").read_bytes() == (at.path / "b").read_bytes() == noise(1)
    with (at.path / "b").open("r+b") as file:
        file.write(noise(2))
    assert (at.path / "a").read_bytes() == noise(2)
    os.link(at.path / "a", at.path / "c")
    (at.path / "a").unlink()
    write(at.path / "c", noise(3))
    at.forget()
    assert (at.path / "b").read_bytes() == (at.path / "c").read_bytes() == noise(3)


def test_parked_inodes_are_found_again_by_their_paths(site: Maker) -> None:
    at = site("again", "--whole-seconds", patch="mount.raise_fd_limit = lambda: 4")
    (at.real / "d").mkdir()
    for seed in range(30):
        write(at.real / f"d/{seed}", noise(seed))
    directory = os.open(at.path / "d", os.O_PATH)
    try:
        for _ in range(2):
            for seed in range(30):
                name = str(seed)
                assert os.stat(name, dir_fd=directory).st_size == SIZE
                fd = os.open(name, os.O_RDONLY, dir_fd=directory)
                try:
                    assert os.pread(fd, SIZE, 0) == noise(seed)
                finally:
                    os.close(fd)
            at.source.forget()
        assert at.read_bytes() == 30 * SIZE
    finally:
        os.close(directory)
    assert at.fs.stats()["inodes_parked_total"] > 0


@pytest.mark.parametrize("first", ["list", "look up"])
def test_hard_links_with_one_node_in_the_source_are_one_file(tmp_path: Path, first: str) -> None:
    for name in ("real", "source", "mnt"):
        (tmp_path / name).mkdir()
    write(tmp_path / "real/a", noise(1))
    os.link(tmp_path / "real/a", tmp_path / "real/b")
    with (
        faulty(tmp_path / "real", tmp_path / "source", attr_timeout=1, entry_timeout=1) as source,
        mounted(source.path, tmp_path / "mnt", *SMALL_CACHES) as fs,
    ):
        if first == "list":
            listed = {entry.name: entry.inode() for entry in os.scandir(fs.path)}
            assert listed["a"] == listed["b"]
        assert (fs.path / "a").stat().st_ino == (fs.path / "b").stat().st_ino
        assert (fs.path / "a").read_bytes() == (fs.path / "b").read_bytes() == noise(1)
        with (fs.path / "b").open("r+b") as file:
            file.write(noise(2))
            file.flush()
            assert (fs.path / "a").read_bytes() == noise(2)


@pytest.mark.parametrize("coherency", ["open", "none"])
def test_a_rename_done_but_reported_as_failed_is_seen(tmp_path: Path, coherency: str) -> None:
    for name in ("real", "source", "mnt"):
        (tmp_path / name).mkdir()
    write(tmp_path / "real/a", noise(1))
    write(tmp_path / "real/b", noise(2))
    options = (*SMALL_CACHES, "--coherency", coherency, "--attr-timeout", "0.05")
    with (
        faulty(tmp_path / "real", tmp_path / "source") as source,
        mounted(source.path, tmp_path / "mnt", *options, patch="mount.MAX_INODES = 0") as fs,
    ):
        assert (fs.path / "a").read_bytes() == noise(1)
        assert (fs.path / "b").read_bytes() == noise(2)
        source.fault("rename", errno.EIO, late=True)
        with pytest.raises(OSError, match="Input/output error"):
            (fs.path / "a").rename(fs.path / "b")
        source.heal()
        (tmp_path / "real/c").touch()

        def forgotten() -> bool:
            (fs.path / "c").stat()
            return bool(fs.stats()["inodes"] <= 2)

        wait_until(forgotten)
        assert (fs.path / "b").read_bytes() == noise(1)
