"""Measure writes through a mount beside its peers: large, small, mixed, with fsync, by SQLite.

Every contestant is measured in each round, one after the other, and the median of the rounds is
reported with their spread. What the machine or a contestant lacks is skipped with a line. The
processor time is the daemon's alone, from ``/proc/PID/stat``.
"""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress

from scripts.bench.mount import (
    CLEANFS,
    PASSTHROUGH,
    Results,
    console,
    mergerfs,
    record,
    show,
    stats,
    write_json,
)

MEMORY = Path("/dev/shm")
TICKS = os.sysconf("SC_CLK_TCK")

STREAMS = {
    # name: fio's rw, block size, MiB
    "128 KiB sequential": ("write", "128k", 512),
    "4 KiB random": ("randwrite", "4k", 64),
}

SMALL = {
    # name: fio's options beside 4 KiB blocks and psync
    "4 KiB, 70 % reads, 4 jobs": ("--rw=randrw", "--rwmixread=70", "--numjobs=4", "--size=64m"),
    "4 KiB random, fsync each": ("--rw=randwrite", "--fsync=1", "--size=16m"),
}

TRANSACTIONS = 100


@dataclass(frozen=True)
class Contestant:
    """A mount, or no mount."""

    path: Path
    pid: int = 0
    """Of its daemon; 0 if there is none."""


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seconds", type=click.IntRange(1), default=5, show_default=True, help="Of a small job.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write all values here.")
@click.option(
    "--disk",
    type=click.Path(file_okay=False, exists=True),
    default="/var/tmp",
    show_default=True,
    help="A directory on a disk.",
)
@click.option(
    "--small", is_flag=True, help="Only the small jobs: mixed, with fsync, SQLite; against bindfs."
)
@click.option(
    "--baseline",
    type=click.Path(file_okay=False, exists=True),
    help="Another checkout of cleanfs, with its .venv, to measure small jobs beside.",
)
def main(
    rounds: int, seconds: int, json_file: str | None, disk: str, small: bool, baseline: str | None
) -> None:
    """Measure writes through a mount against mergerfs and bindfs."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # all is unmounted then, too
    results: Results = {}
    with Progress(console=console, transient=True) as progress:
        with tempfile.TemporaryDirectory(prefix="cleanfs-bench-", dir=disk) as scratch:
            bench_small(Path(scratch), rounds, seconds, baseline, results, progress)
        for name, place in () if small else (("disk", Path(disk)), ("memory", MEMORY)):
            with tempfile.TemporaryDirectory(prefix="cleanfs-bench-", dir=place) as scratch:
                bench_streams(name, Path(scratch), rounds, results, progress)
    show(results, {})
    write_json(results, json_file)


def bench_small(
    scratch: Path, rounds: int, seconds: int, baseline: str | None, results: Results, progress: Progress
) -> None:
    """What databases and the plainest fio jobs do, and what the daemon pays for it."""
    with ExitStack() as stack:
        mounts: list[tuple[str, Callable[[Path, Path], Any]]] = [("cleanfs", cleanfs)]
        if baseline:
            command = [str(Path(baseline, ".venv/bin/python")), "-m", "cleanfs"]
            mounts.append((baseline, lambda source, at: cleanfs(source, at, command=command)))
        if shutil.which("bindfs"):
            mounts.append(("bindfs", bindfs))
        else:
            console.print("bindfs is not installed: skipped (apt-get install bindfs)")
        contestants = {}
        for number, (who, mount) in enumerate(mounts):
            source, at = scratch / f"source{number}", scratch / f"mount{number}"
            source.mkdir()
            at.mkdir()
            contestants[who] = stack.enter_context(mount(source, at))
        (scratch / "plain").mkdir()
        contestants["the source itself"] = Contestant(scratch / "plain")
        task = progress.add_task("small", total=rounds * (len(SMALL) + 1) * len(contestants))
        for _ in range(rounds):
            for title, options in SMALL.items():
                for who, contestant in contestants.items():
                    small_fio(contestant.path, options, "--create_only=1")
                    before = cpu_seconds(contestant.pid)
                    job = small_fio(contestant.path, options, f"--runtime={seconds}")
                    used = cpu_seconds(contestant.pid) - before
                    for file in contestant.path.glob("job.*"):
                        file.unlink()
                    parts = (job["read"], job["write"])
                    record(results, title, who, "IOPS", sum(part["iops"] for part in parts))
                    if contestant.pid:
                        calls = sum(part["total_ios"] for part in parts)
                        record(results, f"{title}: CPU", who, "us per call", used / calls * 1e6)
                    progress.advance(task)
            for who, contestant in contestants.items():
                before = cpu_seconds(contestant.pid)
                took = transactions(contestant.path / "db", TRANSACTIONS)
                used = cpu_seconds(contestant.pid) - before
                title = "SQLite, rollback journal"
                record(results, title, who, "transactions/s", TRANSACTIONS / took)
                if contestant.pid:
                    each = used / TRANSACTIONS * 1e6
                    record(results, f"{title}: CPU", who, "us per transaction", each)
                progress.advance(task)


def small_fio(directory: Path, options: tuple[str, ...], *more: str) -> dict[str, Any]:
    """All of one job's JSON."""
    done = subprocess.run(
        [
            "fio", "--name=job", f"--directory={directory}", "--ioengine=psync", "--bs=4k", *options,
            *more, "--group_reporting", "--output-format=json",
        ],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    job: dict[str, Any] = json.loads(done.stdout)["jobs"][0]
    return job


def transactions(path: Path, count: int) -> float:
    """Seconds for so many inserts into a new database, each in a transaction of its own."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode=DELETE")
        db.execute("CREATE TABLE t (i INTEGER PRIMARY KEY, text TEXT)")
        start = time.monotonic()
        for number in range(count):
            db.execute("INSERT INTO t (text) VALUES (?)", (f"row {number} " * 10,))
        took = time.monotonic() - start
    path.unlink()
    return took


def cpu_seconds(pid: int) -> float:
    """What a process has used so far; 0 for none."""
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextmanager
def cleanfs(
    source: Path, mountpoint: Path, *options: str, command: list[str] = CLEANFS
) -> Iterator[Contestant]:
    """A mount of this checkout, or of another one."""
    subprocess.run([*command, "mount", *options, source, mountpoint], check=True)
    try:
        yield Contestant(mountpoint, stats(mountpoint)["pid"])
    finally:
        subprocess.run([*command, "umount", mountpoint], check=True)


@contextmanager
def bindfs(source: Path, mountpoint: Path) -> Iterator[Contestant]:
    """A bindfs mount, with threads, as it comes."""
    with subprocess.Popen(["bindfs", "-f", source, mountpoint]) as daemon:
        try:
            while not os.path.ismount(mountpoint):
                if daemon.poll() is not None:
                    raise SystemExit("bindfs did not start")
                time.sleep(0.01)
            yield Contestant(mountpoint, daemon.pid)
        finally:
            subprocess.run(["fusermount3", "-u", mountpoint], check=True)


def bench_streams(where: str, scratch: Path, rounds: int, results: Results, progress: Progress) -> None:
    """One synchronous writer, a new file each time, fsync at the end, and the time of that counts."""
    with ExitStack() as stack:
        contestants = {}
        for who, options in (("cleanfs", ()), ("cleanfs, passthrough", PASSTHROUGH)):
            source, at = scratch / f"source of {who}", scratch / who
            source.mkdir()
            at.mkdir()
            contestants[who] = stack.enter_context(cleanfs(source, at, *options)).path
        if shutil.which("mergerfs"):
            source = scratch / "source of mergerfs"
            source.mkdir()
            contestants["mergerfs cache.files=off"] = stack.enter_context(
                mergerfs(source, scratch / "mergerfs")
            )
        else:
            console.print("mergerfs is not installed: skipped (apt-get install mergerfs)")
        contestants["the source itself"] = scratch
        task = progress.add_task(where, total=rounds * 2 * len(STREAMS) * len(contestants))
        for number in range(rounds):
            for workload, (rw, block, size) in STREAMS.items():
                for direct in (False, True):
                    title = f"{where}, {workload}{', O_DIRECT' if direct else ''}"
                    for who, path in contestants.items():
                        progress.advance(task)
                        try:
                            job = stream_fio(path / "file", rw, block, size, direct)
                        except subprocess.CalledProcessError:
                            # mergerfs hands O_DIRECT on to the source, with buffers not aligned for it.
                            if number == 0:
                                console.print(f"{title}: {who} can not")
                            continue
                        megabytes = size * 1.048576 * 1000 / max(job["runtime"], 1)
                        iops = job["total_ios"] * 1000 / max(job["runtime"], 1)
                        random = rw == "randwrite"
                        unit, value = ("IOPS", iops) if random else ("MB/s", megabytes)
                        record(results, title, who, unit, value)


def stream_fio(path: Path, rw: str, block: str, size: int, direct: bool) -> dict[str, Any]:
    """The write section of one job's JSON, with the closing fsync in its time."""
    path.unlink(missing_ok=True)
    done = subprocess.run(
        [
            "fio", "--name=job", f"--direct={int(direct)}", "--ioengine=psync", "--fallocate=none",
            f"--filename={path}", f"--rw={rw}", f"--bs={block}", f"--size={size}M", "--end_fsync=1",
            "--output-format=json",
        ],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    write: dict[str, Any] = json.loads(done.stdout)["jobs"][0]["write"]
    path.unlink()
    return write


if __name__ == "__main__":
    main(prog_name="scripts/run bench/writes")
