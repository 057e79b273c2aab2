"""Test that programs that hold a file open see changes of the source."""

import fcntl
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter
from tests.harness.descriptors import many_files
from tests.harness.mounting import cpu_ticks, settle, wait_until
from tests.harness.source_calls import held
from tests.harness.source_content import QUICK, SIZE, cached, expire, noise, same, shell

FS_IOC_GETFLAGS = 0x80086601


@pytest.mark.parametrize("first", ["not used", "used", "closed"])
def test_pages_are_kept_once_the_first_open_has_certainly_dropped_them(
    source: Path, mount: Mounter, first: str
) -> None:
    """Before the fd is used, its opener may not have run, even after half a second."""
    fs = mount(patch="from cleanfs.fs import opening; opening.DROP_SECONDS = 0")
    (source / "f").write_bytes(b"1")
    settle()
    with held(fs.path / "f") as other:
        assert os.read(other, 1) == b"1"
        (source / "f").write_bytes(b"2")
        settle()
        with ExitStack() as opened:
            fd = opened.enter_context(held(fs.path / "f"))
            assert os.pread(fd if first == "used" else other, 1, 0) == b"2"
            if first == "closed":
                opened.close()
            before = fs.stats()["reads"]
            assert (fs.path / "f").read_bytes() == b"2"
            new_reads = fs.stats()["reads"] - before
    assert bool(new_reads) == (first == "not used")


def test_a_change_is_seen_while_the_file_is_open(mount: Mounter) -> None:
    fs = mount("--attr-timeout", "60")
    cached(fs, "f", noise())
    with held(fs.path / "f") as fd:
        assert os.pread(fd, SIZE, 0) == noise()
        shell(fs.source, "printf changed | dd of=f conv=notrunc bs=1 seek=1000000; echo more >> f")
        same(fs, "f")
        assert os.pread(fd, 2 * SIZE, 0) == (fs.source / "f").read_bytes()
        shell(fs.source, "truncate -s 100 f")
        same(fs, "f")
        assert os.pread(fd, 2 * SIZE, 0) == (fs.source / "f").read_bytes()


def sent(fd: int, size: int) -> bytes:
    """Return the data of an open file by sendfile, which asks for no attributes."""
    with tempfile.TemporaryFile() as target:
        os.sendfile(target.fileno(), fd, 0, size)
        return os.pread(target.fileno(), size, 0)


def spliced(fd: int, size: int) -> bytes:
    reader, writer = os.pipe()
    try:
        return os.read(reader, os.splice(fd, writer, size, offset_src=0))
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("way", [sent, spliced, None], ids=["sendfile", "splice", "mapping"])
def test_a_change_of_an_open_file_is_seen_without_a_getattr(
    mount: Mounter, way: Callable[[int, int], bytes] | None
) -> None:
    fs = mount()
    size = 16384
    (fs.source / "f").write_bytes(b"a" * size)
    settle()
    with held(fs.path / "f") as fd, mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:

        def seen() -> bytes:
            return mapping[:] if way is None else way(fd, size)

        for data in (b"b", b"c"):
            assert len(set(seen())) == 1
            settle()
            with held(fs.source / "f", os.O_WRONLY) as changed:
                os.pwrite(changed, data * size, 0)
            wait_until(lambda: seen() == data * size, 10)  # noqa: B023  # called at once
        assert fs.stats()["changes_found"] == 2


def test_checks_of_many_unchanged_open_files_are_cheap(mount: Mounter) -> None:
    fs = mount()
    for number in range(3000):
        (fs.source / f"{number}").write_bytes(b"x")
    with many_files(), ExitStack() as stack:
        for number in range(3000):
            stack.enter_context(held(fs.path / f"{number}"))
        before = fs.stats()
        ticks = cpu_ticks(fs)
        time.sleep(3)
        assert cpu_ticks(fs) - ticks < 30, "less than a tenth of one CPU"
        after = fs.stats()
        assert after["changes_found"] == before["changes_found"]
        with held(fs.source / "2999", os.O_WRONLY) as changed:  # it is checked in its turn
            os.pwrite(changed, b"y", 0)
        wait_until(lambda: fs.stats()["changes_found"] > before["changes_found"], 10)


def test_a_change_found_by_the_open_of_an_ioctl_reaches_the_kernel(mount: Mounter) -> None:
    fs = mount("--attr-timeout", "3600")
    (fs.source / "f").write_bytes(b"a" * 8192)
    settle()
    with held(fs.path / "f") as fd:
        assert os.pread(fd, 8192, 0) == b"a" * 8192
        with held(fs.source / "f", os.O_WRONLY) as changed:
            before = os.fstat(changed)
            os.pwrite(changed, b"b" * 8192, 0)
            os.utime(
                changed, ns=(before.st_atime_ns, before.st_mtime_ns)
            )  # only ctime shows the change
        settle()
        fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytearray(8))
        wait_until(lambda: os.pread(fd, 8192, 0) == b"b" * 8192, 5)
        assert (fs.path / "f").read_bytes() == b"b" * 8192
    wait_until(lambda: fs.stats()["open_files"] == 0, 5)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_DIRECT], ids=["buffered", "direct"])
def test_a_file_that_was_shorter_for_a_while_is_read_whole_again(mount: Mounter, flags: int) -> None:
    """The kernel takes a short reply for the end of the file until it gets new attributes."""
    fs = mount(*QUICK)
    size = 16384
    (fs.source / "f").write_bytes(b"a" * size)
    settle()
    buffer = mmap.mmap(-1, size)
    with held(fs.path / "f", flags) as fd:

        def read() -> bytes:
            return buffer[: os.preadv(fd, [buffer], 0)]

        assert read() == b"a" * size
        os.truncate(fs.source / "f", 5000)
        expire()
        assert read() == b"a" * 5000
        settle()
        with held(fs.source / "f", os.O_WRONLY) as changed:
            os.pwrite(changed, b"b" * size, 0)
        expire()
        assert read() == b"b" * size
        wait_until(lambda: sent(fd, size) == b"b" * size, 10)
        assert os.fstat(fd).st_size == size
    same(fs, "f")
