"""Measure a tree of many small files: listings, git, copies."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from .lab import Plan
from .machine import Command, SkippedError, call, need, timed
from .rows import Figure, Place, Row

CONTESTANTS = ("source", "cleanfs", "timeouts", "mergerfs", "bindfs")
FILES_PER_DIRECTORY = 30
CONTENT = b"static int answer(void)\n{\n\treturn 42;\n}\n" * 24
LIMIT = 120

# Minimal: mergerfs shows other inode numbers than the source, which git would take for changes.
GIT = ("git", "-c", "core.checkStat=minimal", "-c", "safe.directory=*")


def _tree(source: Path, plan: Plan) -> None:
    """Make a git repository of small files, all of them committed."""
    need("git")
    for number in range(plan.files):
        nth, place = divmod(number, FILES_PER_DIRECTORY)
        directory = source.joinpath(*(f"dir{digit}" for digit in str(nth)))
        if place == 0:
            directory.mkdir(parents=True, exist_ok=True)
        (directory / f"file_{place:02}.c").write_bytes(CONTENT)
    call(*GIT, "init", "-q", source)
    git = (*GIT, "-C", source, "-c", "user.name=bench", "-c", "user.email=bench@localhost")
    call(*git, "add", ".")
    call(*git, "-c", "gc.auto=0", "commit", "-q", "-m", "all")
    call(*git, "repack", "-q", "-a", "-d")  # no objects of single files for the others to list
    time.sleep(1.1)  # git does not trust a stamp that is as young as its index
    call(*git, "status")


def _twice(command: Callable[[Place, Path], Command]) -> Callable[[Place], Iterator[Figure]]:
    """Run a command on a mount that was made for it, of which the kernel knows nothing; and again."""

    def measure(place: Place) -> Iterator[Figure]:
        for workload in ("new mount", "again"):
            with (
                TemporaryDirectory(prefix="cleanfs-bench-", dir="/dev/shm") as copies,
                place.metered() as meter,
            ):
                seconds, cut = timed(command(place, Path(copies)), LIMIT, place.path)
            if cut:
                raise SkippedError(f"not done after {LIMIT} s")
            yield Figure(workload, "ms", seconds * 1000)
            yield from meter.cost(workload, "files", place.plan.files)

    return measure


ROWS = {
    name: Row(title, _twice(command), CONTESTANTS, data=_tree, new_mounts=True)
    for name, title, command in (
        ("ls", "ls -lR of a tree of small files", lambda place, copies: ("ls", "-lR")),
        (
            "find", "find by time, a stat of each of the same files",
            lambda place, copies: ("find", ".", "-type", "f", "-newermt", "2100-01-01"),
        ),
        (
            "git", "git status of the same tree",
            lambda place, copies: (*GIT, "--no-optional-locks", "status"),
        ),
        (
            "cp", "cp -r of the same tree to RAM",
            lambda place, copies: ("cp", "-r", *sorted(place.path.glob("dir*")), copies),
        ),
    )
}  # fmt: skip
