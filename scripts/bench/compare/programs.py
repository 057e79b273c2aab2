"""Work on a mount, as rows run it: in a process of its own, which prints the seconds that it took."""

import os
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random

from .machine import call

PAGE = 4096


def run_program(name: str, path: Path, *arguments: str | int) -> float:
    """Run one of PROGRAMS on a path. Gives its seconds; raises SkippedError if it fails."""
    return float(call(sys.executable, "-P", "-m", __name__, name, path, *arguments))


def insert(path: str, count: str, mode: str) -> float:
    """Insert rows into a new SQLite database, each in a transaction of its own."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"PRAGMA journal_mode={mode}")
        db.execute("CREATE TABLE t (i INTEGER PRIMARY KEY, text TEXT)")
        start = time.monotonic()
        for number in range(int(count)):
            db.execute("INSERT INTO t (text) VALUES (?)", (f"row {number} " * 10,))
        seconds = time.monotonic() - start
    os.unlink(path)
    return seconds


def create(directory: str, count: str, size: str) -> float:
    """Create files of that size."""
    data = b"x" * int(size)
    start = time.monotonic()
    for number in range(int(count)):
        fd = os.open(f"{directory}/{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        if data:
            os.write(fd, data)
        os.close(fd)
    return time.monotonic() - start


def unlink(directory: str, count: str) -> float:
    """Unlink what create made."""
    start = time.monotonic()
    for number in range(int(count)):
        os.unlink(f"{directory}/{number}")
    return time.monotonic() - start


def modify(path: str, count: str, seed: str) -> float:
    """Read each page and write it, in a random order; nothing of the file is in the kernel's cache."""
    pages = list(range(int(count)))
    Random(int(seed)).shuffle(pages)
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.monotonic()
    for page in pages:
        os.pwrite(fd, os.pread(fd, PAGE, page * PAGE), page * PAGE)
    seconds = time.monotonic() - start
    os.close(fd)
    return seconds


PROGRAMS: dict[str, Callable[..., float]] = {
    "insert": insert,
    "create": create,
    "unlink": unlink,
    "modify": modify,
}

if __name__ == "__main__":
    print(PROGRAMS[sys.argv[1]](*sys.argv[2:]))
