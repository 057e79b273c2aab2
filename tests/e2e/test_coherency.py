"""Test that an open sees the source's bytes after changes through the mount and behind its back."""

import fcntl
import mmap
import os
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter
from tests.harness.descriptors import many_files
from tests.harness.mounting import MountedFs, cpu_ticks, mounted, settle, wait_until

ATTR_TIMEOUT = 0.2
SIZE = 2_000_123
FS_IOC_GETFLAGS = 0x80086601
QUICK = ("--attr-timeout", str(ATTR_TIMEOUT))


def expire() -> None:
    """Wait until the kernel's names and attributes have expired."""
    time.sleep(ATTR_TIMEOUT + 0.05)


def noise(seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(SIZE)


def shell(directory: Path, script: str) -> None:
    subprocess.run(["sh", "-ec", script], cwd=directory, check=True, timeout=20, capture_output=True)


@contextmanager
def held(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def cached(fs: MountedFs, name: str, data: bytes) -> None:
    """Make a file and read it through the mount: then cleancache, page cache and kernel have pages."""
    (fs.source / name).write_bytes(data)
    settle()
    for _ in range(2):
        assert (fs.path / name).read_bytes() == data
    assert fs.stats()["puts"] > 0


def same(fs: MountedFs, name: str) -> None:
    """Check that open, fstat, read and mmap through the mount see the content of the source."""
    expected = (fs.source / name).read_bytes()
    with held(fs.path / name) as fd:
        assert os.fstat(fd).st_size == len(expected)
        if expected:
            with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as area:
                assert area[:] == expected
        assert os.read(fd, len(expected) + 1) == expected
    with held(fs.path / name, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, SIZE * 2) as buffer:
        assert os.preadv(fd, [buffer], 0) == len(expected)
        assert buffer[: len(expected)] == expected


IN_PLACE = {
    "append": "echo x >> f",
    "cut": "truncate -s 5 f",
    "cut to a page": "truncate -s 8192 f",
    "empty": ": > f",
    "grow": "truncate -s +10000 f",
    "cut and grow": "truncate -s 5 f; truncate -s 2000123 f",
    "middle": "printf 0123456789 | dd of=f conv=notrunc bs=1 seek=1000000",
    "first byte": "printf '\\001\\002' | dd of=f conv=notrunc bs=1",
    "last byte": "printf 'z' | dd of=f conv=notrunc bs=1 seek=2000122",
    "rewrite": "head -c 2000123 /dev/zero > f",
    "punch a hole": "fallocate -p -o 500000 -l 100000 f",
    "link, change by the link": "ln f g; echo x >> g; rm g",
}


@pytest.mark.parametrize("where", ["mount", "source"])
@pytest.mark.parametrize("change", IN_PLACE)
def test_a_change_in_place_is_seen_by_the_next_open(share: Mounter, change: str, where: str) -> None:
    if change == "punch a hole" and where == "mount":
        pytest.skip("FUSE without a fallocate handler refuses to punch holes")
    fs = share("--attr-timeout", "60")  # so that no timeout can help
    cached(fs, "f", noise())
    flushes = fs.stats()["flushes"]
    shell(fs.path if where == "mount" else fs.source, IN_PLACE[change])
    same(fs, "f")
    assert fs.stats()["flushes"] > flushes
    fs.drop_kernel()
    same(fs, "f")


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


REPLACED = {
    "move over": "printf 'new text' > g; mv g f",
    "move a longer one over": "head -c 3000000 /dev/zero > g; mv g f",
    "remove and create again": "rm f; printf 'again' > f",
    "move away and create again": "mv f old; printf 'again' > f",
    "link over": "printf 'linked' > g; ln -f g f",
    "symbolic link over": "printf 'target' > g; rm f; ln -s g f",
}


@pytest.mark.parametrize("where", ["mount", "source"])
@pytest.mark.parametrize("change", REPLACED)
def test_a_replaced_file_is_seen_after_the_timeout(share: Mounter, change: str, where: str) -> None:
    fs = share(*QUICK)
    cached(fs, "f", noise())
    flushes = fs.stats()["flushes"]
    shell(fs.path if where == "mount" else fs.source, REPLACED[change])
    if where == "source":
        expire()
    same(fs, "f")
    if change == "move away and create again":
        same(fs, "old")
    elif where == "mount":
        assert fs.stats()["flushes"] > flushes


@pytest.mark.parametrize("where", ["mount", "source"])
def test_a_cached_file_moved_over_another_replaces_it(share: Mounter, where: str) -> None:
    fs = share(*QUICK)
    cached(fs, "a", noise(1))
    cached(fs, "b", noise(2))
    shell(fs.path if where == "mount" else fs.source, "mv a b")
    if where == "source":
        expire()
    same(fs, "b")
    assert (fs.path / "b").read_bytes() == noise(1)
    assert not (fs.path / "a").exists()
    assert os.listdir(fs.path) == ["b"]


@pytest.mark.parametrize("where", ["mount", "source"])
def test_a_removed_file_is_missing(share: Mounter, where: str) -> None:
    fs = share(*QUICK)
    cached(fs, "f", noise())
    flushes = fs.stats()["flushes"]
    shell(fs.path if where == "mount" else fs.source, "rm f")
    if where == "source":
        expire()
    else:
        assert fs.stats()["flushes"] > flushes
    assert not (fs.path / "f").exists()
    with pytest.raises(FileNotFoundError):
        (fs.path / "f").read_bytes()


def test_removing_a_file_frees_its_compressed_pages(mount: Mounter) -> None:
    fs = mount(*QUICK)
    cached(fs, "f", bytes(range(256)) * 20_000)
    assert fs.stats()["backend_counters"]["eph_zpages"] > 500
    (fs.path / "f").unlink()
    stats = fs.stats()
    assert stats["backend_counters"]["eph_zpages"] == 0
    assert stats["pagecache_resident"] == 0


def test_a_change_that_restores_size_and_mtime_is_found(mount: Mounter) -> None:
    fs = mount("--attr-timeout", "60")
    cached(fs, "f", noise())
    before = (fs.source / "f").stat()
    with held(fs.source / "f", os.O_WRONLY) as fd:
        os.pwrite(fd, b"changed", 1_000_000)
    os.utime(fs.source / "f", ns=(before.st_atime_ns, before.st_mtime_ns))
    after = (fs.source / "f").stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    found = fs.stats()["changes_found"]
    same(fs, "f")
    assert fs.stats()["changes_found"] > found


@pytest.mark.parametrize("kind", ["disk", "tmpfs"])
def test_changes_within_one_tick_of_the_clock_are_seen(source: Path, mount: Mounter, kind: str) -> None:
    if kind == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "none", source], check=True, timeout=10)
    try:
        fs = mount("--attr-timeout", "60")
        with held(source, os.O_RDONLY):
            for i in range(300):
                with held(source / "f", os.O_WRONLY | os.O_CREAT) as fd:
                    os.pwrite(fd, b"%06d" % i, 5000)
                assert (fs.path / "f").read_bytes()[5000:] == b"%06d" % i
    finally:
        if kind == "tmpfs":
            subprocess.run(["umount", "-l", source], check=True, timeout=10)


def test_changes_by_turns_within_one_tick_are_seen(mount: Mounter) -> None:
    fs = mount("--attr-timeout", "60")
    (fs.source / "f").write_bytes(bytes(10_000))
    model = bytearray(10_000)
    for i in range(200):
        for side in (fs.source, fs.path):
            with held(side / "f", os.O_RDWR) as fd:
                assert os.pread(fd, 20_000, 0) == model
                model[i * 40 : i * 40 + 5] = b"%05d" % (i * 2 + (side == fs.path))
                os.pwrite(fd, model[i * 40 : i * 40 + 5], i * 40)
                assert os.pread(fd, 20_000, 0) == model
    assert (fs.source / "f").read_bytes() == (fs.path / "f").read_bytes() == model


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


def test_an_append_goes_to_the_end_in_the_source(mount: Mounter) -> None:
    fs = mount("--attr-timeout", "60")
    cached(fs, "f", noise())
    for i in range(3):
        shell(fs.source, f"echo source {i} >> f")
        shell(fs.path, f"echo mount {i} >> f")
        same(fs, "f")
    assert (fs.path / "f").read_bytes()[SIZE:].decode().splitlines() == [
        f"{side} {i}" for i in range(3) for side in ("source", "mount")
    ]


def test_an_append_by_an_open_fd_goes_to_the_end_in_the_source(mount: Mounter) -> None:
    fs = mount(*QUICK)
    (fs.source / "f").write_bytes(b"start\n")
    with held(fs.path / "f", os.O_WRONLY | os.O_APPEND) as fd:
        for i in range(3):
            os.write(fd, b"mount\n")
            shell(fs.source, f"echo source {i} >> f")
            same(fs, "f")
        os.write(fd, b"mount\n")
        same(fs, "f")
    assert (
        fs.source / "f"
    ).read_bytes() == b"start\nmount\nsource 0\nmount\nsource 1\nmount\nsource 2\nmount\n"


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


def test_stat_shows_the_change_after_the_timeout(mount: Mounter) -> None:
    fs = mount(*QUICK)
    cached(fs, "f", noise())
    with held(fs.path / "f") as fd:
        shell(fs.source, "truncate -s 7777 f; chmod 600 f")
        expire()
        assert os.fstat(fd).st_size == (fs.path / "f").stat().st_size == 7777
        assert os.fstat(fd).st_ctime_ns == (fs.source / "f").stat().st_ctime_ns
        assert os.pread(fd, SIZE, 0) == noise()[:7777]


def test_a_listing_with_attributes_also_finds_a_change(mount: Mounter) -> None:
    fs = mount(*QUICK)
    cached(fs, "f", noise())
    found = fs.stats()["changes_found"]
    shell(fs.source, "echo x >> f")
    expire()
    with os.scandir(fs.path) as entries:
        assert [entry.stat().st_size for entry in entries] == [SIZE + 2]
    assert fs.stats()["changes_found"] == found + 1


def test_an_unchanged_file_is_not_read_from_the_source_again(mount: Mounter) -> None:
    fs = mount(*QUICK)
    cached(fs, "f", bytes(range(256)) * 8000)
    before = fs.stats()
    for _ in range(3):
        expire()
        fs.drop_kernel()
        assert len((fs.path / "f").read_bytes()) == 2_048_000
    after = fs.stats()
    for name in ("source_read_bytes", "flushes", "changes_found", "doubtful_flushes"):
        assert after[name] == before[name], name
    assert after["succ_gets"] > before["succ_gets"]


def test_own_metadata_changes_flush_at_most_once(mount: Mounter) -> None:
    fs = mount(*QUICK)
    cached(fs, "f", noise())
    shell(fs.path, "chmod 600 f; chown 1:1 f; ln f g; mv f h; rm g; setfattr -n user.x -v y h; touch h")
    expire()
    assert (fs.path / "h").read_bytes() == noise()  # the racy stamps of the changes cost one flush
    before = fs.stats()
    fs.drop_kernel()
    assert (fs.path / "h").read_bytes() == noise()
    after = fs.stats()
    for name in ("source_read_bytes", "changes_found", "doubtful_flushes"):
        assert after[name] == before[name], name


def test_own_changes_do_not_count_as_changes_found(mount: Mounter) -> None:
    fs = mount(*QUICK)
    for number in range(20):
        path = fs.path / str(number)
        path.write_bytes(noise())
        assert path.read_bytes() == noise()
        shell(
            fs.path,
            f"echo x >> {number}; ln {number} l; mv {number} m; rm l; mv m {number}; touch {number}",
        )
        assert path.read_bytes() == noise() + b"x\n"
        path.write_bytes(b"short")  # truncates first
        assert path.read_bytes() == b"short"
    stats = fs.stats()
    assert stats["changes_found"] == 0
    assert stats["doubtful_flushes"] > 0, "the stamps of a recent change prove nothing"


def test_with_coherency_none_the_source_is_not_checked(mount: Mounter) -> None:
    fs = mount("--coherency", "none", *QUICK)
    cached(fs, "f", b"A" * SIZE)
    with held(fs.source / "f", os.O_WRONLY) as fd:
        os.pwrite(fd, b"B" * SIZE, 0)
    expire()
    fs.drop_kernel()
    before = fs.stats()
    assert (fs.path / "f").read_bytes() == b"A" * SIZE
    after = fs.stats()
    assert after["changes_found"] == after["doubtful_flushes"] == 0
    assert after["source_read_bytes"] == before["source_read_bytes"]
    fs.drop()
    assert (fs.path / "f").read_bytes() == b"B" * SIZE


@pytest.mark.parametrize("change", ["append", "cut", "middle", "rewrite"])
def test_with_coherency_none_changes_through_the_mount_are_seen(mount: Mounter, change: str) -> None:
    fs = mount("--coherency", "none", "--attr-timeout", "60")
    cached(fs, "f", noise())
    shell(fs.path, IN_PLACE[change])
    same(fs, "f")


def test_two_mounts_of_one_source_see_changes_of_each_other(
    source: Path, mount: Mounter, tmp_path: Path
) -> None:
    (tmp_path / "second").mkdir()
    one = mount("--attr-timeout", "60")
    with mounted(source, tmp_path / "second", "--attr-timeout", "60") as two:
        (source / "f").write_bytes(bytes(SIZE))
        for i, (writer, reader) in enumerate([(one, two), (two, one)] * 10):
            with held(writer.path / "f", os.O_WRONLY) as fd:
                os.pwrite(fd, b"%d" % i * 300, i * 1000)
            same(reader, "f")


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
        with pytest.raises(OSError, match="Inappropriate ioctl"):
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


def test_with_coherency_none_no_name_is_compared_with_the_source(mount: Mounter) -> None:
    """No one changes it there, so an open makes no further calls."""
    new_reads = (
        "from cleanfs.source import namespace\n"
        "def identify(*_): raise AssertionError('new_reads')\n"
        "namespace.identify = identify\n"
    )
    fs = mount("--coherency", "none", patch=new_reads)
    (fs.path / "f").write_bytes(b"data")
    os.chmod(fs.path / "f", 0o600)
    os.truncate(fs.path / "f", 2)
    assert (fs.path / "f").read_bytes() == b"da"


def test_a_continuously_replaced_name_causes_no_errors(mount: Mounter) -> None:
    """Each time that the name is compared with the source, it has just been replaced there."""
    replaced = """
from cleanfs.source import namespace
new_reads = namespace.identify
def identify(parent, name):
    if name == b"f":
        os.close(os.open("new", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=parent))
        os.rename("new", "f", src_dir_fd=parent, dst_dir_fd=parent)
    return new_reads(parent, name)
namespace.identify = identify
"""
    fs = mount(patch=replaced)
    (fs.source / "f").write_bytes(b"old")
    for _ in range(2):
        assert (fs.path / "f").read_bytes() == b""
        os.chmod(fs.path / "f", 0o600)
        os.truncate(fs.path / "f", 2)
        os.link(fs.path / "f", fs.path / "g")  # looks up two names
        os.unlink(fs.path / "g")


@pytest.mark.parametrize("call", ["stat", "list"])
def test_a_file_found_by_its_new_name_is_not_opened_by_the_old_one(mount: Mounter, call: str) -> None:
    """Log rotation does this: later lines belong into a new file."""
    fs = mount("--attr-timeout", "60")
    (fs.source / "log").write_bytes(b"old")
    os.stat(fs.path / "log")
    os.rename(fs.source / "log", fs.source / "log.1")
    if call == "stat":
        os.stat(fs.path / "log.1")
    else:
        with os.scandir(fs.path) as entries:
            assert [entry.stat().st_size for entry in entries] == [3]
    wait_until(lambda: not (fs.path / "log").exists(), 5)
    with (fs.path / "log").open("ab") as log:
        log.write(b"new")
    assert (fs.source / "log.1").read_bytes() == b"old"
    assert (fs.source / "log").read_bytes() == b"new"


def test_a_write_is_appended_while_its_file_has_o_append(source: Path, mount: Mounter) -> None:
    """The program sets and clears it after the open. The kernel believes that the file ends at 3."""
    file = source / "f"
    file.write_bytes(b"old")
    fs = mount("--coherency", "open", "--attr-timeout", "60")
    fd = os.open(fs.path / "f", os.O_RDWR)
    try:
        assert os.pread(fd, 9, 0) == b"old"
        with file.open("ab") as theirs:
            theirs.write(b"theirs")
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        os.write(fd, b"ours")
        assert file.read_bytes() == b"oldtheirsours"
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        os.pwrite(fd, b"new", 3)
        assert file.read_bytes() == b"oldnewirsours"
    finally:
        os.close(fd)


def test_pages_of_a_mapping_of_an_o_append_file_are_not_appended(source: Path, mount: Mounter) -> None:
    file = source / "f"
    file.write_bytes(b"old")
    fs = mount("--coherency", "open", "--attr-timeout", "60")
    fd = os.open(fs.path / "f", os.O_RDWR | os.O_APPEND)
    try:
        with mmap.mmap(fd, 3) as area:
            area[0] = ord("O")
            with file.open("ab") as theirs:
                theirs.write(b"theirs")
            area.flush()
        assert file.read_bytes() == b"Oldtheirs"
    finally:
        os.close(fd)
