"""What is run on a mount."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from .cgroups import Group
from .machine import call

ZIPF = "zipf:0.99"


@dataclass(frozen=True)
class Io:
    """What fio measured."""

    mb_per_second: float
    iops: float
    bytes: int


def fio(
    group: Group,
    path: Path,
    rw: str,
    block: str,
    *,
    seconds: float,
    whole: bool = False,
    size: int = 0,
    direct: bool = False,
    readers: int = 1,
    distribution: str = "random",
    seed: int = 1,
) -> Io:
    """Synchronous reads or writes for so many seconds; whole: once through, or until the time is up.

    Equal seeds give equal offsets; randrepeat would ignore them, and give the same ones each time.
    """
    command: list[str | Path | int] = [
        "fio", "--name=job", "--thread", "--ioengine=psync", "--invalidate=0", "--fadvise_hint=0",
        "--fallocate=none", "--output-format=json", "--group_reporting",
        f"--filename={path}", f"--rw={rw}", f"--bs={block}", f"--numjobs={readers}",
        f"--runtime={seconds}", f"--direct={int(direct)}", "--randrepeat=0",
        f"--randseed={seed}", f"--random_distribution={distribution}",
    ]  # fmt: skip
    if "read" in rw:
        command += ["--readonly", "--allow_file_create=0"]
    if not whole:
        command += ["--time_based", "--norandommap"]
    if size:
        command.append(f"--size={size}")
    job = json.loads(call(*group.inside(*command), timeout=seconds + 60))["jobs"][0]
    side = job["read" if "read" in rw else "write"]
    return Io(side["bw_bytes"] / 1e6, side["iops"], side["io_bytes"])


def read_through(path: Path) -> None:
    """Read a file, and leave nothing of it in the kernel's cache of that mount."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


GREP = ("grep", "-rF", "--", "no such text in any source")
"""Ends with status 1: nothing is found, everything is read."""

TAR = ("tar", "cf", "-", ".")
"""To a pipe that is read away: tar reads nothing when it writes to /dev/null."""
