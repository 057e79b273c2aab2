"""Test fallocate, holes, and copies that the kernel makes, on a real mount."""

import mmap
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter, Place
from tests.harness.mounting import MountedFs, as_user
from tests.harness.ranges import KEEP_SIZE, PUNCH, ZERO, fallocate

PAGE = mmap.PAGESIZE
DATA = bytes(range(1, 256)) * 1028  # some 64 pages, without a zero
CHANGED = DATA[: 2 * PAGE + 10] + bytes(3 * PAGE) + DATA[5 * PAGE + 10 :]
"""DATA after zeros were written over three pages from the third one on, and 10 bytes further."""

COHERENCIES = (("--coherency", "open"), ("--coherency", "none"), ("--coherency", "none", "--writeback"))


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CREAT, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture(params=COHERENCIES, ids=["open", "none", "writeback"])
def fs(request: pytest.FixtureRequest, share: Mounter) -> MountedFs:
    return share(*request.param)


@pytest.mark.parametrize("mode", [PUNCH | KEEP_SIZE, ZERO, ZERO | KEEP_SIZE])
def test_zeros_are_seen_at_once_however_the_file_is_read(fs: MountedFs, mode: int) -> None:
    (fs.source / "f").write_bytes(DATA)
    with opened(fs.path / "f") as fd, mmap.mmap(fd, len(DATA), prot=mmap.PROT_READ) as mapping:
        assert mapping[:] == DATA == os.pread(fd, len(DATA), 0)
        fallocate(fd, mode, 2 * PAGE + 10, 3 * PAGE)
        assert mapping[:] == CHANGED
        assert os.pread(fd, len(DATA), 0) == CHANGED
        assert (fs.source / "f").read_bytes() == CHANGED
        with opened(fs.path / "f", os.O_RDONLY | os.O_DIRECT) as direct:
            assert os.read(direct, len(DATA)) == CHANGED
        fs.drop_kernel()  # now from what cleanfs caches
        assert (fs.path / "f").read_bytes() == CHANGED
        assert os.fstat(fd).st_size == len(DATA)


def test_zeros_are_seen_in_the_caches_of_cleanfs(mount: Mounter) -> None:
    fs = mount("--coherency", "none")
    (fs.source / "f").write_bytes(DATA)
    with opened(fs.path / "f") as fd:
        for _ in range(2):
            fs.drop_kernel()
            assert os.pread(fd, len(DATA), 0) == DATA
        fallocate(fd, PUNCH | KEEP_SIZE, 2 * PAGE + 10, 3 * PAGE)
        before = fs.stats()["source_read_bytes"]
        fs.drop_kernel()
        assert os.pread(fd, len(DATA), 0) == CHANGED
        assert fs.stats()["source_read_bytes"] - before <= 4 * PAGE, "the other pages stay cached"


def test_what_was_mapped_and_written_goes_into_the_hole(fs: MountedFs) -> None:
    (fs.source / "f").write_bytes(DATA)
    with opened(fs.path / "f") as fd, mmap.mmap(fd, len(DATA)) as mapping:
        mapping[3 * PAGE] = 77
        mapping[10 * PAGE] = 78
        fallocate(fd, PUNCH | KEEP_SIZE, 2 * PAGE, 3 * PAGE)
        assert mapping[3 * PAGE] == 0
        assert mapping[10 * PAGE] == 78
        mapping[3 * PAGE] = 79
        mapping.flush()
        assert (fs.source / "f").read_bytes()[3 * PAGE] == 79


def test_space_is_reserved_and_the_size_moves_or_stays(fs: MountedFs) -> None:
    with opened(fs.path / "f") as fd:
        os.write(fd, b"start")
        fallocate(fd, KEEP_SIZE, 0, 1 << 20)
        os.fsync(fd)
        assert os.fstat(fd).st_size == 5
        assert (fs.source / "f").stat().st_blocks >= (1 << 20) // 512
        fallocate(fd, 0, 0, 1 << 21)
        assert os.fstat(fd).st_size == 1 << 21 == (fs.source / "f").stat().st_size
        assert os.pread(fd, 8, 0) == b"start\0\0\0"
        os.posix_fallocate(fd, 1 << 21, 10)
        assert os.fstat(fd).st_size == (1 << 21) + 10


@pytest.mark.skipif(os.geteuid() != 0, reason="acting as another user needs root")
@pytest.mark.parametrize("call", ["punch", "copy"])
def test_a_change_by_another_user_takes_set_id_bits_away(place: Place, call: str) -> None:
    for top in (place.source, place.plain):
        (top / "f").write_bytes(DATA)
        (top / "f").chmod(0o6777)
        (top / "from").write_bytes(DATA)
        top.chmod(0o777)
        for parent in top.parents[:4]:
            parent.chmod(parent.stat().st_mode | 0o011)
    place.path.parent.stat()
    code = {
        "punch": "import ctypes\nfd = os.open('f', os.O_RDWR)\n"
        "ctypes.CDLL(None).fallocate(fd, 3, ctypes.c_int64(0), ctypes.c_int64(4096))",
        "copy": "os.copy_file_range(os.open('from', os.O_RDONLY), os.open('f', os.O_RDWR), 100, 0, 0)",
    }[call]
    for top in (place.path, place.plain):
        as_user(top, code)
    modes = [(top / "f").stat().st_mode for top in (place.path, place.source, place.plain)]
    assert modes == [0o100777] * 3


# -- holes ---------------------------------------------------------------------------------------


def test_holes_are_found(fs: MountedFs) -> None:
    with opened(fs.source / "f") as fd:
        os.pwrite(fd, b"a" * PAGE, 0)
        os.pwrite(fd, b"b" * PAGE, 1 << 20)
        os.ftruncate(fd, 1 << 21)
    with opened(fs.path / "f", os.O_RDONLY) as fd:
        assert os.lseek(fd, 0, os.SEEK_HOLE) == PAGE
        assert os.lseek(fd, PAGE, os.SEEK_DATA) == 1 << 20
        assert os.lseek(fd, 1 << 20, os.SEEK_HOLE) == (1 << 20) + PAGE
        with pytest.raises(OSError, match="No such device or address"):
            os.lseek(fd, (1 << 20) + PAGE, os.SEEK_DATA)


def test_what_the_kernel_has_not_written_yet_is_no_hole(fs: MountedFs) -> None:
    """A copying program would skip it."""
    with opened(fs.path / "f") as fd:
        os.ftruncate(fd, 1 << 20)
        with mmap.mmap(fd, 1 << 20) as mapping:
            mapping[512 * 1024] = 1
            assert os.lseek(fd, 0, os.SEEK_DATA) == 512 * 1024
        os.pwrite(fd, b"x" * PAGE, 256 * 1024)  # delayed with --writeback
        assert os.lseek(fd, 0, os.SEEK_DATA) == 256 * 1024
        os.pwrite(fd, b"x", 3 << 20)
        assert os.lseek(fd, 1 << 20, os.SEEK_DATA) == 3 << 20
        assert os.lseek(fd, 3 << 20, os.SEEK_HOLE) == (3 << 20) + 1


# -- copies --------------------------------------------------------------------------------------


def test_a_copy_is_made_in_the_source(fs: MountedFs) -> None:
    (fs.source / "from").write_bytes(DATA)
    with opened(fs.path / "from") as source, opened(fs.path / "to") as target:
        os.pwrite(target, b"z" * len(DATA), 0)
        os.pwrite(source, b"first", 0)
        with mmap.mmap(target, len(DATA)) as mapping:
            assert mapping[:] == b"z" * len(DATA)
            count = len(DATA) - PAGE
            assert os.copy_file_range(source, target, count, 0, 100) == count
            expected = b"z" * 100 + b"first" + DATA[5:count] + b"z" * (PAGE - 100)
            assert mapping[:] == expected
            os.fsync(target)  # it was copied by reads and writes, as its pages are not covered
            assert os.pread(target, len(DATA), 0) == expected == (fs.source / "to").read_bytes()
        assert fs.stats()["requests"].get("write", 0) < 100
        assert os.copy_file_range(source, target, 10 * len(DATA), 0, len(DATA)) == len(DATA)
        os.fsync(target)
        assert os.fstat(target).st_size == 2 * len(DATA) == (fs.source / "to").stat().st_size
        fs.drop_kernel()
        assert os.pread(target, len(DATA), len(DATA)) == b"first" + DATA[5:]


def test_large_copies_come_in_pieces(fs: MountedFs) -> None:
    size = (40 << 20) + 123
    data = os.urandom(1 << 20) * 41
    (fs.source / "from").write_bytes(data[:size])
    subprocess.run(["cp", fs.path / "from", fs.path / "to"], check=True, timeout=60)
    assert (fs.source / "to").read_bytes() == data[:size]


def test_a_copy_between_open_files_that_change_shows_no_old_bytes(share: Mounter) -> None:
    fs = share()
    with opened(fs.path / "from") as source, opened(fs.path / "to") as target:
        os.pwrite(target, bytes(8 * PAGE), 0)
        ends = threading.Event()

        def read() -> None:
            while not ends.is_set():
                os.pread(target, 8 * PAGE, 0)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            end = time.monotonic() + 2
            number = 0
            while time.monotonic() < end:
                number += 1
                os.pwrite(source, bytes([number % 250 + 1]) * 8 * PAGE, 0)
                assert os.copy_file_range(source, target, 8 * PAGE, 0, 0) == 8 * PAGE
                assert os.pread(target, 8 * PAGE, 0) == bytes([number % 250 + 1]) * 8 * PAGE
        finally:
            ends.set()
            reader.join()


def test_a_copy_to_a_part_of_a_page_loses_no_store_to_another(share: Mounter) -> None:
    """The kernel drops the pages that a copy covers, also in part, and dirty ones."""
    fs = share()
    with opened(fs.path / "from") as source, opened(fs.path / "to") as target:
        os.pwrite(target, bytes(PAGE), 0)
        ends = threading.Event()
        with mmap.mmap(target, PAGE) as mapping:

            def store() -> None:
                number = 0
                while not ends.is_set():
                    number += 1
                    mapping[PAGE - 100 :] = bytes([number % 250 + 1]) * 100
                    time.sleep(0)
                    if mapping[PAGE - 100 :] != bytes([number % 250 + 1]) * 100:
                        lost.append(number)

            lost = list[int]()
            storer = threading.Thread(target=store)
            storer.start()
            try:
                end = time.monotonic() + 2
                number = 0
                while time.monotonic() < end:
                    number += 1
                    os.pwrite(source, bytes([number % 250 + 1]) * 1024, 0)
                    assert os.copy_file_range(source, target, 1024, 0, 0) == 1024
                    assert os.pread(target, 1024, 0) == bytes([number % 250 + 1]) * 1024
            finally:
                ends.set()
                storer.join()
        assert not lost
