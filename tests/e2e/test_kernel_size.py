"""Test that the kernel has the size of a file before a program depends on it."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter
from tests.harness.mounting import MountedFs, settle, wait_until
from tests.harness.source_calls import held
from tests.harness.unprivileged import NO_DAC_READ_SEARCH

LONG_REFRESH = "from cleanfs.fuse import notify; notify.REFRESH_SECONDS = 20\n"
"""Gives a refresh enough time on a busy machine."""


def test_an_open_sees_the_new_size_while_others_read_the_file(mount: Mounter) -> None:
    fs = mount("--attr-timeout", "60", patch=LONG_REFRESH)
    files = [f"f{i}" for i in range(4)]
    for name in files:
        (fs.source / name).write_bytes(b"x" * 5000)
    stop = threading.Event()

    def read_all() -> None:
        while not stop.is_set():
            for name in files:
                with held(fs.path / name) as fd:
                    os.pread(fd, 9000, 0)

    with ThreadPoolExecutor(2) as others:
        for _ in range(2):
            others.submit(read_all)
        try:
            for turn in range(300):
                name = files[turn % len(files)]
                with held(fs.source / name, os.O_WRONLY | os.O_APPEND) as fd:
                    os.write(fd, b"y" * (turn % 700 + 1))
                with held(fs.path / name) as fd:
                    assert len(os.pread(fd, 1 << 20, 0)) == (fs.source / name).stat().st_size
        finally:
            stop.set()


OVERTAKEN = (
    """
from pathlib import Path
getattr_of = mount.CleanFS.getattr
async def overtaken(self, inode, ctx):
    reply = await getattr_of(self, inode, ctx)
    if not Path(f"/proc/self/task/{ctx.pid}").exists():
        await self._services.notifier.attributes_changed(inode)
    return reply
mount.CleanFS.getattr = overtaken
"""
    + LONG_REFRESH
)
"""Makes the kernel drop each attribute reply to a program, as a notification overtakes it."""


@pytest.mark.skipif(os.geteuid() != 0, reason="a size refresh opens files by handle")
@pytest.mark.parametrize("change", [b"y" * 700, b""], ids=["longer", "shorter"])
def test_an_open_sees_the_new_size_though_no_reply_to_the_program_takes_effect(
    mount: Mounter, change: bytes
) -> None:
    fs = mount("--attr-timeout", "60", patch=OVERTAKEN)
    (fs.source / "f").write_bytes(b"x" * 5000)
    with held(fs.path / "f") as fd:
        assert len(os.pread(fd, 1 << 20, 0)) == 5000
        with held(fs.source / "f", os.O_WRONLY | os.O_APPEND) as other:
            os.write(other, change) or os.truncate(other, 4500)
        with held(fs.path / "f") as fresh:
            for handle in (fresh, fd):
                assert len(os.pread(handle, 1 << 20, 0)) == (fs.source / "f").stat().st_size
                assert os.lseek(handle, 0, os.SEEK_END) == (fs.source / "f").stat().st_size


@pytest.mark.skipif(os.geteuid() != 0, reason="a size refresh opens files by handle")
def test_an_open_file_grows_after_an_event_though_no_reply_takes_effect(mount: Mounter) -> None:
    fs = mount("--coherency", "watch", "--attr-timeout", "60", patch=OVERTAKEN)
    (fs.source / "f").write_bytes(b"x" * 5000)
    with held(fs.path / "f") as fd, held(fs.source / "f", os.O_WRONLY | os.O_APPEND) as other:
        assert len(os.pread(fd, 1 << 20, 0)) == 5000
        os.write(other, b"y" * 700)
        wait_until(lambda: len(os.pread(fd, 1 << 20, 0)) == 5700, 10)


CHANGES_FOUND_BY_REQUESTS = (
    OVERTAKEN
    + """
from cleanfs.vfs import open_files
async def run(self): pass
open_files.OpenFiles.run = run
lookup_of = mount.CleanFS.lookup
async def overtaken_lookup(self, parent, name, ctx):
    reply = await lookup_of(self, parent, name, ctx)
    await self._services.notifier.attributes_changed(reply.st_ino)
    return reply
mount.CleanFS.lookup = overtaken_lookup
"""
)
"""Makes the kernel drop lookup replies too, and disables the checks of open files."""


@pytest.mark.skipif(os.geteuid() != 0, reason="a size refresh opens files by handle")
@pytest.mark.parametrize("timeout", [0.2, 1.0], ids=["kernel drops pages", "daemon drops pages"])
@pytest.mark.parametrize("looked_up", [False, True], ids=["", "looked up before"])
def test_an_open_file_is_read_whole_though_no_reply_to_the_reader_takes_effect(
    mount: Mounter, timeout: float, looked_up: bool
) -> None:
    fs = mount("--attr-timeout", str(timeout), patch=CHANGES_FOUND_BY_REQUESTS)
    (fs.source / "f").write_bytes(b"a" * 16384)
    settle()
    with held(fs.path / "f") as fd:
        assert os.pread(fd, 1 << 20, 0) == b"a" * 16384
        for letter, size in (b"b", 5000), (b"c", 16384), (b"d", 20000):
            os.truncate(fs.source / "f", min(size, 5000))
            with held(fs.source / "f", os.O_WRONLY) as other:
                os.pwrite(other, letter * size, 0)
            time.sleep(timeout + 0.05)
            if looked_up:
                os.stat(fs.path / "f")
            assert os.pread(fd, 1 << 20, 0) == letter * size
            assert os.lseek(fd, 0, os.SEEK_END) == size


def opened_after_short_read(fs: MountedFs, flags: int) -> int:
    """Open a file that ends at 8192 for the kernel, by a READ reply, and at 5000 in the source."""
    (fs.source / "f").write_bytes(b"a" * 65536)
    settle()
    fd = os.open(fs.path / "f", flags)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    assert os.pread(fd, 100, 0) == b"a" * 100
    os.truncate(fs.source / "f", 5000)
    assert os.pread(fd, 4096, 8192) == b""
    return fd


@pytest.mark.skipif(os.geteuid() != 0, reason="a size refresh opens files by handle")
def test_a_file_is_read_whole_after_a_short_read(mount: Mounter) -> None:
    """The reader's GETATTR reply has the size that the kernel was sent before."""
    fs = mount("--attr-timeout", "1", patch=CHANGES_FOUND_BY_REQUESTS)
    fd = opened_after_short_read(fs, os.O_RDONLY)
    try:
        with held(fs.source / "f", os.O_WRONLY) as other:
            os.pwrite(other, b"b" * 65536, 0)
        time.sleep(1.05)
        assert os.pread(fd, 1 << 20, 0) == b"b" * 65536
    finally:
        os.close(fd)


def test_an_append_after_a_short_read_overwrites_nothing(mount: Mounter) -> None:
    fs = mount("--attr-timeout", "60")
    fd = opened_after_short_read(fs, os.O_RDWR | os.O_APPEND)
    try:
        with held(fs.source / "f", os.O_WRONLY | os.O_APPEND) as other:
            os.write(other, b"t" * 5000)
        assert os.write(fd, b"more") == 4  # the kernel sends it with offset 8192
    finally:
        os.close(fd)
    assert (fs.source / "f").read_bytes() == b"a" * 5000 + b"t" * 5000 + b"more"


HELD_WRITE = """
from pathlib import Path
import trio
from cleanfs.vfs import handles
write_source = handles.FileHandle._write_source
async def held(self, *args):
    Path({0!r}, "begun").touch()
    while not Path({0!r}, "go").exists():
        await trio.sleep(0.005)
    return await write_source(self, *args)
handles.FileHandle._write_source = held
"""


@pytest.mark.parametrize("prefix", [(), NO_DAC_READ_SEARCH], ids=["by handle", "by path"])
def test_a_file_that_grew_is_read_whole_during_a_write_beyond_its_old_end(
    mount: Mounter, tmp_path: Path, prefix: tuple[str, ...]
) -> None:
    """The kernel ignores sizes until such a write is done, so it has to take the new one before."""
    if prefix and os.geteuid() != 0:
        pytest.skip("only root has a capability to drop")
    fs = mount("--attr-timeout", "60", patch=HELD_WRITE.format(str(tmp_path)), prefix=prefix)
    (fs.source / "d").mkdir()
    (fs.source / "d" / "f").write_bytes(b"a" * 1024)
    settle()
    with held(fs.path / "d" / "f") as reader, ThreadPoolExecutor(2) as others:
        assert os.pread(reader, 65536, 0) == b"a" * 1024
        with held(fs.source / "d" / "f", os.O_WRONLY | os.O_APPEND) as fd:
            os.write(fd, b"b" * 10240)
        with held(fs.path / "d" / "f", os.O_RDWR) as writer:
            write = others.submit(os.pwrite, writer, b"c" * 2048, 3072)
            try:
                wait_until((tmp_path / "begun").exists, 10)
                read = others.submit(os.pread, reader, 65536, 8192)  # no page of the write
                assert read.result(10) == b"b" * 3072
            finally:
                (tmp_path / "go").touch()
            assert write.result(10) == 2048
