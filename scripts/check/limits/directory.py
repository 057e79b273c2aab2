"""List, walk, change and empty a directory of 100,000 files."""

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .lab import Daemon, Lab

COMMANDS = {
    "ls -f": ["ls", "-f"],
    "ls -l": ["ls", "-l"],
    "find -size": ["find", ".", "-size", "+1"],
}


def run(lab: Lab) -> None:
    """See the module."""
    count = lab.pick(100_000, 10_000)
    source = lab.directory("source")
    fill(source / "big", count)
    wanted = set(os.listdir(source / "big"))
    with lab.mount(source) as fs:
        daemon = Daemon(fs)
        for name, command in COMMANDS.items():
            seconds = _timed(command, fs.path / "big")
            lab.inform(f"{name} of {count:,} files", f"{seconds:.2f} s")
        lab.same("names listed", set(os.listdir(fs.path / "big")) == wanted, True)
        _list_while_changing(lab, fs.path / "big", fs.source / "big", wanted)
        start = time.monotonic()
        subprocess.run(["find", fs.path / "big", "-type", "f", "-delete"], check=True)
        lab.inform("find -delete", f"{time.monotonic() - start:.2f} s")
        lab.same("left in the source", os.listdir(source / "big"), [])
        at_end = daemon.settled()
        lab.at_most("inodes in the end", at_end.inodes, 100)
        lab.inform("PSS in the end", f"{at_end.pss:.0f} MiB")
    with _peer(lab, source) as path:
        if path is not None:
            fill(source / "big2", count)
            for name, command in COMMANDS.items():
                lab.inform(f"{name} with mergerfs", f"{_timed(command, path / 'big2'):.2f} s")


def fill(directory: Path, count: int) -> None:
    """Make empty files."""
    directory.mkdir()
    fd = os.open(directory, os.O_RDONLY)
    for number in range(count):
        os.mknod(f"file-{number:06}", 0o100644, dir_fd=fd)
    os.close(fd)


def _list_while_changing(lab: Lab, path: Path, source: Path, stays: set[str]) -> None:
    """What is there all the time is listed exactly once, whatever comes and goes."""
    over = threading.Event()

    def change() -> None:
        number = 0
        while not over.is_set():
            number += 1
            place = path if number % 2 else source
            (place / f"new-{number}").touch()
            (place / f"new-{number}").rename(place / f"renamed-{number}")
            (place / f"renamed-{number}").unlink()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        missing = double = 0
        for _ in range(lab.pick(10, 3)):
            with os.scandir(path) as entries:
                names = [entry.name for entry in entries]
            missing += len(stays - set(names))
            double += len(names) - len(set(names))
    finally:
        over.set()
        thread.join()
    lab.same("files missing from listings of a directory that changes", missing, 0)
    lab.same("names listed twice", double, 0)


def _timed(command: list[str], where: Path) -> float:
    start = time.monotonic()
    subprocess.run(command, cwd=where, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - start


@contextmanager
def _peer(lab: Lab, source: Path) -> Iterator[Path | None]:
    if shutil.which("mergerfs") is None or lab.engine != "native":
        yield None
        return
    path = Path(tempfile.mkdtemp(prefix="peer", dir=lab.base))
    subprocess.run(["mergerfs", "-o", "cache.files=auto-full", source, path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)
