"""A million inodes are looked up, forgotten and looked up again, and the tables stay bounded."""

import os
import subprocess
import time
from pathlib import Path

from .lab import Daemon, Lab, promised_mib

PER_DIRECTORY = 1000
MAX_INODES = 1 << 16
OVERSHOOT = 1.25
"""The kernel is asked to forget, and programs go on meanwhile."""


def run(lab: Lab) -> None:
    """See the module."""
    source = lab.directory("source")
    directories = lab.pick(1000, 150)
    count = directories * PER_DIRECTORY
    for number in range(directories):
        _fill(source / f"d{number}")
    with lab.mount(source) as fs:
        daemon = Daemon(fs)
        peaks = []
        for what in ("listed (ls -lR)", "each looked up by name", "and once more"):
            with daemon.watched() as samples:
                start = time.monotonic()
                if what.startswith("listed"):
                    subprocess.run(["ls", "-lR", fs.path], stdout=subprocess.DEVNULL, check=True)
                else:
                    _stat_all(fs.path, directories)
                rate = count / (time.monotonic() - start)
            inodes = max(sample.inodes for sample in samples)
            peaks.append(max(sample.pss for sample in samples))
            lab.inform(f"{count:,} files {what}", f"{rate:,.0f} a second")
            lab.at_most("inodes in the table, the most", inodes, MAX_INODES * OVERSHOOT + directories)
            most = promised_mib(fs.stats(), MAX_INODES + directories, 0, busy=False) - 512 - 64
            lab.at_most("PSS, the most", peaks[-1], most, "MiB")
        lab.at_most("growth from the second look to the third", peaks[2] - peaks[1], 8, "MiB")
        # Removed in the source, which nobody told the kernel: it forgets when it looks again.
        at_end = daemon.settled()
        lab.at_most("inodes in the end", at_end.inodes, MAX_INODES + directories)
        lab.inform("descriptors in the end", at_end.fds)


def _fill(directory: Path) -> None:
    directory.mkdir()
    fd = os.open(directory, os.O_RDONLY)
    for number in range(PER_DIRECTORY):
        os.mknod(f"f{number}", 0o100644, dir_fd=fd)
    os.close(fd)


def _stat_all(top: Path, directories: int) -> None:
    for number in range(directories):
        fd = os.open(top / f"d{number}", os.O_RDONLY)
        for name in range(PER_DIRECTORY):
            os.stat(f"f{name}", dir_fd=fd)
        os.close(fd)
