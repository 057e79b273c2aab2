"""Make many tiny files and a full pool: file records are at most one for each 4 KiB of it."""

import os
from pathlib import Path

from cleanfs.cache.files import max_files

from .lab import Daemon, Lab, in_processes, promised_mib

PROCESSES = 4


def run(lab: Lab) -> None:
    """See the module."""
    source = lab.directory("source")
    count = lab.pick(200_000, 40_000)
    for number in range(count // 1000):
        directory = source / f"d{number}"
        directory.mkdir()
        for i in range(1000):
            (directory / f"f{i}").write_bytes(b"%d %d " % (number, i) * 100)
    pool = lab.pick(256, 64)
    with lab.mount(source, "--pool-limit", f"{pool}M", "--page-cache", "16M") as fs:
        daemon = Daemon(fs)

        def read(number: int) -> None:
            for d in range(number, count // 1000, PROCESSES):
                _read(fs.path / f"d{d}", d)

        peaks = []
        for what in ("first", "second"):
            with daemon.watched() as samples:
                failures = in_processes(PROCESSES, read, lab.seconds)
            lab.hold(f"{count:,} files, {what} time", f"{len(failures)} failures", "0", not failures)
            most = max_files(pool << 20)
            lab.at_most(f"{what} time: file records", max(s.files for s in samples), most)
            inodes = max(s.inodes for s in samples)
            peaks.append(max(s.pss for s in samples))
            most_mib = promised_mib(fs.stats(), inodes, most, busy=False)
            lab.at_most(f"{what} time: PSS, the most", peaks[-1], most_mib, "MiB")
        stats = fs.stats()
        lab.inform("files with pages in the pool", f"{stats['backend_counters']['obj_count']:,}")
        used = stats["backend_counters"]["pool_used"] / (1 << 20)
        lab.at_most("the pool's own account", used, pool, "MiB")


def _read(directory: Path, number: int) -> None:
    for i in range(1000):
        fd = os.open(directory / f"f{i}", os.O_RDONLY)
        assert os.read(fd, 10_000) == b"%d %d " % (number, i) * 100, i
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
