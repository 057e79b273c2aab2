"""Test errors and wrong replies of the source: which calls get which error."""

import contextlib
import errno
import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.faults.site import (
    DATA,
    PAGE,
    check_alive,
    fails,
    make_directories,
    on,
    opened,
    program,
)
from tests.harness.faulty import Faulty, faulty
from tests.harness.mounting import (
    MountedFs,
    end_of,
    wait_until,
)


def test_an_error_in_the_middle_of_a_file_is_seen_only_there(served: Faulty, fs: MountedFs) -> None:
    served.fault("read", errno.EIO, "f", start=100_000, stop=100_001)
    bad = 100_000 // PAGE * PAGE
    with opened(fs.path / "f") as fd:
        assert os.pread(fd, bad, 0) == DATA[:bad]
        with fails(errno.EIO):
            os.pread(fd, 10, bad)
        assert os.pread(fd, bad + 1, 0) == DATA[:bad], "the readable part is returned"
        assert os.pread(fd, 1 << 20, bad + PAGE) == DATA[bad + PAGE :]
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapping:
            assert mapping[bad - 1] == DATA[bad - 1]
            served.heal()
            assert mapping[bad : bad + 10] == DATA[bad : bad + 10]
        assert os.pread(fd, 1 << 20, 0) == DATA


def test_access_to_an_unreadable_page_of_a_mapping_raises_sigbus(served: Faulty, fs: MountedFs) -> None:
    served.fault("read", errno.EIO, "f", start=100_000, stop=100_001)
    code = "import mmap; f = open(sys.argv[1] + '/f', 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1)\n"
    with program(code + "assert m[0] == 0 and m[200_000] == 200_000 % 256; m[100_000]", fs.path) as p:
        assert end_of(p, 10) == -signal.SIGBUS
    with program(code + "assert m[0] == 0 and m[200_000] == 200_000 % 256", fs.path) as p:
        assert end_of(p, 10) == 0


def test_an_error_of_read_ahead_is_not_seen(tmp_path: Path) -> None:
    source = make_directories(tmp_path)
    with faulty(*source) as served, on(served.path, tmp_path, "--read-ahead", "1M") as fs:
        served.fault("read", errno.EIO, "f", start=100_000, stop=100_001)
        with opened(fs.path / "f") as fd:
            for at in range(0, 90_000, 10_000):
                assert os.read(fd, 10_000) == DATA[at : at + 10_000]
            assert len(os.read(fd, 10_000)) == 100_000 // PAGE * PAGE - 90_000
            with fails(errno.EIO):
                os.read(fd, 10_000)
        served.heal()
        assert (fs.path / "f").read_bytes() == DATA


def test_an_error_beside_the_requested_bytes_is_not_seen(tmp_path: Path) -> None:
    """Pages of cleanfs are larger than the reads of the program."""
    source = make_directories(tmp_path)
    with faulty(*source) as served, on(served.path, tmp_path, "--page-size", "64K") as fs:
        served.fault("read", errno.EIO, "f", start=100_000, stop=100_001)
        with opened(fs.path / "f") as fd:
            assert os.pread(fd, PAGE, 65536) == DATA[:PAGE]
            assert os.pread(fd, PAGE, 31 * PAGE) == DATA[:PAGE]
            with fails(errno.EIO):
                os.pread(fd, PAGE, 24 * PAGE)
        served.heal()
        assert (fs.path / "f").read_bytes() == DATA


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_after_a_failed_write_the_mount_matches_the_source(
    served: Faulty, fs: MountedFs, number: int
) -> None:
    """Half of the write is done, and its pages were cached before."""
    assert (fs.path / "f").read_bytes() == DATA
    with opened(fs.path / "f", os.O_RDWR) as fd, mmap.mmap(fd, 0) as mapping:
        assert mapping[: 1 << 16] == DATA[: 1 << 16]
        served.fault("write", number, "f", start=20_000)
        with fails(number):
            os.pwrite(fd, b"x" * 40_000, 0)
        with fails(number):
            os.pwrite(fd, b"y" * 10, 30_000)
        os.pwrite(fd, b"z" * 10, 5_000)
        expected = bytearray(DATA)
        expected[:20_000] = b"x" * 20_000
        expected[5_000:5_010] = b"z" * 10
        assert (served.real / "f").read_bytes() == expected
        assert os.pread(fd, len(DATA), 0) == expected
        wait_until(lambda: mapping[:] == expected)
        assert (fs.path / "f").read_bytes() == expected


def test_an_append_that_is_cut_off_returns_the_bytes_written(served: Faulty, fs: MountedFs) -> None:
    served.fault("write", errno.ENOSPC, "other", start=30_000)
    with opened(fs.path / "other", os.O_WRONLY | os.O_APPEND) as fd:
        assert os.write(fd, b"x" * 20_000) == 5_000
        with fails(errno.ENOSPC):
            os.write(fd, b"x" * 15_000)
        served.heal()
        assert os.write(fd, b"x" * 15_000) == 15_000
    assert (fs.path / "other").read_bytes() == b"other" * 5000 + b"x" * 20_000


def test_a_write_of_no_bytes_by_the_source_is_an_error(served: Faulty, fs: MountedFs) -> None:
    served.fault("write", short=0)
    with opened(fs.path / "f", os.O_WRONLY) as fd, fails(errno.EIO):
        os.pwrite(fd, b"x", 0)
    assert (fs.path / "f").read_bytes() == DATA


def test_short_reads_and_writes_are_completed(served: Faulty, fs: MountedFs) -> None:
    served.fault("read", short=1000)
    served.fault("write", short=1000)
    assert (fs.path / "f").read_bytes() == DATA
    (fs.path / "f").write_bytes(DATA[::-1])
    assert (served.real / "f").read_bytes() == DATA[::-1]
    assert (fs.path / "f").read_bytes() == DATA[::-1]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("op", ["fsync", "flush"])
def test_an_error_of_fsync_or_close_is_reported_once(
    served: Faulty, fs: MountedFs, op: str, number: int
) -> None:
    served.fault(op, number, "f", count=1)
    fd = os.open(fs.path / "f", os.O_RDWR)
    os.write(fd, b"x")
    with fails(number):
        os.fsync(fd) if op == "fsync" else os.close(os.dup(fd))
    os.fsync(fd)
    os.close(fd)
    assert (fs.path / "f").read_bytes() == b"x" + DATA[1:]


@pytest.mark.parametrize(
    "op", ["lookup", "getattr", "open", "read", "opendir", "readdir", "statfs", "rename", "unlink"]
)
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_an_error_has_no_effect_afterwards(served: Faulty, fs: MountedFs, op: str, number: int) -> None:
    calls: dict[str, Callable[[], object]] = {
        "opendir": lambda: os.listdir(fs.path),
        "readdir": lambda: os.listdir(fs.path),
        "statfs": lambda: os.statvfs(fs.path),
        "rename": lambda: os.rename(fs.path / "f", fs.path / "g"),
        "unlink": lambda: os.unlink(fs.path / "f"),
    }
    call = calls.get(op, (fs.path / "f").read_bytes)
    served.fault(op, number)
    with fails(number):
        call()
    check_alive(fs)
    served.heal()
    assert (fs.path / "f").read_bytes() == DATA, "an error is not a deletion"
    assert sorted(os.listdir(fs.path)) == ["f", "other"]
    call()


def test_an_error_of_the_source_is_not_cached_as_absence(tmp_path: Path) -> None:
    """This holds even with long timeouts for absent names."""
    source = make_directories(tmp_path)
    options = ("--coherency", "none", "--attr-timeout", "1000")
    with faulty(*source) as served, on(served.path, tmp_path, *options) as fs:
        for op, number in (("lookup", errno.EIO), ("lookup", errno.ESTALE), ("getattr", errno.EIO)):
            served.fault(op, number)
            with fails(number):
                (fs.path / "f").read_bytes()
            served.heal()
        assert (fs.path / "f").read_bytes() == DATA
        # These operations are done and then reported as failed.
        served.fault("make", errno.EIO, late=True)
        served.fault("rename", errno.EIO, late=True)
        served.fault("unlink", errno.EIO, late=True)
        assert not (fs.path / "new").exists()
        with fails(errno.EIO):
            (fs.path / "new").mkdir()
        with fails(errno.EIO):
            os.rename(fs.path / "f", fs.path / "g")
        with fails(errno.EIO):
            os.unlink(fs.path / "other")
        served.heal()
        wait_until((fs.path / "new").is_dir)
        wait_until(lambda: (fs.path / "g").exists() and not (fs.path / "f").exists())
        wait_until(lambda: not (fs.path / "other").exists())


def test_a_failing_getattr_after_a_change_does_not_fail_the_change(
    served: Faulty, fs: MountedFs
) -> None:
    with opened(fs.path / "f") as fd:
        served.fault("getattr", errno.EIO, "f", count=1)
        with contextlib.suppress(OSError):
            os.fstat(fd)
    (fs.path / "f").rename(fs.path / "g")
    assert (fs.path / "g").read_bytes() == DATA


def test_a_file_with_a_new_handle_in_the_source_is_found_again(served: Faulty, fs: MountedFs) -> None:
    """After a restart of a server, held inodes stay stale, but the name leads to the file."""
    assert (fs.path / "f").read_bytes() == DATA
    os.stat(fs.path / "f")
    served.replace_inodes()
    os.listdir(served.path)  # the source's kernel finds this out
    os.stat(served.path / "f")

    def reads() -> bool:
        try:
            return (fs.path / "f").read_bytes() == DATA
        except OSError:
            return False

    wait_until(reads, 5)
    assert os.stat(fs.path / "f").st_size == len(DATA)


@pytest.mark.parametrize("size", [0, 10, 20_000, 30_000])
def test_a_wrong_size_has_no_lasting_effect(served: Faulty, fs: MountedFs, size: int) -> None:
    data = b"other" * 5000
    assert (fs.path / "other").read_bytes() == data
    served.fault("attributes", name="other", size=size)
    with opened(fs.path / "other") as fd:
        assert os.pread(fd, 100_000, 0) in (data[:size], data)
    served.heal()
    wait_until(lambda: (fs.path / "other").read_bytes() == data, 5)


def test_stamps_that_go_backwards_are_a_change(served: Faulty, fs: MountedFs) -> None:
    assert (fs.path / "f").read_bytes() == DATA
    with (served.real / "f").open("r+b") as file:
        file.write(b"new")
    served.fault("attributes", name="f", backwards_ns=10**10)
    assert (fs.path / "f").read_bytes() == b"new" + DATA[3:]
    served.heal()
    with (served.real / "f").open("r+b") as file:
        file.write(b"NEW")
    assert (fs.path / "f").read_bytes() == b"NEW" + DATA[3:]
