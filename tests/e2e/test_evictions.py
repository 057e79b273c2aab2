"""Test that what the kernel evicts from its page cache of a mount is put, and nothing that is stale."""

import ctypes
import fcntl
import functools
import hashlib
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

import pytest

from cleanfs.backends.engines import native_module
from tests.e2e.conftest import Mounter
from tests.harness.machine import Deadline
from tests.harness.memory_limit import memory_limit, run
from tests.harness.mounting import MountedFs, cleanfs, end_of, mounted, settle, wait_until
from tests.harness.source_calls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO, held

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or native_module("cleanfs.vfs._evictions") is None,
    reason="the kernel's evictions take root, and a build with clang, bpftool and libbpf",
)

KERNEL = ("--evictions", "kernel")
PAGE = 4096
SIZE = 1_000_123
PAGES = -(-SIZE // PAGE)


def noise(seed: int = 0, size: int = SIZE) -> bytes:
    return random.Random(seed).randbytes(size)


def make(fs: MountedFs, data: bytes, name: str = "f") -> Path:
    """Make a file in the source whose fingerprint lasts, and have the kernel cache it."""
    (fs.source / name).write_bytes(data)
    settle()
    assert (fs.path / name).read_bytes() == data
    return fs.path / name


def evict(fd: int) -> None:
    """Have the kernel evict a file's clean pages, as reclaim does."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def evict_path(path: Path) -> None:
    with held(path) as fd:
        evict(fd)


def counted(fs: MountedFs, name: str) -> int:
    value: int = fs.stats()[f"evictions_{name}"]
    return value


@contextmanager
def before_the_daemon_sees_it(fs: MountedFs, call: Callable[[], object]) -> Iterator[None]:
    """Run the block, and then begin a call, while the daemon is stopped. Then let it go on."""
    fs.process.send_signal(signal.SIGSTOP)
    thread = threading.Thread(target=call, daemon=True)
    try:
        yield
        thread.start()
        time.sleep(0.1)  # its request waits now
    finally:
        fs.process.send_signal(signal.SIGCONT)
    thread.join(20)
    assert not thread.is_alive()


# -- what is put --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, SIZE])
def test_evicted_pages_are_found_without_the_source(mount: Mounter, size: int) -> None:
    fs = mount(*KERNEL)
    path = make(fs, noise(size=size))
    before = fs.stats()
    assert before["evictions"] == "kernel"
    evict_path(path)
    assert path.read_bytes() == noise(size=size)
    after = fs.stats()
    assert after["source_read_bytes"] == before["source_read_bytes"]
    assert after["evictions_put"] - before["evictions_put"] == -(-size // PAGE)


def test_what_the_kernel_keeps_is_not_kept_here(mount: Mounter) -> None:
    fs = mount(*KERNEL)
    make(fs, noise())
    stats = fs.stats()
    assert (stats["puts"], stats["pagecache_resident"], stats["pagecache_limit"]) == (0, 0, 0)


def test_what_is_read_past_the_kernels_cache_is_kept_at_once(mount: Mounter) -> None:
    fs = mount(*KERNEL)
    make(fs, b"", "other")
    (fs.source / "f").write_bytes(noise())
    settle()
    with held(fs.path / "f", os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 1 << 20) as buffer:
        assert os.preadv(fd, [buffer], 0) == SIZE
        source = fs.stats()["source_read_bytes"]
        assert os.preadv(fd, [buffer], 0) == SIZE
        assert buffer[:SIZE] == noise()
    assert fs.stats()["source_read_bytes"] == source
    assert fs.stats()["pagecache_resident"] == 0


def test_reclaim_is_an_eviction(mount: Mounter) -> None:
    fs = mount(*KERNEL)
    data = noise(size=24 << 20)
    (fs.source / "f").write_bytes(data)
    settle()
    with memory_limit(8 << 20) as little:
        for _ in range(2):
            assert run(little, "sha1sum", fs.path / "f").split()[0] == hashlib.sha1(data).hexdigest()
    stats = fs.stats()
    assert stats["evictions_put"] > 2000
    assert stats["evictions_lost"] == 0
    assert stats["succ_gets"] > 2000
    assert stats["source_read_bytes"] < 1.2 * len(data)


def test_pages_of_an_inode_that_the_kernel_forgets_are_put(mount: Mounter) -> None:
    fs = mount(*KERNEL, "--attr-timeout", "0")
    make(fs, noise())
    os.rename(fs.source / "f", fs.source / "g")
    with pytest.raises(FileNotFoundError):  # drops the dentry, and with it the inode
        os.stat(fs.path / "f")
    assert counted(fs, "put") == PAGES


def test_the_kernels_size_of_a_file_counts(mount: Mounter) -> None:
    fs = mount(*KERNEL, "--attr-timeout", "60")
    path = make(fs, noise())
    with (fs.source / "f").open("ab") as file:
        file.write(noise(1))
    with held(path) as fd:
        evict(fd)
        expected = noise() + noise(1)
        assert os.pread(fd, 2 * SIZE, 0) == expected
        evict(fd)
        assert os.pread(fd, 2 * SIZE, 0) == expected


# -- what is not --------------------------------------------------------------------------------


def test_truncated_pages_are_not_put(mount: Mounter) -> None:
    fs = mount(*KERNEL)
    path = make(fs, noise())
    os.truncate(path, 10 * PAGE)
    assert counted(fs, "removed") >= PAGES - 11
    assert counted(fs, "put") == 0
    os.truncate(path, SIZE)
    assert path.read_bytes() == noise()[: 10 * PAGE].ljust(SIZE, b"\0")


def test_invalidated_pages_are_not_put(mount: Mounter) -> None:
    fs = mount(*KERNEL)
    make(fs, noise())
    make(fs, noise(1))
    assert counted(fs, "put") == 0
    assert counted(fs, "removed") >= PAGES


def test_a_write_discards_what_was_evicted_before(mount: Mounter) -> None:
    fs = mount(*KERNEL)
    path = make(fs, noise())
    expected = bytearray(noise())
    expected[100_000:115_000] = b"new" * 5000
    with held(path, os.O_RDWR) as fd:
        with before_the_daemon_sees_it(fs, lambda: os.pwrite(fd, b"new" * 5000, 100_000)):
            evict(fd)
        for _ in range(2):
            evict(fd)
            assert os.pread(fd, SIZE, 0) == expected
    assert counted(fs, "put") > 0


def test_a_write_keeps_the_other_pages_that_were_evicted_before(mount: Mounter) -> None:
    fs = mount(*KERNEL)
    path = make(fs, noise())
    with held(path, os.O_RDWR) as fd:
        os.pwrite(fd, b"1", 0)  # so that the next write is served natively
        evict(fd)
        os.pwrite(fd, b"2", 0)
        assert counted(fs, "put") >= PAGES - 2


@pytest.mark.parametrize("mode", [FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, FALLOC_ZERO])
def test_a_hole_discards_what_was_evicted_before(mount: Mounter, mode: int) -> None:
    fs = mount(*KERNEL)
    path = make(fs, noise())
    call = ctypes.CDLL(None).fallocate
    with held(path, os.O_RDWR) as fd:
        args = fd, mode, ctypes.c_long(100_000), ctypes.c_long(100_000)
        with before_the_daemon_sees_it(fs, lambda: call(*args)):
            evict(fd)
        expected = noise()[:100_000] + bytes(100_000) + noise()[200_000:]
        for _ in range(2):
            evict(fd)
            assert os.pread(fd, SIZE, 0) == expected


def test_a_change_of_the_source_discards_what_was_evicted_before(mount: Mounter) -> None:
    fs = mount(*KERNEL)
    path = make(fs, noise())
    with held(path) as fd:
        fs.process.send_signal(signal.SIGSTOP)
        try:
            evict(fd)
            (fs.source / "f").write_bytes(noise(1))
        finally:
            fs.process.send_signal(signal.SIGCONT)
        for _ in range(2):
            assert path.read_bytes() == noise(1)
            evict(fd)


def test_a_page_of_which_only_a_part_was_written_is_not_put(mount: Mounter) -> None:
    fs = mount(*KERNEL)
    (fs.source / "f").write_bytes(noise())
    settle()
    expected = bytearray(noise())
    expected[5 * PAGE + 100 : 5 * PAGE + 110] = b"x" * 10
    with held(fs.path / "f", os.O_RDWR) as fd:
        os.pwrite(fd, b"x" * 10, 5 * PAGE + 100)  # the kernel reads nothing of that page for it
        evict(fd)
        assert counted(fs, "unclean") == 1
        assert os.pread(fd, SIZE, 0) == expected


def test_a_direct_write_by_a_file_opened_without_o_direct_holds_back_its_pages(mount: Mounter) -> None:
    fs = mount(*KERNEL)
    path = make(fs, noise())
    with held(path, os.O_RDWR) as fd, mmap.mmap(-1, PAGE) as buffer:
        for _ in range(50):  # so that the next write may be served natively
            os.pwrite(fd, b"1", 0)
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
        os.pwrite(fd, buffer, 8 * PAGE)
        evict(fd)
        assert counted(fs, "put") == 0
        assert counted(fs, "stale") > 100


def test_a_direct_write_holds_back_the_files_pages_until_it_is_closed(mount: Mounter) -> None:
    fs = mount(*KERNEL)
    path = make(fs, noise())
    with held(path, os.O_RDWR | os.O_DIRECT) as fd, mmap.mmap(-1, PAGE) as buffer:
        buffer[:] = b"d" * PAGE
        os.pwrite(fd, buffer, 8 * PAGE)
        evict(fd)
        assert counted(fs, "put") == 0
        assert counted(fs, "stale") > 100
    wait_until(lambda: fs.stats()["open_files"] == 0)
    expected = bytearray(noise())
    expected[8 * PAGE : 9 * PAGE] = b"d" * PAGE
    settle()
    for _ in range(3):
        assert path.read_bytes() == expected
        evict_path(path)
    assert counted(fs, "put") >= PAGES


def test_what_a_mapping_stored_past_the_end_stays_out(mount: Mounter) -> None:
    fs = mount(*KERNEL)
    path = make(fs, b"a" * 100)
    with held(path, os.O_RDWR) as fd:
        store_past_the_end(fd)
        evict(fd)
        os.ftruncate(fd, 300)
        assert os.pread(fd, 1000, 0) == b"a" * 100 + bytes(200)


def test_what_a_mapping_stored_past_an_earlier_end_stays_out(mount: Mounter) -> None:
    fs = mount(*KERNEL)
    path = make(fs, b"a" * 100)
    with held(path, os.O_RDWR) as fd:
        store_past_the_end(fd)
        os.pwrite(fd, b"c", 299)
        evict(fd)
        expected = os.pread(fd, 1000, 0)
        assert expected == (fs.source / "f").read_bytes()
        assert expected == b"a" * 100 + bytes(199) + b"c"


def store_past_the_end(fd: int) -> None:
    """Store to a file's last page, before and after its end at 100 bytes, and write it back."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    place = libc.mmap(None, PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    ctypes.memset(place + 99, ord("a"), 1)
    ctypes.memset(place + 100, ord("b"), 100)
    assert libc.msync(ctypes.c_void_p(place), PAGE, 4) == 0
    assert libc.munmap(ctypes.c_void_p(place), PAGE) == 0


def test_a_replaced_file_does_not_get_the_old_ones_pages(mount: Mounter) -> None:
    fs = mount(*KERNEL)
    path = make(fs, noise())
    for seed in range(1, 20):
        os.unlink(path)
        path.write_bytes(noise(seed, 50_000))  # it often gets the inode number
        evict_path(path)
        assert path.read_bytes() == noise(seed, 50_000)


# -- the ring -----------------------------------------------------------------------------------


def test_a_full_ring_loses_pages_and_nothing_else(mount: Mounter) -> None:
    fs = mount(*KERNEL, "--pool-limit", "16M")
    data = noise(size=4 << 20)
    path = make(fs, data)
    with held(path) as fd:
        fs.process.send_signal(signal.SIGSTOP)
        evict(fd)
        fs.process.send_signal(signal.SIGCONT)
        assert os.pread(fd, len(data), 0) == data
    stats = fs.stats()
    assert stats["evictions_lost"] > 500
    assert stats["evictions_put"] > 0
    assert stats["evictions_ring_high_water"] <= stats["evictions_ring_bytes"] == 1 << 20


def test_the_ring_is_a_part_of_the_pool_limit(mount: Mounter) -> None:
    fs = mount(*KERNEL, "--pool-limit", "64M")
    stats = fs.stats()
    assert stats["pool_limit"] == stats["pool_limit_now"] == 64 << 20
    assert stats["backend_counters"]["pool_limit"] == (64 << 20) - stats["evictions_ring_bytes"]
    for name in ("none", "zcache"):
        fs.control("backend").write_text(name)
    fs.control("pool_limit").write_text("32M")
    counters = fs.stats()["backend_counters"]
    assert counters["pool_limit"] == (32 << 20) - stats["evictions_ring_bytes"]
    with pytest.raises(OSError, match="Invalid argument"):
        fs.control("pool_limit").write_text("4M")  # less than the ring, and the least pool


def test_the_own_page_cache_stays_empty_whatever_its_limit(mount: Mounter) -> None:
    fs = mount(*KERNEL)
    fs.control("page_cache").write_text("2M")
    assert fs.control("page_cache").read_text() == f"{2 << 20}\n"
    evict_path(make(fs, noise()))
    assert (fs.path / "f").read_bytes() == noise()
    stats = fs.stats()
    assert (stats["pagecache_limit"], stats["pagecache_resident"]) == (0, 0)
    assert stats["memory_withheld_bytes"] == 0


def test_two_mounts_do_not_see_each_others_pages(source: Path, tmp_path: Path) -> None:
    points = [tmp_path / "a", tmp_path / "b"]
    for point in points:
        point.mkdir()
    with mounted(source, points[0], *KERNEL) as one, mounted(source, points[1], *KERNEL) as other:
        make(one, noise())
        evict_path(one.path / "f")
        assert counted(one, "put") == PAGES
        assert counted(other, "seen") == 0


# -- the program --------------------------------------------------------------------------------


def programs_of(fs: MountedFs) -> set[int]:
    """Return the ids of the programs that a daemon holds."""
    infos = Path(f"/proc/{fs.process.pid}/fdinfo").iterdir()
    lines = [line for info in infos for line in info.read_text().splitlines()]
    return {int(line.split()[1]) for line in lines if line.startswith("prog_id:")}


def programs() -> set[int]:
    """Return the ids of all programs in the kernel."""
    bpftool = which("bpftool") or which("bpftool", path="/usr/sbin:/sbin")
    if bpftool is None:
        pytest.skip("takes bpftool")
    return {program["id"] for program in json.loads(run([], bpftool, "-j", "prog", "show"))}


@pytest.mark.parametrize("end", ["kill", "umount"])
def test_nothing_is_left_in_the_kernel(mount: Mounter, end: str) -> None:
    fs = mount(*KERNEL)
    loaded = programs_of(fs)
    assert loaded
    assert loaded <= programs()
    if end == "kill":
        fs.kill()
    else:
        subprocess.run(["umount", fs.path], check=True, timeout=20)
        end_of(fs.process)
    wait_until(lambda: not loaded & programs())


# -- where it is not possible -------------------------------------------------------------------

NO_MODULE = (
    "import os, sys; os.environ.pop('CLEANFS_REQUIRE_NATIVE', None); "
    "sys.modules['cleanfs.vfs._evictions'] = None"
)


@pytest.mark.parametrize(
    ("options", "patch", "reason"),
    [
        (("--page-size", "8192"), "", "it takes --page-size 4096"),
        (("--pool-limit", "1M"), "", "it takes a --pool-limit of 2.0 MiB"),
        (("--backend", "none"), "", "the backend takes no pages from native code"),
        ((), NO_MODULE, "this build lacks the program"),
    ],
)
def test_without_them_the_own_page_cache_works_and_stats_say_why(
    mount: Mounter, options: tuple[str, ...], patch: str, reason: str
) -> None:
    fs = mount("--evictions", "auto", *options, patch=patch)
    assert fs.stats()["evictions"].startswith(f"own ({reason}")
    assert fs.stats()["pagecache_limit"] > 0
    assert reason in fs.log.read_text()
    assert make(fs, noise()).read_bytes() == noise()


def test_a_mount_that_must_have_them_fails_with_the_reason(source: Path, mountpoint: Path) -> None:
    done = cleanfs("mount", *KERNEL, "--page-size", "8192", source, mountpoint)
    assert done.returncode == 1
    assert done.stderr == ("cleanfs: --evictions kernel is not possible: it takes --page-size 4096\n")
    assert not os.path.ismount(mountpoint)


# -- what the kernel drops after our reply --------------------------------------------------------


@contextmanager
def busy_cpu(cpu: int) -> Iterator[None]:
    """Keep a CPU busy."""
    code = f"import os; os.sched_setaffinity(0, [{cpu}])\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as hog:
        try:
            yield
        finally:
            hog.kill()


def as_last(cpu: int, call: Callable[[], object]) -> None:
    """Make a call on a busy CPU, in a thread that gets what others leave: replies reach it late."""
    os.sched_setaffinity(0, [cpu])
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    call()


def punch(_: Path, fd: int, size: int) -> bytes:
    """Punch a hole at the start of a file. Returns what is there then."""
    mode = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
    ctypes.CDLL(None).fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(size))
    return bytes(size)


def copy(path: Path, fd: int, size: int) -> bytes:
    """Copy another file to the start of a file. Returns what is there then."""
    with held(path.with_name("other")) as other:
        os.copy_file_range(other, fd, size, 0, 0)
    return noise(7, size)


@pytest.mark.parametrize("change", [punch, copy])
def test_pages_that_the_kernel_drops_after_the_reply_are_not_put(
    mount: Mounter, change: Callable[[Path, int, int], bytes]
) -> None:
    first, *others = os.sched_getaffinity(0)
    if not others:
        pytest.skip("takes two CPUs")
    fs = mount(*KERNEL)
    size = 8 * PAGE
    make(fs, noise(7, size), "other")
    path = make(fs, noise(8, size))
    with held(path, os.O_RDWR) as fd:
        expected = change(path, fd, size)
    os.sched_setaffinity(fs.process.pid, others)
    late = 0
    deadline = Deadline(20)
    with busy_cpu(first), held(path, os.O_RDWR) as fd, held(fs.source / "f") as source_fd:
        while late < 5 and not deadline.over():
            data = os.urandom(size)
            os.pwrite(fd, data, 0)
            assert os.pread(fd, size, 0) == data
            call = functools.partial(change, path, fd, size)
            thread = threading.Thread(target=as_last, args=(first, call))
            thread.start()
            wait_until(lambda: os.pread(source_fd, size, 0) == expected)
            fs.stats()  # by the time of this reply, that of the change has been sent
            evict(fd)
            late += thread.is_alive()
            assert os.pread(fd, size, 0) == expected
            thread.join(20)
    assert late, "the kernel was never late"
