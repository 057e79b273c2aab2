"""Measure reads and copies through a mount beside its peers, and the daemon's memory.

Every contestant is measured in each round, one after the other, and the median of the rounds is
reported with their spread, so that a machine whose speed drifts does not decide. What the machine
lacks (mergerfs) is skipped with a line.
"""

import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cleanfs.sizes import format_size
from scripts.lib.content import write_compressible, write_random

console = Console()

FILE_BYTES = 256 << 20
CP_BYTES = 1 << 30
SECONDS = 3
CLEANFS = [sys.executable, "-m", "cleanfs"]
HITS = "cleanfs, hits in zcache"
MERGERFS = "mergerfs cache.files=off"
PASSTHROUGH = ("--backend", "none", "--page-cache", "0")


@dataclass
class Series:
    """One figure of one contestant over the rounds."""

    unit: str
    values: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For the JSON."""
        return {
            "unit": self.unit,
            "median": statistics.median(self.values),
            "min": min(self.values),
            "max": max(self.values),
            "values": self.values,
        }

    def __str__(self) -> str:
        """Median and spread."""
        median = statistics.median(self.values)
        return f"{median:,.0f} {self.unit} ({min(self.values):,.0f} to {max(self.values):,.0f})"


Results = dict[str, dict[str, Series]]


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write all values here.")
@click.option("--memory/--no-memory", default=True, help="Read 6 GB and look at the daemon's RSS.")
def main(rounds: int, json_file: str | None, memory: bool) -> None:
    """Measure reads, copies and memory of a mount against its peers."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # all is unmounted then, too
    results: Results = {}
    rss: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="cleanfs-bench-", dir="/var/tmp") as name:
        scratch = Path(name)
        with Progress(console=console, transient=True) as progress:
            bench_reads(scratch / "reads", rounds, results, progress)
            bench_copies(scratch / "copies", rounds, results, progress)
            if memory:
                rss = bench_memory(scratch / "memory", progress)
    show(results, rss)
    write_json(results, json_file, memory=rss)


def bench_reads(scratch: Path, rounds: int, results: Results, progress: Progress) -> None:
    """Uncached reads of one file by one synchronous reader; the source is in RAM."""
    source = scratch / "source"
    source.mkdir(parents=True)
    write_compressible(source / "file", FILE_BYTES)
    with ExitStack() as stack:
        contestants = {
            HITS: stack.enter_context(cleanfs(source, scratch / "zcache", "--page-cache", "4M")),
            "the same, zstd:3+dict": stack.enter_context(
                cleanfs(source, scratch / "zstd", "--page-cache", "4M", "--compression", "zstd:3+dict")
            ),
            "the same, Python engine": stack.enter_context(
                cleanfs(source, scratch / "python", "--page-cache", "4M", CLEANFS_PUREPYTHON="1")
            ),
            "cleanfs, passthrough": stack.enter_context(
                cleanfs(source, scratch / "plain", *PASSTHROUGH)
            ),
        }
        if shutil.which("mergerfs"):
            contestants[MERGERFS] = stack.enter_context(mergerfs(source, scratch / "mergerfs"))
        else:
            console.print("mergerfs is not installed: skipped (apt-get install mergerfs)")
        for path in (source, *contestants.values()):
            read_through(path / "file")  # the source into RAM, the pages into zcache
        task = progress.add_task("reads", total=rounds * 2 * len(contestants))
        for _ in range(rounds):
            for workload, rw, block in (
                ("4 KiB random", "randread", "4k"),
                ("128 KiB sequential", "read", "128k"),
            ):
                for who, path in contestants.items():
                    # mergerfs would hand O_DIRECT on, and read the disk. Without its page cache all
                    # reads reach it anyway.
                    job = fio(path / "file", rw, block, direct=who != MERGERFS)
                    iops = rw == "randread"
                    value = job["iops"] if iops else job["bw_bytes"] / 1e6
                    record(results, workload, who, "IOPS" if iops else "MB/s", value)
                    progress.advance(task)
        read = stats(contestants[HITS])
        if read["source_read_bytes"] > FILE_BYTES * 1.01:
            raise SystemExit("the reads that should hit zcache reached the source")


def bench_copies(scratch: Path, rounds: int, results: Results, progress: Progress) -> None:
    """``cp -r`` of 1 GB of real files: straight, through a new mount, and again through that mount."""
    source = scratch / "source"
    collect(source, CP_BYTES)
    task = progress.add_task("cp -r", total=rounds * 3)
    for number in range(rounds):

        def copy(who: str, path: Path, number: int = number) -> None:
            target = scratch / f"copy-{number}"
            start = time.monotonic()
            subprocess.run(["cp", "-r", path, target], check=True)
            record(results, "cp -r of 1 GiB", who, "MB/s", CP_BYTES / 1e6 / (time.monotonic() - start))
            shutil.rmtree(target)
            progress.advance(task)

        copy("the source itself", source)
        with cleanfs(source, scratch / f"mnt-{number}", "--pool-limit", "1G") as path:
            copy("cleanfs, first time", path)
            drop_kernel_pages(path)
            copy("cleanfs, second time", path)


def bench_memory(scratch: Path, progress: Progress) -> dict[str, Any]:
    """RSS of a daemon with a 512 MiB pool and a 64 MiB page cache after 4 GB + 2 GB of reads."""
    source = scratch / "source"
    source.mkdir(parents=True)
    parts: list[tuple[str, int, Callable[[Path, int], None]]] = [
        ("compressible", 4_000_000_000, write_compressible),
        ("random", 2_000_000_000, write_random),
    ]
    task = progress.add_task("memory", total=len(parts))
    report: dict[str, Any] = {"pool_limit": 512 << 20, "page_cache": 64 << 20}
    with cleanfs(source, scratch / "mnt", "--pool-limit", "512M", "--page-cache", "64M") as path:
        report["rss_empty"] = stats(path)["rss_bytes"]
        for name, size, write in parts:
            write(source / name, size)
            read_through(path / name)
            report[f"rss_after_{name}"] = stats(path)["rss_bytes"]
            (source / name).unlink()
            progress.advance(task)
        report["pool_used"] = stats(path)["backend_counters"]["pool_used"]
    return report


def fio(path: Path, rw: str, block: str, *, direct: bool) -> dict[str, Any]:
    """The read section of one job's JSON."""
    done = subprocess.run(
        [
            "fio", "--name=job", "--readonly", f"--direct={int(direct)}", "--ioengine=psync",
            "--invalidate=0", "--randrepeat=0",
            f"--filename={path}", f"--rw={rw}", f"--bs={block}", f"--runtime={SECONDS}",
            "--time_based", "--output-format=json",
        ],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    read: dict[str, Any] = json.loads(done.stdout)["jobs"][0]["read"]
    return read


@contextmanager
def cleanfs(source: Path, mountpoint: Path, *options: str, **environment: str) -> Iterator[Path]:
    """A cleanfs mount."""
    mountpoint.mkdir(parents=True)
    subprocess.run(
        [*CLEANFS, "mount", *options, source, mountpoint], check=True, env=os.environ | environment
    )
    try:
        yield mountpoint
    finally:
        subprocess.run([*CLEANFS, "umount", mountpoint], check=True)


@contextmanager
def mergerfs(source: Path, mountpoint: Path) -> Iterator[Path]:
    """A mergerfs mount without its page cache."""
    mountpoint.mkdir(parents=True)
    subprocess.run(["mergerfs", "-o", "cache.files=off", source, mountpoint], check=True)
    try:
        yield mountpoint
    finally:
        subprocess.run(["fusermount3", "-u", mountpoint], check=True)


def collect(target: Path, size: int) -> None:
    """Real files, in as many copies as it takes."""
    target.mkdir(parents=True)
    directories = [Path(sysconfig.get_path("stdlib")), Path("/usr/lib"), Path("/usr/bin")]
    number = copied = 0
    while copied < size:
        number += 1
        for directory in directories:
            for path in sorted(directory.rglob("*")):
                if copied >= size:
                    return
                if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
                    part = target / str(number) / path.relative_to("/")
                    part.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, part)
                    copied += path.stat().st_size


def read_through(path: Path) -> None:
    """Read a file without leaving its pages in the kernel's cache of the mount."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def drop_kernel_pages(mountpoint: Path) -> None:
    """Make the kernel forget its pages of the mount."""
    for path in mountpoint.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def stats(mountpoint: Path) -> dict[str, Any]:
    """A snapshot from the control file."""
    parsed: dict[str, Any] = json.loads((mountpoint / ".cleancache/stats.json").read_text())
    return parsed


def record(results: Results, workload: str, who: str, unit: str, value: float) -> None:
    """Add one value."""
    results.setdefault(workload, {}).setdefault(who, Series(unit)).values.append(value)


def show(results: Results, rss: dict[str, Any]) -> None:
    """The tables."""
    table = Table("workload", "contestant", "median (spread)")
    for workload, contestants in results.items():
        for who, series in contestants.items():
            table.add_row(workload, who, str(series))
        table.add_section()
    console.print(table)
    if rss:
        memory = Table("memory of the daemon", "")
        for name, value in rss.items():
            memory.add_row(name.replace("_", " "), format_size(value))
        console.print(memory)


def write_json(results: Results, to: str | None, **more: object) -> None:
    """All values, and on what they were measured, if somebody wants them."""
    if to is None:
        return
    report = {
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "results": {
            workload: {who: series.as_dict() for who, series in contestants.items()}
            for workload, contestants in results.items()
        },
        **more,
    }
    Path(to).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(prog_name="scripts/run bench/mount")
