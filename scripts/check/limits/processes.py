"""Run 64 processes at once: each with files of its own, all with one file, and storms of forks."""

import os
import random
import time
import zlib
from pathlib import Path

from .content import text
from .lab import Daemon, Lab, in_processes, promised_mib

PROCESSES = 64
MAX_THREADS = 64 + 40 + 8
"""For the source, trio's own for everything else, and the rest."""


def run(lab: Lab) -> None:
    """See the module."""
    source = lab.directory("source")
    size = lab.pick(256, 64) << 20
    choose = random.Random(1)
    with (source / "shared").open("wb") as file:
        for _ in range(size >> 20):
            part = text(choose, 1 << 19) + choose.randbytes(1 << 19)
            file.write(part)
    seconds = lab.pick(40, 8)
    with lab.mount(source, "--page-cache", "32M", "--pool-limit", "128M") as fs:
        daemon = Daemon(fs)
        begin = daemon.sample()
        loads = {
            "files of their own": lambda i: _own_files(fs.path, i, seconds),
            "one file": lambda i: _one_file(fs.path / "shared", source / "shared", i, seconds),
            "large streams": lambda i: _streams(fs.path / "shared", source / "shared", i, seconds),
            "large writes": lambda i: _large_writes(fs.path, i, seconds),
            "storms of forks": lambda i: _forks(fs.path / "shared", source / "shared", i, seconds),
        }
        for what, load in loads.items():
            with daemon.watched() as samples:
                failures = in_processes(PROCESSES, load, seconds * 6 + 120)
            lab.hold(f"{PROCESSES} processes, {what}", f"{len(failures)} failed", "0", not failures)
            for failure in failures[:3]:
                lab.inform("failure", failure)
            stats = fs.stats()
            most = promised_mib(stats, stats["inodes"], stats["pagecache_files"], busy=True)
            lab.at_most(f"{what}: PSS, the most", max(s.pss for s in samples), most, "MiB")
            lab.at_most(f"{what}: threads, the most", max(s.threads for s in samples), MAX_THREADS)
        at_end = daemon.settled(15)
        lab.at_most("descriptors left behind", at_end.fds - begin.fds, at_end.inodes + 4)
        most = promised_mib(stats, stats["inodes"], stats["pagecache_files"], busy=False)
        lab.at_most("PSS afterwards", at_end.pss, most, "MiB")
        lab.same("open files afterwards", daemon.open_files(), 0)


def _own_files(top: Path, number: int, seconds: float) -> None:
    """Make, write, read, rename and remove, and look at the bytes each time."""
    choose = random.Random(number)
    place = top / f"p{number}"
    place.mkdir()
    files: dict[Path, int] = {}
    deadline = time.monotonic() + seconds
    step = 0
    while time.monotonic() < deadline:
        step += 1
        kind = choose.random()
        if kind < 0.4 or not files:
            name = place / f"f{step}"
            data = choose.randbytes(choose.choice((0, 1, 5000, 200_000)))
            name.write_bytes(data)
            files[name] = zlib.crc32(data)
        elif kind < 0.8:
            name = choose.choice(list(files))
            assert zlib.crc32(name.read_bytes()) == files[name], name
        elif kind < 0.9:
            name = choose.choice(list(files))
            files[name.rename(place / f"r{step}")] = files.pop(name)
        else:
            name = choose.choice(list(files))
            name.unlink()
            del files[name]
    assert {place / entry for entry in os.listdir(place)} == set(files)
    for name, crc in files.items():
        assert zlib.crc32(name.read_bytes()) == crc, name
        name.unlink()
    place.rmdir()


def _one_file(path: Path, source: Path, number: int, seconds: float) -> None:
    """Read random ranges, of which the kernel keeps nothing."""
    choose = random.Random(number)
    ours, truth = os.open(path, os.O_RDONLY), os.open(source, os.O_RDONLY)
    size = os.fstat(truth).st_size
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        at, length = choose.randrange(size), choose.choice((1, 4096, 70_000))
        assert os.pread(ours, length, at) == os.pread(truth, length, at), at
        os.posix_fadvise(ours, 0, 0, os.POSIX_FADV_DONTNEED)


def _streams(path: Path, source: Path, number: int, seconds: float) -> None:
    """Read from an offset of its own on, a MiB at a time."""
    ours, truth = os.open(path, os.O_RDONLY), os.open(source, os.O_RDONLY)
    size = os.fstat(truth).st_size
    at = size // PROCESSES * number
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert os.pread(ours, 1 << 20, at) == os.pread(truth, 1 << 20, at), at
        os.posix_fadvise(ours, at, 1 << 20, os.POSIX_FADV_DONTNEED)
        at = (at + (1 << 20)) % size


def _large_writes(top: Path, number: int, seconds: float) -> None:
    """Write a MiB at a time, over and over the same 8."""
    choose = random.Random(number)
    path = top / f"w{number}"
    parts = [b""] * 8
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        i = choose.randrange(8)
        parts[i] = choose.randbytes(1 << 10) * 1024
        os.pwrite(fd, parts[i], i << 20)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    for i, part in enumerate(parts):
        assert os.pread(fd, 1 << 20, i << 20).startswith(part), i
    os.close(fd)
    path.unlink()


def _forks(path: Path, source: Path, number: int, seconds: float) -> None:
    """Fork children that read through an inherited descriptor, and die with it or before it."""
    choose = random.Random(number)
    ours, truth = os.open(path, os.O_RDONLY), os.open(source, os.O_RDONLY)
    size = os.fstat(truth).st_size
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        at = choose.randrange(size)
        pid = os.fork()
        if pid == 0:
            os._exit(os.pread(ours, 4096, at) != os.pread(truth, 4096, at))
        if choose.random() < 0.1:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        else:
            assert os.waitpid(pid, 0)[1] == 0, at
