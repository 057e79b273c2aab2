"""Test events between two steps of a call: each of these once lost or invented bytes."""

import contextlib
import ctypes
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter
from tests.harness.machine import Deadline
from tests.harness.mounting import STOP_TIMEOUT, end_of

GETDENTS64 = 217
PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)


class Listing:
    """Lists a directory and stops after each getdents call."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = ctypes.create_string_buffer(32768)

    def more(self) -> list[str]:
        """Return the names of one getdents call; none at the end."""
        size = libc.syscall(GETDENTS64, self._fd, self._buffer, len(self._buffer))
        assert size >= 0
        names, start = [], 0
        while start < size:
            length = int.from_bytes(self._buffer.raw[start + 16 : start + 18], "little")
            names.append(self._buffer.raw[start + 19 : start + length].split(b"\0")[0].decode())
            start += length
        return names


@contextmanager
def listing(path: Path) -> Iterator[Listing]:
    """Begin to list a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield Listing(fd)
    finally:
        os.close(fd)


@pytest.mark.skipif(
    os.uname().machine != "x86_64", reason="the number of getdents64 is known for x86_64 only"
)
@pytest.mark.parametrize("change", ["truncate", "chmod", "unlink", "replace"])
def test_a_listing_continued_later_has_no_old_attributes(
    source: Path, mount: Mounter, change: str
) -> None:
    for i in range(600):
        (source / f"file{i:04}").write_bytes(b"x" * 100)
    fs = mount("--attr-timeout", "60")
    order = os.listdir(source)
    with listing(fs.path) as entries:
        listed = len(entries.more()) - 2
        victim = fs.path / order[listed + 5]
        if change == "truncate":
            os.truncate(victim, 5)
        elif change == "chmod":
            victim.chmod(0o600)
        elif change == "unlink":
            victim.unlink()
        else:
            (fs.path / "new").write_bytes(b"NEW")
            (fs.path / "new").rename(victim)
        entries.more()
        if change == "unlink":
            assert not victim.exists()
        else:
            real = os.stat(source / victim.name)
            seen = os.stat(victim)
            assert (seen.st_size, seen.st_mode) == (real.st_size, real.st_mode)
            assert victim.read_bytes() == (source / victim.name).read_bytes()


def test_a_mapping_of_a_file_created_for_appending_is_written_back_in_place(
    source: Path, mount: Mounter
) -> None:
    fs = mount()
    fd = os.open(fs.path / "f", os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(fd, b"a" * 10_000)
        with mmap.mmap(fd, 10_000) as mapping:
            mapping[:5] = b"HELLO"
            mapping.flush()
    finally:
        os.close(fd)
    assert (source / "f").read_bytes() == b"HELLO" + b"a" * 9_995


def test_an_append_after_a_truncate_follows_an_append_in_the_source(
    source: Path, mount: Mounter
) -> None:
    (source / "log").write_bytes(b"q" * 100)
    fs = mount()
    fd = os.open(fs.path / "log", os.O_WRONLY | os.O_APPEND | os.O_TRUNC)
    try:
        with (source / "log").open("ab") as file:
            file.write(b"in the source\n")
        os.write(fd, b"through the mount\n")
    finally:
        os.close(fd)
    assert (source / "log").read_bytes() == b"in the source\nthrough the mount\n"


def test_a_change_hidden_by_an_own_rename_is_seen(source: Path, mount: Mounter) -> None:
    """The change keeps size and mtime, and the kernel has the old attributes and pages."""
    (source / "f").write_bytes(b"old " * 1000)
    time.sleep(0.1)  # no longer racy
    fs = mount("--attr-timeout", "0.5")
    for _ in range(2):
        assert (fs.path / "f").read_bytes() == b"old " * 1000
        time.sleep(0.6)
    assert (fs.path / "f").read_bytes() == b"old " * 1000
    before = os.stat(source / "f")
    with (source / "f").open("r+b") as file:
        file.write(b"new " * 1000)
    os.utime(source / "f", ns=(before.st_atime_ns, before.st_mtime_ns))
    (fs.path / "f").rename(fs.path / "g")
    time.sleep(0.6)
    os.stat(fs.path / "g")
    assert (fs.path / "g").read_bytes() == b"new " * 1000


def test_dirty_pages_of_a_mapping_survive_sigterm(source: Path, mount: Mounter) -> None:
    size = 32 << 20
    (source / "f").write_bytes(b"a" * size)
    fs = mount()
    fd = os.open(fs.path / "f", os.O_RDWR)
    try:
        with mmap.mmap(fd, size) as mapping:
            for offset in range(0, size, 4096):
                mapping[offset : offset + 5] = b"DIRTY"
            fs.process.terminate()
            assert end_of(fs.process, STOP_TIMEOUT) == 0
            assert (source / "f").read_bytes().count(b"DIRTY") == size // 4096
    finally:
        with contextlib.suppress(OSError):  # the mount has ended
            os.close(fd)


def test_a_mapping_shows_a_finished_write_despite_concurrent_reads_and_stats(
    source: Path, mount: Mounter
) -> None:
    """The kernel drops pages being written when a reply has a new mtime, and reads them again."""
    (source / "f").write_bytes(bytes(4 * PAGE))
    fs = mount("--coherency", "none")
    read_and_stat = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "while os.pread(fd, 4096, 4096): os.fstat(fd)\n"
    )
    others = [
        subprocess.Popen([sys.executable, "-I", "-S", "-c", read_and_stat, str(fs.path / "f")])
        for _ in range(3)
    ]
    fd = os.open(fs.path / "f", os.O_RDWR | os.O_DSYNC)  # slow
    stale = 0
    try:
        with mmap.mmap(fd, 4 * PAGE) as mapping:
            deadline = time.monotonic() + 2
            for number in range(1, 1 << 30):
                os.pwrite(fd, b"%08d" % number * (PAGE // 8), PAGE)
                stale += mapping[PAGE : PAGE + 8] != b"%08d" % number
                if stale or time.monotonic() >= deadline:
                    break
    finally:
        for other in others:
            other.kill()
            end_of(other, STOP_TIMEOUT)
        os.close(fd)
    assert not stale


LATE = """
read, late = mount.CleanFS.read, [8192]
async def slow(self, fh, off, size):
    if off in late:
        late.remove(off)
        await trio.sleep(0.3)
    return await read(self, fh, off, size)
mount.CleanFS.read = slow
"""
"""Delays the first read of the third page."""


LONG_PAGES_SECONDS = "from cleanfs.fuse import notify; notify.PAGES_SECONDS = 600"


def test_a_write_whose_page_drop_waits_for_its_own_reply_gets_the_reply(mount: Mounter) -> None:
    """The kernel drops no partially cached or mapped page of a write before its reply."""
    fs = mount("--read-ahead", "0", patch=LONG_PAGES_SECONDS)
    (fs.source / "f").write_bytes(b"o" * 8 * PAGE)
    fd = os.open(fs.path / "f", os.O_RDWR)
    try:
        deadline = Deadline(15)
        for start, stop in (100, PAGE), (PAGE + 100, 3 * PAGE), (4 * PAGE, 4 * PAGE + 100):
            assert os.pread(fd, 8 * PAGE, 0) == b"o" * 8 * PAGE
            fs.drop_kernel(fs.path / "f")
            os.pwrite(fd, b"o" * (stop - start), start)
        with mmap.mmap(fd, 8 * PAGE) as mapped:
            for place in range(0, 8 * PAGE, PAGE):
                mapped[place] = ord("m")
                mapped.flush(place, PAGE)
        assert not deadline.over()
    finally:
        os.close(fd)


def test_scattered_pages_of_a_mapping_are_in_the_source_after_sigterm(mount: Mounter) -> None:
    """There are more dirty pages than concurrent requests."""
    fs = mount("--read-ahead", "0", patch=LONG_PAGES_SECONDS)
    (fs.source / "f").write_bytes(b"o" * 1200 * PAGE)
    fd = os.open(fs.path / "f", os.O_RDWR)
    with mmap.mmap(fd, 0) as mapped:
        for place in range(0, 1200 * PAGE, 2 * PAGE):
            mapped[place] = ord("m")
        fs.process.terminate()
        end_of(fs.process, STOP_TIMEOUT)
    with contextlib.suppress(OSError):  # the mount has ended
        os.close(fd)
    data = (fs.source / "f").read_bytes()
    assert data[:: 2 * PAGE] == b"m" * 600


def open_and_close(path: Path) -> None:
    os.close(os.open(path, os.O_RDONLY))


AUTO_INVALIDATION = "mount.FUSE_EXPLICIT_INVAL_DATA = 0\n"
"""Lets the kernel drop pages when a reply has another mtime, as before Linux 5.2."""


@pytest.mark.parametrize("dropped_by", ["mtime", "notification", "open"])
@pytest.mark.parametrize(
    ("waits_for", "flags"), [("a page", 0), ("its data", 0), ("its data", os.O_DIRECT)]
)
def test_a_page_read_between_its_copy_and_its_write_request_is_dropped(
    mount: Mounter, waits_for: str, flags: int, dropped_by: str
) -> None:
    """A write copies page after page, and waits at the third, because that is being read.

    Or it waits for its data, which is read from another file. A mapping reads pages with O_DIRECT too.
    """
    coherency = "none" if dropped_by == "mtime" else "open"
    patch = LATE + (AUTO_INVALIDATION if dropped_by == "mtime" else "")
    fs = mount("--read-ahead", "0", "--coherency", coherency, patch=patch)
    (fs.source / "f").write_bytes(b"o" * 12288)
    (fs.source / "new").write_bytes(b"n" * 12288)
    new, pipe = os.open(fs.path / "new", os.O_RDONLY), os.pipe()
    fd, other = os.open(fs.path / "f", os.O_RDWR), os.open(fs.path / "f", os.O_RDONLY | flags)
    try:
        assert os.pread(fd, 4096, 0) == b"o" * 4096
        time.sleep(0.02)
        with (
            mmap.mmap(fd, 12288) as mapped,
            mmap.mmap(new, 12288, prot=mmap.PROT_READ) as data,
            mmap.mmap(other, 4096, prot=mmap.PROT_READ) as first,
            memoryview(mapped)[8192:8193] as third,
            memoryview(data) as slow,
        ):
            os.pwrite(fd, b"o", 0)  # changes mtime: the kernel may drop pages when it learns of it
            threads, to_write = [], slow
            if waits_for == "a page":
                to_write = memoryview(b"n" * 12288)
                # A page fault in a system call: an index operation would hold the GIL.
                threads.append(threading.Thread(target=os.write, args=(pipe[1], third)))
            threads.append(threading.Thread(target=os.pwrite, args=(fd, to_write, 0)))
            # This thread drops the first page and then waits.
            drop = open_and_close if dropped_by == "open" else os.stat
            threads.append(threading.Thread(target=drop, args=(fs.path / "f",)))
            for thread in threads:
                if thread is threads[-1] and dropped_by == "notification":
                    os.utime(fs.source / "f")
                thread.start()
                time.sleep(0.01)
            _ = first[0]  # the old byte, unless this machine is very slow
            for thread in threads:
                thread.join(20)
            assert mapped[:12288] == b"n" * 12288
            mapped[4095] = ord("m")
            mapped.flush()
        assert (fs.source / "f").read_bytes() == b"n" * 4095 + b"m" + b"n" * 8192
    finally:
        for each in (fd, other, new, *pipe):
            os.close(each)
