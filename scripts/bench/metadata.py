"""Measure ls -lR, find, git status and cp -r on a tree of many small files, beside mergerfs.

In each round every contestant runs every workload twice: on a mount that was made for it, which the
kernel knows nothing of, and again. The source is in RAM. Medians of the rounds, with their spread. What
the machine lacks (mergerfs) is skipped with a line.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path

import click
from rich.progress import Progress

from scripts.bench.mount import Results, cleanfs, console, record, show, write_json

FILES_PER_DIRECTORY = 30
DIRECTORIES_PER_DIRECTORY = 10
CONTENT = b"static int answer(void)\n{\n\treturn 42;\n}\n" * 24

LONG = "cache.attr=86400,cache.entry=86400"
"""What mergerfs believes for as long as ``--coherency none`` does."""

GIT = ["git", "-c", "core.checkStat=minimal", "-c", "safe.directory=*"]
"""Minimal: mergerfs shows other inode numbers than the source, which git would take for changes."""

Contestant = Callable[[Path], AbstractContextManager[Path]]


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--files", type=click.IntRange(FILES_PER_DIRECTORY), default=60_000, show_default=True)
@click.option("--only", multiple=True, help="Workloads by name (ls, find, git, cp); all by default.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write all values here.")
def main(rounds: int, files: int, only: tuple[str, ...], json_file: str | None) -> None:
    """Measure ls -lR, find, git status and cp -r on a mount against its peers."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # all is unmounted then, too
    results: Results = {}
    with (
        tempfile.TemporaryDirectory(prefix="cleanfs-bench-", dir="/var/tmp") as name,
        tempfile.TemporaryDirectory(prefix="cleanfs-bench-", dir="/dev/shm") as in_memory,
    ):
        scratch, copies = Path(name), Path(in_memory)
        numbers = count()
        source = scratch / "source"
        make_tree(source, files)
        workloads = {
            "ls": ("ls -lR", lambda path: run(["ls", "-lR", path])),
            "find": ("find", lambda path: run(["find", path])),
            "git": ("git status", lambda path: run([*GIT, "-C", path, "status"])),
            "cp": ("cp -r", lambda path: copy(path, copies / f"copy-{next(numbers)}")),
        }
        chosen = {key: workloads[key] for key in only or workloads}
        contestants = peers(source)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("rounds", total=rounds * len(chosen) * len(contestants))
            for _ in range(rounds):
                for title, workload in chosen.values():
                    for who, mounting in contestants.items():
                        with mounting(scratch / f"mnt-{next(numbers)}") as path:
                            record(results, f"{title}, new mount", who, "ms", timed(workload, path))
                            record(results, f"{title}, again", who, "ms", timed(workload, path))
                        for copied in copies.glob("copy-*"):
                            shutil.rmtree(copied)
                        progress.advance(task)
    show(results, {})
    write_json(results, json_file, files=files)


def peers(source: Path) -> dict[str, Contestant]:
    """Who is measured: how each one mounts."""
    contestants: dict[str, Contestant] = {
        "the source itself": lambda _: not_mounted(source),
        "cleanfs": lambda path: cleanfs(source, path),
        "cleanfs, coherency none": lambda path: cleanfs(source, path, "--coherency", "none"),
    }
    if shutil.which("mergerfs"):
        contestants["mergerfs"] = lambda path: mergerfs(source, path, "cache.files=auto-full")
        contestants["mergerfs, long timeouts"] = lambda path: mergerfs(
            source, path, f"cache.files=auto-full,{LONG}"
        )
    else:
        console.print("mergerfs is not installed: skipped (apt-get install mergerfs)")
    return contestants


@contextmanager
def not_mounted(source: Path) -> Iterator[Path]:
    """No file system in between."""
    yield source


@contextmanager
def mergerfs(source: Path, mountpoint: Path, options: str) -> Iterator[Path]:
    """A mergerfs mount."""
    mountpoint.mkdir(parents=True)
    subprocess.run(["mergerfs", "-o", options, source, mountpoint], check=True)
    try:
        yield mountpoint
    finally:
        subprocess.run(["fusermount3", "-u", mountpoint], check=True)


def make_tree(top: Path, files: int) -> None:
    """A git repository of small files, all of them committed."""
    top.mkdir(parents=True)
    for number in range(files):
        nth, place = divmod(number, FILES_PER_DIRECTORY)
        parts = [f"dir{digit}" for digit in str(nth)]
        directory = top.joinpath(*parts)
        if place == 0:
            directory.mkdir(parents=True, exist_ok=True)
        (directory / f"file_{place:02}.c").write_bytes(CONTENT)
    run([*GIT, "init", "-q", top])
    run([*GIT, "-C", top, "add", "."])
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    run([*GIT, "-C", top, *identity, "-c", "gc.auto=0", "commit", "-q", "-m", "all"])
    run([*GIT, "-C", top, "repack", "-q", "-a", "-d"])  # no 60,000 objects for the others to list
    time.sleep(1.1)  # git takes no stamp for proof that is as young as its index
    subprocess.run([*GIT, "-C", top, "status"], check=True, stdout=subprocess.DEVNULL)


def run(command: list[str | Path]) -> None:
    """Run what needs no answer."""
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    )


def copy(path: Path, target: Path) -> None:
    """``cp -r`` of the files, not of the repository, to RAM."""
    target.mkdir()
    run(["cp", "-r", *path.glob("dir*"), target])


def timed(workload: Callable[[Path], None], path: Path) -> float:
    """Milliseconds."""
    start = time.monotonic()
    workload(path)
    return (time.monotonic() - start) * 1000


if __name__ == "__main__":
    main(prog_name="scripts/run bench/metadata")
