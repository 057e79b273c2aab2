"""Writes through a mount against its peers: on a disk and in memory, buffered and O_DIRECT.

One synchronous writer, a new file each time, fsync at the end, and the time of that counts. Every
contestant is measured in each round, one after the other, and the median of the rounds is reported with
their spread. What the machine or a contestant lacks is skipped with a line.
"""

import json
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from bench_mount import PASSTHROUGH, Results, cleanfs, console, mergerfs, record, show, write_json
from rich.progress import Progress

MEMORY = Path("/dev/shm")

WORKLOADS = {
    # name: fio's rw, block size, MiB
    "128 KiB sequential": ("write", "128k", 512),
    "4 KiB random": ("randwrite", "4k", 64),
}


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write all values here.")
@click.option(
    "--disk",
    type=click.Path(file_okay=False, exists=True),
    default="/var/tmp",
    show_default=True,
    help="A directory on a disk.",
)
def main(rounds: int, json_file: str | None, disk: str) -> None:
    """Measure writes through a mount against mergerfs."""
    results: Results = {}
    with Progress(console=console, transient=True) as progress:
        for name, place in (("disk", Path(disk)), ("memory", MEMORY)):
            with tempfile.TemporaryDirectory(prefix="cleanfs-bench-", dir=place) as scratch:
                bench_writes(name, Path(scratch), rounds, results, progress)
    show(results, {})
    write_json(results, json_file)


def bench_writes(where: str, scratch: Path, rounds: int, results: Results, progress: Progress) -> None:
    """All workloads on one source."""
    with ExitStack() as stack:
        contestants = {}
        for who, options in (("cleanfs", ()), ("cleanfs, passthrough", PASSTHROUGH)):
            source = scratch / f"source of {who}"
            source.mkdir()
            contestants[who] = stack.enter_context(cleanfs(source, scratch / who, *options))
        if shutil.which("mergerfs"):
            source = scratch / "source of mergerfs"
            source.mkdir()
            contestants["mergerfs cache.files=off"] = stack.enter_context(
                mergerfs(source, scratch / "mergerfs")
            )
        else:
            console.print("mergerfs is not installed: skipped (apt-get install mergerfs)")
        contestants["the source itself"] = scratch
        task = progress.add_task(where, total=rounds * 2 * len(WORKLOADS) * len(contestants))
        for number in range(rounds):
            for workload, (rw, block, size) in WORKLOADS.items():
                for direct in (False, True):
                    title = f"{where}, {workload}{', O_DIRECT' if direct else ''}"
                    for who, path in contestants.items():
                        progress.advance(task)
                        try:
                            job = fio(path / "file", rw, block, size, direct)
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


def fio(path: Path, rw: str, block: str, size: int, direct: bool) -> dict[str, Any]:
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
    main()
