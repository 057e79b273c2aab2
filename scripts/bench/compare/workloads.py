"""Define what is run on a mount."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cgroups import Group
from .machine import call

ZIPF = "zipf:0.99"


@dataclass(frozen=True)
class Io:
    """Holds what fio measured."""

    mb_per_second: float
    iops: float
    bytes: int
    count: int
    """Reads and writes."""


def fio(
    group: Group | None,
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
    more: Sequence[str] = (),
) -> Io:
    """Read or write for so many seconds; whole: once through, or until the time is up.

    Path is a file, or a directory for a file of each job's own. A group is one to run in. More options
    override those here. Equal seeds give equal offsets; randrepeat would ignore them, and give the same
    ones each time.
    """
    where = "directory" if path.is_dir() else "filename"
    command: list[str | Path | int] = [
        "fio", "--name=job", "--thread", "--ioengine=psync", "--invalidate=0", "--fadvise_hint=0",
        "--fallocate=none", "--output-format=json", "--group_reporting",
        f"--{where}={path}", f"--rw={rw}", f"--bs={block}", f"--numjobs={readers}",
        f"--runtime={seconds}", f"--direct={int(direct)}", "--randrepeat=0",
        f"--randseed={seed}", f"--random_distribution={distribution}",
    ]  # fmt: skip
    if rw in {"read", "randread"}:
        command += ["--readonly", "--allow_file_create=0"]
    if not whole:
        command += ["--time_based", "--norandommap"]
    if size:
        command.append(f"--size={size}")
    command += more
    output = call(*(group.inside(*command) if group else command), timeout=seconds + 60)
    sides = [json.loads(output)["jobs"][0][side] for side in ("read", "write")]
    speed, iops, data, count = (
        sum(side[name] for side in sides) for name in ("bw_bytes", "iops", "io_bytes", "total_ios")
    )
    return Io(speed / 1e6, iops, data, count)


def read_through(path: Path, *, keep: bool = False) -> None:
    """Read a file. Then the kernel drops the pages that it cached for it, unless they are to stay."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
        if not keep:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


GREP = ("grep", "-rF", "--", "no such text in any source")
"""Ends with status 1: nothing is found, everything is read."""

TAR = ("tar", "cf", "-", ".")
"""To a pipe that is read away: tar reads nothing when it writes to /dev/null."""
