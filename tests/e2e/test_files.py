"""Test reads, writes and attributes of regular files on a real mount."""

import ctypes
import errno
import fcntl
import mmap
import os
import random
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter, Place
from tests.harness.mounting import as_user, wait_until

UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2
libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def utimensat(path: Path, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    times = (ctypes.c_long * 4)(*atime, *mtime)
    assert libc.utimensat(-100, os.fsencode(path), times, 0) == 0, os.strerror(ctypes.get_errno())


def test_reads_at_any_offset_and_size(place: Place) -> None:
    data = noise(300_001)
    (place.source / "f").write_bytes(data)
    rng = random.Random(1)
    with opened(place.path / "f", os.O_RDONLY) as fd:
        for _ in range(300):
            offset, size = rng.randrange(310_000), rng.randrange(70_000)
            assert os.pread(fd, size, offset) == data[offset : offset + size]
        assert os.pread(fd, 10, 300_001) == b""


def test_a_written_file_is_the_same_in_the_source(place: Place) -> None:
    data = noise(1_234_567)
    (place.path / "f").write_bytes(data)
    assert (place.source / "f").read_bytes() == data
    place.fs.drop()
    assert (place.path / "f").read_bytes() == data


def test_two_appending_fds_overwrite_nothing(place: Place) -> None:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with opened(place.path / "f", flags) as one, opened(place.path / "f", flags) as two:
        for i in range(100):
            os.write(one, b"a%03d" % i * 50)
            os.write(two, b"b%03d" % i * 50)
    expected = b"".join(b"a%03d" % i * 50 + b"b%03d" % i * 50 for i in range(100))
    assert (place.source / "f").read_bytes() == expected
    assert (place.path / "f").read_bytes() == expected


@pytest.mark.parametrize("options", [(), ("--coherency", "none")], ids=["open", "alone"])
def test_after_o_append_is_cleared_a_write_goes_to_its_offset(
    mount: Mounter, source: Path, options: tuple[str, ...]
) -> None:
    fs = mount(*options)
    for path in fs.path / "f", source / "twin":
        with opened(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as fd:
            for turn in range(3):
                fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
                os.write(fd, b"0123456789" * 500)
                fcntl.fcntl(fd, fcntl.F_SETFL, 0)
                os.pwrite(fd, b"header %d" % turn, 0)
                os.pwrite(fd, b"within %d" % turn, 1234)
                assert os.fstat(fd).st_size < 20_000
                os.pwrite(fd, b"a page %d" % turn, 4096)
                os.pwrite(fd, b"beyond %d" % turn, 5000 * turn + 5001)
    assert (source / "f").read_bytes() == (source / "twin").read_bytes() == (fs.path / "f").read_bytes()


@pytest.mark.parametrize("by_fd", [False, True])
def test_truncated_data_never_returns(place: Place, by_fd: bool) -> None:
    file = place.path / "f"
    file.write_bytes(noise(50_000))
    expected = file.read_bytes()[:12_345]
    with opened(file, os.O_RDWR) as fd:
        target = fd if by_fd else file
        os.truncate(target, 12_345)
        assert os.pread(fd, 60_000, 0) == expected
        os.truncate(target, 40_000)
        assert os.pread(fd, 60_000, 0) == expected + bytes(40_000 - 12_345)
        os.truncate(target, 0)
        assert os.pread(fd, 10, 0) == b""
    assert (place.source / "f").stat().st_size == 0


@pytest.mark.parametrize("access", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND])
def test_o_trunc_empties_a_cached_file(place: Place, access: int) -> None:
    file = place.path / "f"
    file.write_bytes(noise(100_000))
    assert len(file.read_bytes()) == 100_000
    with opened(file, access | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0
        assert (place.source / "f").stat().st_size == 0
        os.write(fd, b"new")
        os.ftruncate(fd, 6000)
    assert file.read_bytes() == b"new" + bytes(5997)


def test_a_sparse_file_stays_sparse_and_reads_zeros(place: Place) -> None:
    with opened(place.path / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"end", 3 << 20)
        assert os.pread(fd, 5000, 1 << 20) == bytes(5000)
        assert os.fstat(fd).st_blocks == (place.source / "f").stat().st_blocks < 100
    place.fs.drop()
    assert (place.path / "f").read_bytes() == bytes(3 << 20) + b"end"


def test_offsets_beyond_4_gib_are_not_truncated(place: Place) -> None:
    start = (4 << 30) - 5000
    data = noise(10_000)
    with opened(place.path / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"low", 0)
        os.pwrite(fd, data, start)
        os.ftruncate(fd, 5 << 30)
        for _ in range(2):
            assert os.pread(fd, 20_000, start) == data + bytes(10_000)
            assert os.pread(fd, 3, 0) == b"low"
            place.fs.control("drop").write_text("3")
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.fstat(fd).st_size == 5 << 30
    with opened(place.source / "f", os.O_RDONLY) as fd:
        assert os.pread(fd, 10_000, start) == data


def test_a_mapped_file_reads_like_the_source(place: Place) -> None:
    data = noise(3_000_000)
    (place.source / "f").write_bytes(data)
    with opened(place.path / "f", os.O_RDONLY) as fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ) as area:
        assert area[:] == data
        assert area[2_999_990:] == data[-10:]


def test_writes_to_a_mapping_reach_the_source(place: Place) -> None:
    (place.source / "f").write_bytes(bytes(100_000))
    with opened(place.path / "f", os.O_RDWR) as fd, mmap.mmap(fd, 0) as area:
        area[5000:5003] = b"one"
        area.flush()
        assert (place.source / "f").read_bytes()[5000:5003] == b"one"
        area[90_000:90_003] = b"two"
    assert (place.source / "f").read_bytes()[90_000:90_003] == b"two"
    assert (place.path / "f").read_bytes() == (place.source / "f").read_bytes()


def test_a_mapping_and_write_calls_see_each_other(place: Place) -> None:
    (place.path / "f").write_bytes(bytes(20_000))
    with opened(place.path / "f", os.O_RDWR) as fd, mmap.mmap(fd, 0) as area:
        area[0:4] = b"mmap"
        assert os.pread(fd, 4, 0) == b"mmap"
        os.pwrite(fd, b"write", 10_000)
        assert area[10_000:10_005] == b"write"
        area[10_005:10_009] = b"mmap"
    assert (place.source / "f").read_bytes()[10_000:10_009] == b"writemmap"


def test_a_private_mapping_changes_nothing(place: Place) -> None:
    (place.path / "f").write_bytes(b"x" * 5000)
    with (
        opened(place.path / "f", os.O_RDONLY) as fd,
        mmap.mmap(fd, 0, access=mmap.ACCESS_COPY) as area,
    ):
        area[:10] = b"y" * 10
    assert (place.source / "f").read_bytes() == b"x" * 5000


def test_o_direct_reads_and_writes(place: Place) -> None:
    data = noise(100_000)
    (place.source / "f").write_bytes(data)
    assert (place.path / "f").read_bytes() == data
    with (
        opened(place.path / "f", os.O_RDWR | os.O_DIRECT) as fd,
        mmap.mmap(-1, 1 << 17) as buffer,
    ):
        assert os.preadv(fd, [buffer], 0) == 100_000
        assert buffer[:100_000] == data
        buffer[:8192] = noise(8192, 2)
        assert os.pwritev(fd, [memoryview(buffer)[:8192]], 4096) == 8192
        expected = data[:4096] + noise(8192, 2) + data[4096 + 8192 :]
        assert (place.source / "f").read_bytes() == expected
        assert (place.path / "f").read_bytes() == expected
        assert os.preadv(fd, [buffer], 4096) == 100_000 - 4096
        assert buffer[: 100_000 - 4096] == expected[4096:]


def test_a_buffered_fd_sees_direct_writes(place: Place) -> None:
    (place.path / "f").write_bytes(bytes(16_384))
    with (
        opened(place.path / "f", os.O_RDONLY) as buffered,
        opened(place.path / "f", os.O_WRONLY | os.O_DIRECT) as direct,
        mmap.mmap(-1, 4096) as buffer,
    ):
        for i in range(1, 20):
            buffer[:] = bytes([i]) * 4096
            os.pwritev(direct, [buffer], 4096)
            assert os.pread(buffered, 4096, 4096) == bytes([i]) * 4096


def test_a_reader_follows_a_file_that_grows_through_the_mount(place: Place) -> None:
    with (
        opened(place.path / "f", os.O_WRONLY | os.O_CREAT) as writer,
        opened(place.path / "f", os.O_RDONLY) as reader,
    ):
        for i in range(200):
            line = b"%d," % i * 77
            os.write(writer, line)
            assert os.read(reader, 10_000) == line
        assert os.read(reader, 1) == b""


def test_a_reader_follows_a_file_that_grows_in_the_source(place: Place) -> None:
    (place.source / "f").write_bytes(b"start")
    with opened(place.path / "f", os.O_RDONLY) as reader, (place.source / "f").open("ab", 0) as grows:
        assert os.read(reader, 10_000) == b"start"
        for i in range(3):
            more = b"%d" % i * 1500
            grows.write(more)
            got = b""

            def arrived(more: bytes = more) -> bool:
                nonlocal got
                got += os.read(reader, 10_000)
                return len(got) >= len(more)

            wait_until(arrived, 3)
            assert got == more


@pytest.mark.parametrize("where", ["mount", "source"])
def test_an_open_file_without_a_name_still_works(place: Place, where: str) -> None:
    data = noise(200_000)
    (place.source / "f").write_bytes(data)
    with opened(place.path / "f", os.O_RDWR) as fd:
        assert os.read(fd, 100) == data[:100]
        ((place.path if where == "mount" else place.source) / "f").unlink()
        place.fs.control("drop").write_text("3")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, 200_000, 0) == data
        os.pwrite(fd, b"new", 150_000)
        assert os.pread(fd, 5, 149_999) == data[149_999:150_000] + b"new" + data[150_003:150_004]
        os.ftruncate(fd, 10)
        os.fchmod(fd, 0o600)
        wait_until(lambda: os.fstat(fd).st_nlink == 0, 2)
        assert (os.fstat(fd).st_size, stat.S_IMODE(os.fstat(fd).st_mode)) == (10, 0o600)
    time.sleep(0.25)
    assert not (place.path / "f").exists()


def test_a_file_replaced_by_a_rename_stays_readable_through_open_fds(place: Place) -> None:
    (place.path / "old").write_bytes(b"old" * 5000)
    (place.path / "new").write_bytes(b"new" * 5000)
    with opened(place.path / "old", os.O_RDWR) as fd:
        (place.path / "new").rename(place.path / "old")
        os.pwrite(fd, b"OLD", 0)
        assert os.pread(fd, 20_000, 0) == b"OLD" + b"old" * 4999
    assert (place.path / "old").read_bytes() == b"new" * 5000


def test_fsync_of_files_and_directories(place: Place) -> None:
    with opened(place.path / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"data")
        os.fsync(fd)
        os.fdatasync(fd)
        assert (place.source / "f").read_bytes() == b"data"
    with opened(place.path / "f", os.O_RDONLY) as fd:
        os.fsync(fd)
    with opened(place.path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)
        os.fdatasync(fd)


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC, os.O_NOATIME, os.O_NONBLOCK, os.O_NOFOLLOW])
def test_open_accepts_the_rarer_flags(place: Place, flag: int) -> None:
    with opened(place.path / "f", os.O_RDWR | os.O_CREAT | flag) as fd:
        os.write(fd, b"x" * 10_000)
    with opened(place.path / "f", os.O_RDWR | flag) as fd:
        os.pwrite(fd, b"y", 5000)
        assert os.pread(fd, 3, 4999) == b"xyx"


def test_a_copy_by_file_positions_and_an_allocation(place: Place) -> None:
    data = noise(100_000)
    (place.path / "a").write_bytes(data)
    with (
        opened(place.path / "a", os.O_RDONLY) as a,
        opened(place.path / "b", os.O_RDWR | os.O_CREAT) as b,
    ):
        copied = 0
        while copied < 100_000:
            copied += os.copy_file_range(a, b, 100_000 - copied)
        os.posix_fallocate(b, 0, 150_000)
        assert os.lseek(b, 0, os.SEEK_DATA) == 0
    assert (place.source / "b").read_bytes() == data + bytes(50_000)
    assert (place.path / "b").read_bytes() == data + bytes(50_000)


def test_a_program_on_the_mount_runs(place: Place) -> None:
    (place.path / "true").write_bytes(Path("/bin/true").read_bytes())
    (place.path / "true").chmod(0o755)
    subprocess.run([place.path / "true"], check=True, timeout=10)


def test_a_write_is_visible_in_size_and_times_at_once(place: Place) -> None:
    with opened(place.path / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.utime(fd, ns=(1, 1))
        assert os.fstat(fd).st_mtime_ns == 1
        os.write(fd, b"12345")
        after = os.fstat(fd)
        there = (place.source / "f").stat()
        assert after.st_size == 5
        assert (after.st_mtime_ns, after.st_ctime_ns) == (there.st_mtime_ns, there.st_ctime_ns)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_chmod_chown_and_times_reach_the_source(place: Place, kind: str) -> None:
    path, there = place.path / "x", place.source / "x"
    path.mkdir() if kind == "directory" else path.touch()
    path.chmod(0o4751)
    assert stat.S_IMODE(there.stat().st_mode) == stat.S_IMODE(path.stat().st_mode) == 0o4751
    os.chown(path, 1234, -1)
    os.chown(path, -1, 2345)
    assert (there.stat().st_uid, there.stat().st_gid) == (1234, 2345)
    os.utime(path, ns=(1_111_111_111_222_333_444, 1_999_999_999_888_777_666))
    assert there.stat().st_atime_ns == path.stat().st_atime_ns == 1_111_111_111_222_333_444
    assert there.stat().st_mtime_ns == path.stat().st_mtime_ns == 1_999_999_999_888_777_666
    os.utime(path, ns=(-1_500_000_000, -2_500_000_001))
    assert there.stat().st_mtime_ns == path.stat().st_mtime_ns == -2_500_000_001


def test_utimens_omit_keeps_a_time_and_now_sets_the_present(place: Place) -> None:
    file, there = place.path / "f", place.source / "f"
    file.touch()
    os.utime(file, ns=(10**9, 2 * 10**9))
    utimensat(file, (0, UTIME_OMIT), (7, 8))
    assert (there.stat().st_atime_ns, there.stat().st_mtime_ns) == (10**9, 7 * 10**9 + 8)
    utimensat(file, (5, 6), (0, UTIME_OMIT))
    assert (there.stat().st_atime_ns, there.stat().st_mtime_ns) == (5 * 10**9 + 6, 7 * 10**9 + 8)
    before = time.time_ns()
    utimensat(file, (0, UTIME_OMIT), (0, UTIME_NOW))
    assert there.stat().st_atime_ns == 5 * 10**9 + 6
    assert before - 20_000_000 <= there.stat().st_mtime_ns <= time.time_ns()
    utimensat(file, (0, UTIME_NOW), (3, 4))
    assert before - 20_000_000 <= there.stat().st_atime_ns <= time.time_ns()
    assert there.stat().st_mtime_ns == 3 * 10**9 + 4


def test_a_symbolic_link_has_its_own_owner_and_times(place: Place) -> None:
    (place.path / "f").touch()
    (place.path / "link").symlink_to("f")
    before = (place.source / "f").stat()
    os.chown(place.path / "link", 1234, 2345, follow_symlinks=False)
    os.utime(place.path / "link", ns=(5, 6), follow_symlinks=False)
    there = (place.source / "link").lstat()
    assert (there.st_uid, there.st_gid, there.st_mtime_ns) == (1234, 2345, 6)
    assert (place.source / "f").stat() == before


CLEARING = {
    "write": "os.write(os.open('f', os.O_WRONLY), b'x')",
    "append": "os.write(os.open('f', os.O_WRONLY | os.O_APPEND), b'x')",
    "direct": "os.writev(os.open('f', os.O_WRONLY | os.O_DIRECT), [mmap.mmap(-1, 4096)])",
    "truncate": "os.truncate('f', 3)",
    "ftruncate": "os.ftruncate(os.open('f', os.O_WRONLY), 3)",
    "O_TRUNC": "os.open('f', os.O_WRONLY | os.O_TRUNC)",
    "mmap": "m = mmap.mmap(os.open('f', os.O_RDWR), 5); m[0] = 1; m.close()",
    "chgrp": "os.chown('f', -1, 34567)",
    "read": "os.read(os.open('f', os.O_RDONLY), 5)",
}


@pytest.mark.parametrize("mode", [0o6777, 0o2767], ids=oct)
@pytest.mark.parametrize("call", CLEARING)
def test_set_id_bits_are_cleared_as_on_a_plain_file_system(place: Place, call: str, mode: int) -> None:
    outcomes = []
    for directory, seen in (place.path, place.source), (place.plain, place.plain):
        file = directory / "f"
        file.write_bytes(b"hello")
        os.chown(file, 12345, 23456)
        file.chmod(mode)
        printed = as_user(directory, CLEARING[call], groups=(34567,))
        outcomes.append((printed, oct(stat.S_IMODE((seen / "f").stat().st_mode))))
    assert outcomes[0] == outcomes[1]
    assert stat.S_IMODE((place.path / "f").stat().st_mode) == int(outcomes[0][1], 8)


CAPABILITIES = {
    "root without CAP_FSETID": ["--inh-caps", "-fsetid", "--bounding-set", "-fsetid"],
    "a user with CAP_FSETID": [
        *("--reuid", "12345", "--regid", "23456", "--groups", "34567"),
        *("--inh-caps", "+fsetid", "--ambient-caps", "+fsetid"),
    ],
}


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) is not installed")
@pytest.mark.parametrize("who", CAPABILITIES)
@pytest.mark.parametrize("call", ["write", "append", "direct", "truncate", "ftruncate", "O_TRUNC"])
def test_set_id_bits_are_cleared_without_a_capability_whoever_the_user_is(
    place: Place, call: str, who: str
) -> None:
    code = f"import mmap, os; {CLEARING[call]}"
    modes = []
    for directory, seen in (place.path, place.source), (place.plain, place.plain):
        file = directory / "f"
        file.write_bytes(b"hello")
        os.chown(file, 12345, 23456)
        file.chmod(0o6777)
        command = ["setpriv", *CAPABILITIES[who], sys.executable, "-c", code]
        subprocess.run(command, cwd=directory, check=True, timeout=30)
        modes.append(oct(stat.S_IMODE((seen / "f").stat().st_mode)))
    assert modes[0] == modes[1] == ("0o777" if who.startswith("root") else "0o6777")
    assert oct(stat.S_IMODE((place.path / "f").stat().st_mode)) == modes[1]


def write_some(fd: int, data: bytes) -> int:
    """Return the bytes written or the negative errno, as the write(2) system call does."""
    try:
        return os.write(fd, data)
    except OSError as exc:
        return -(exc.errno or 0)


def test_a_full_source_raises_enospc_and_keeps_its_data(source: Path, mount: Mounter) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", source], check=True, timeout=10)
    try:
        fs = mount()
        (fs.path / "kept").write_bytes(b"k" * 100_000)
        with opened(fs.path / "f", os.O_RDWR | os.O_CREAT) as fd:
            written = 0
            while (count := write_some(fd, b"w" * 100_000)) > 0:
                written += count
                assert written < 2 << 20
            assert count == -errno.ENOSPC
            assert os.pread(fd, written, 0) == b"w" * written
            assert (fs.path / "f").read_bytes() == (source / "f").read_bytes()
            os.ftruncate(fd, 0)
            assert os.pwrite(fd, b"again", 0) == 5
        assert (fs.path / "f").read_bytes() == b"again"
        assert (fs.path / "kept").read_bytes() == b"k" * 100_000
    finally:
        subprocess.run(["umount", "-l", source], check=True, timeout=10)


def overwrite(fd: int, model: bytearray, rng: random.Random) -> None:
    offset, data = rng.randrange(400_000), rng.randbytes(rng.choice((1, 100, 4096, 50_000)))
    os.pwrite(fd, data, offset)
    model.extend(bytes(max(offset + len(data) - len(model), 0)))
    model[offset : offset + len(data)] = data


def cut(fd: int, model: bytearray, rng: random.Random) -> None:
    size = rng.randrange(450_000)
    os.ftruncate(fd, size)
    model[size:] = bytes(max(size - len(model), 0))


def forget(fd: int, model: bytearray, rng: random.Random) -> None:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


OPTIONS: list[tuple[str, ...]] = [
    ("--page-size", "64K"),
    ("--page-size", "1M", "--page-cache", "4M"),
    ("--page-cache", "0"),
    ("--page-cache", "100K"),
    ("--backend", "none"),
    ("--backend", "none", "--page-cache", "0"),
    ("--compression", "lz4hc:3", "--page-cache", "64K", "--pool-limit", "1M"),
    ("--shared-pool", "5b1c1d56-7f3e-4b6c-9a63-51d1f5b3c001", "--page-cache", "64K"),
    ("--attr-timeout", "0"),
    ("--coherency", "none"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_random_changes_are_read_back_with_any_options(
    mount: Mounter, options: tuple[str, ...]
) -> None:
    fs = mount(*options)
    rng = random.Random(42)
    model = bytearray()
    steps: tuple[Callable[[int, bytearray, random.Random], None], ...] = (overwrite, cut, forget)
    with opened(fs.path / "f", os.O_RDWR | os.O_CREAT) as fd:
        for _ in range(150):
            rng.choices(steps, (6, 1, 3))[0](fd, model, rng)
            offset, size = rng.randrange(450_000), rng.randrange(100_000)
            assert os.pread(fd, size, offset) == model[offset : offset + size]
            assert os.fstat(fd).st_size == len(model)
    assert (fs.source / "f").read_bytes() == model
    assert (fs.path / "f").read_bytes() == model
