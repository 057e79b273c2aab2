"""Test explicit invalidation: the kernel keeps pages of a file until cleanfs invalidates them."""

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter
from tests.harness.kernel_pages import not_reclaimed
from tests.harness.mounting import MountedFs, settle, wait_until

PAGE = 4096
ATTR_TIMEOUT = 1.0
QUICK = ("--attr-timeout", str(ATTR_TIMEOUT))


@contextmanager
def held(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def expire() -> None:
    time.sleep(ATTR_TIMEOUT + 0.05)


def known(fs: MountedFs, data: bytes, name: str = "f") -> None:
    """Make a file and read it through the mount, with a fingerprint that is not racy."""
    (fs.source / name).write_bytes(data)
    settle()
    assert (fs.path / name).read_bytes() == data


@pytest.mark.parametrize("coherency", ["open", "watch", "none"])
def test_pages_of_a_written_file_stay_in_the_kernel(
    source: Path, mount: Mounter, coherency: str
) -> None:
    data = os.urandom(64 * PAGE)
    (source / "f").write_bytes(
        data
    )  # before the watch begins: a late event would rightly flush the file
    fs = mount("--coherency", coherency, "--attr-timeout", "1")
    settle()
    with held(fs.path / "f", os.O_RDWR) as fd, not_reclaimed(fd, len(data)):
        assert os.pread(fd, len(data), 0) == data
        before = fs.stats()["reads"]
        for page in range(64):
            os.pwrite(fd, b"n" * PAGE, page * PAGE)
            os.fstat(fd)
            assert os.pread(fd, 2 * PAGE, page * PAGE)[:PAGE] == b"n" * PAGE
        time.sleep(1.1)
        assert os.pread(fd, len(data), 0) == b"n" * len(data)
        assert fs.stats()["reads"] == before


def test_a_write_of_pages_read_before_needs_no_notification(mount: Mounter) -> None:
    """No page can have been dropped between its copy and its write request."""
    refused = (
        "from cleanfs.fuse.notify import Notifier\n"
        "async def written(*_): raise AssertionError('notified')\n"
        "Notifier.written = written\n"
    )
    fs = mount(patch=refused)
    known(fs, bytes(16 * PAGE))
    with held(fs.path / "f", os.O_RDWR) as fd:
        for page in range(16):
            assert os.pread(fd, PAGE, page * PAGE) == bytes(PAGE)
            assert os.pwrite(fd, b"n" * PAGE, page * PAGE) == PAGE
    assert (fs.source / "f").read_bytes() == b"n" * 16 * PAGE


def by_stat(path: Path, fd: int) -> None:
    os.stat(path)


def by_fstat(path: Path, fd: int) -> None:
    os.fstat(fd)


def by_listing(path: Path, fd: int) -> None:
    with os.scandir(path.parent) as entries:
        assert [entry.stat().st_size for entry in entries]


def by_open(path: Path, fd: int) -> None:
    with held(path):
        pass


CHANGES: dict[str, Callable[[int], object]] = {
    "in place": lambda f: os.pwrite(f, b"N" * 10, 100),
    "longer": lambda f: os.pwrite(f, b"N" * 300, PAGE + 200),
    "much longer": lambda f: os.pwrite(f, b"N" * 3 * PAGE, PAGE + 200),
    "shorter": lambda f: os.truncate(f, 150),
    "cut and longer": lambda f: (os.truncate(f, 10), os.pwrite(f, b"N" * 300, PAGE + 200)),
}

NO_CHECKS = """
from cleanfs.vfs import open_files
async def run(self): pass
open_files.OpenFiles.run = run
"""


@pytest.mark.parametrize("refresh", [by_stat, by_fstat, by_listing, by_open])
def test_after_new_attributes_no_old_byte_is_read(
    mount: Mounter, refresh: Callable[[Path, int], None]
) -> None:
    """Nor are zeros read behind the old end: pages are dropped before the attributes are sent."""
    fs = mount(*QUICK, patch=NO_CHECKS)
    with ExitStack() as stack:
        files = {}
        for name in CHANGES:
            directory = fs.source / name
            directory.mkdir()  # one per file: a listing refreshes all its files
            known(fs, b"o" * (PAGE + 200), f"{name}/f")
            fd = stack.enter_context(held(fs.path / name / "f"))
            in_source = stack.enter_context(held(directory / "f", os.O_RDWR))
            assert len(os.pread(fd, 1 << 20, 0)) == PAGE + 200
            mapped = stack.enter_context(mmap.mmap(fd, PAGE, prot=mmap.PROT_READ))
            assert mapped[0] == ord("o")
            files[name] = fd, in_source, mapped
        for name, (_, in_source, _) in files.items():
            CHANGES[name](in_source)
        expire()
        for name, (fd, in_source, mapped) in files.items():
            refresh(fs.path / name / "f", fd)
            expected = os.pread(in_source, 1 << 20, 0)
            assert mapped[: min(PAGE, len(expected))] == expected[:PAGE]
            assert os.pread(fd, 1 << 20, 0) == expected


def test_a_size_that_grows_is_never_read_as_zeros(mount: Mounter) -> None:
    """Other threads call fstat and read all the time."""
    fs = mount(*QUICK)
    known(fs, b"o" * 100)
    stop, zeros = threading.Event(), list[int]()

    def read() -> None:
        with held(fs.path / "f") as fd:
            while not stop.is_set():
                os.fstat(fd)
                data = os.pread(fd, 1 << 20, 0)
                if 0 in data:
                    zeros.append(data.index(0))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        with held(fs.source / "f", os.O_WRONLY | os.O_APPEND) as fd:
            for _ in range(60):
                os.write(fd, b"n" * 77)
                os.stat(fs.path / "f")
                with held(fs.path / "f") as other:
                    os.pread(other, 10, 0)
                time.sleep(0.01)
    finally:
        stop.set()
        for reader in readers:
            reader.join(20)
    assert not zeros


def read_whole(fd: int) -> bytes:
    return os.pread(fd, 1 << 20, 0)


def map_whole(fd: int) -> bytes:
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        return mapped[:]


def send_whole(fd: int) -> bytes:
    memory = os.memfd_create("copy")
    try:
        os.sendfile(memory, fd, 0, 1 << 20)
        return os.pread(memory, 1 << 20, 0)
    finally:
        os.close(memory)


@pytest.mark.parametrize("get", [read_whole, map_whole, send_whole])
def test_an_open_file_shows_a_change_without_a_getattr(
    mount: Mounter, get: Callable[[int], bytes]
) -> None:
    """A mapping and sendfile(2) never ask for attributes, nor does a read of cached pages."""
    fs = mount(*QUICK)
    for change in ("in place", "same stamp", "longer"):
        known(fs, b"o" * (PAGE + 200), change)
        with held(fs.path / change) as fd, held(fs.source / change, os.O_RDWR) as in_source:
            for _ in range(2):
                assert get(fd) == b"o" * (PAGE + 200)
            before = os.fstat(in_source)
            os.pwrite(in_source, b"N" * 300, PAGE if change == "longer" else 100)
            if change == "same stamp":
                os.utime(in_source, ns=(before.st_atime_ns, before.st_mtime_ns))
            expected = os.pread(in_source, 1 << 20, 0)
            wait_until(lambda fd=fd, expected=expected: get(fd) == expected, 10)  # type: ignore[misc]  # mypy does not infer it


def test_without_explicit_invalidation_the_kernel_refreshes_attributes_at_a_read(
    mount: Mounter,
) -> None:
    fs = mount(*QUICK, patch="mount.FUSE_EXPLICIT_INVAL_DATA = 0")
    known(fs, b"o" * PAGE)
    with held(fs.path / "f") as fd, held(fs.source / "f", os.O_RDWR) as in_source:
        assert os.pread(fd, PAGE, 0) == b"o" * PAGE
        os.pwrite(in_source, b"N" * PAGE, 0)
        expire()
        assert os.pread(fd, PAGE, 0) == b"N" * PAGE
