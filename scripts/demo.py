"""Show the main job, once: real files, a small page cache, two passes of cp -r and of fio.

The same reads from the source directly stand beside them. ``--counters`` prints the control files, too.
Exits 1 if a copied byte differs, if a second pass needed the source, or if something stays mounted.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from cleanfs.sizes import format_size

PAGE_CACHE = "16M"
SOURCE_BYTES = 300 << 20
FIO_FILES = 16
FIO_SECONDS = 60
SECOND_PASS_SHARE = 0.02
"""Part of its bytes that a second pass may still read from the source."""

DROP_BYTES = 4 << 20
"""How many bytes of a file the kernel forgets at a time."""

DIRECT, FIRST, SECOND = "source", "1st", "2nd"
"""Names of passes."""

console = Console()


@dataclass(frozen=True)
class Pass:
    """Says what one pass did."""

    name: str
    seconds: float
    read: int
    from_source: int
    hit_ratio: float | None = None
    """None where cleanfs was not asked."""
    compression_ratio: float | None = None


def main() -> int:
    """Run the demonstration. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--counters", action="store_true", help="print the mount's control files, too")
    counters = parser.parse_args().counters
    with tempfile.TemporaryDirectory(prefix="cleanfs-demo-", dir="/var/tmp") as scratch:
        source, mountpoint, copies = (Path(scratch) / name for name in ("source", "mnt", "copies"))
        for directory in (source, mountpoint, copies):
            directory.mkdir()
        with progress_bar() as progress:
            collect_files(source, progress)
            with mounted(source, mountpoint):
                passes, failures = demonstrate(source, mountpoint, copies, progress)
                title = caches(stats(mountpoint))
                progress.stop()
                if counters:
                    show_counters(mountpoint)
    show(passes, title)
    for failure in failures:
        console.print(f"[red]FAILED[/] {failure}")
    if not failures:
        console.print(conclusion(passes))
    return 1 if failures else 0


def demonstrate(
    source: Path, mountpoint: Path, copies: Path, progress: Progress
) -> tuple[list[Pass], list[str]]:
    """Run each workload on the source and twice on the mount. Returns passes and problems."""
    total = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    big = sorted((source / "lib").iterdir(), key=lambda path: -path.stat().st_size)[:FIO_FILES]
    big_total = sum(path.stat().st_size for path in big)
    failures = []
    passes = []
    for where, name in ((source, DIRECT), (mountpoint, FIRST), (mountpoint, SECOND)):
        copy = copies / name
        command = ["cp", "-r", str(where), str(copy)]
        passes.append(timed(f"cp -r, {name}", command, where, total, progress))
        if subprocess.run(["diff", "-r", source, copy], check=False).returncode:
            failures.append(f"the copy of the pass {passes[-1].name!r} differs from the source")
        shutil.rmtree(copy)
    for where, name in ((source, DIRECT), (mountpoint, FIRST), (mountpoint, SECOND)):
        files = ":".join(str(where / "lib" / path.name) for path in big)
        command = [
            "fio", "--name=demo", "--readonly", "--rw=randread", "--bs=16k", "--ioengine=psync",
            f"--filename={files}", f"--io_size={big_total}", "--size=100%",
            f"--runtime={FIO_SECONDS}", "--invalidate=0", "--randseed=1", "--minimal",
        ]  # fmt: skip
        passes.append(timed(f"fio 16k, {name}", command, where, big_total, progress))
    failures += [
        f"{p.name} read {format_size(p.from_source)} from the source"
        for p in passes
        if p.name.endswith(SECOND) and p.from_source > SECOND_PASS_SHARE * p.read
    ]
    return passes, failures


def timed(name: str, command: list[str], where: Path, size: int, progress: Progress) -> Pass:
    """Run one workload with the kernel's pages of its files dropped; on a mount, watch its counters."""
    on_mount = where.is_mount()
    drop_kernel_pages(where, pause=(lambda: stats(where)) if on_mount else (lambda: None))
    before = stats(where) if on_mount else {}
    task = progress.add_task(name, total=size)
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.1)
            if on_mount:
                progress.update(task, completed=min(asked(stats(where), before), size))
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with status {process.returncode}")
    seconds = time.monotonic() - start
    progress.update(task, completed=size)
    if not on_mount:
        return Pass(name, seconds, read=size, from_source=size)
    now = stats(where)
    hits = sum(now[key] - before[key] for key in ("pagecache_hits", "succ_gets"))
    return Pass(
        name=name,
        seconds=seconds,
        read=asked(now, before),
        from_source=now["source_read_bytes"] - before["source_read_bytes"],
        hit_ratio=hits * now["page_size"] / max(asked(now, before), 1),
        compression_ratio=now["compression_ratio"],
    )


def asked(now: dict[str, Any], before: dict[str, Any]) -> int:
    """Return the bytes in the pages that were asked for between two snapshots."""
    pages = sum(now[key] - before[key] for key in ("pagecache_hits", "pagecache_misses"))
    return int(pages * now["page_size"])


def drop_kernel_pages(directory: Path, pause: Callable[[], object]) -> None:
    """Make the kernel forget its pages of the files there, so that it cannot answer the next pass.

    Call ``pause`` after each piece: reclaim comes in pieces, too. What leaves in one burst may fill the
    ring of ``--evictions kernel`` faster than the daemon empties it. To show ``stats``, it does.
    """
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            fd = os.open(path, os.O_RDONLY)
            os.fdatasync(fd)  # dirty pages stay
            for start in range(0, os.fstat(fd).st_size, DROP_BYTES):
                os.posix_fadvise(fd, start, DROP_BYTES, os.POSIX_FADV_DONTNEED)
                pause()
            os.close(fd)


def collect_files(source: Path, progress: Progress) -> None:
    """Copy the Python standard library and the system's shared libraries, some 300 MB."""
    task = progress.add_task("collecting real files", total=SOURCE_BYTES)
    stdlib = Path(sysconfig.get_path("stdlib"))
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    candidates = [
        (path, Path("python") / path.relative_to(stdlib))
        for path in sorted(stdlib.rglob("*"))
        if not {"site-packages", "dist-packages", "__pycache__"} & set(path.parts)
    ]
    for directory in (Path("/usr/lib") / multiarch, Path("/usr/lib"), Path("/usr/bin")):
        libraries = [path for path in directory.iterdir() if path.is_file() and not path.is_symlink()]
        libraries.sort(key=lambda path: (".so" not in path.name, -path.stat().st_size))
        candidates += [(path, Path("lib") / path.name) for path in libraries]
    copied = 0
    for path, target in candidates:
        if copied >= SOURCE_BYTES:
            break
        if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
            (source / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, source / target)
            copied += path.stat().st_size
            progress.update(task, completed=min(copied, SOURCE_BYTES))
    progress.update(task, total=copied, completed=copied)


@contextmanager
def mounted(source: Path, mountpoint: Path) -> Iterator[None]:
    """Mount, for the length of the block."""
    cleanfs = [sys.executable, "-m", "cleanfs"]
    subprocess.run([*cleanfs, "mount", "--page-cache", PAGE_CACHE, source, mountpoint], check=True)
    try:
        yield
    finally:
        ended = subprocess.run([*cleanfs, "umount", mountpoint], check=False)
        if ended.returncode or mountpoint.is_mount():
            subprocess.run([*cleanfs, "umount", "--lazy", mountpoint], check=False)
            raise SystemExit(f"{mountpoint} could not be unmounted")


def stats(mountpoint: Path) -> dict[str, Any]:
    """Take a snapshot from the control file."""
    parsed: dict[str, Any] = json.loads((mountpoint / ".cleancache/stats.json").read_text())
    return parsed


def caches(now: dict[str, Any]) -> str:
    """Say in a snapshot's words where pages were kept."""
    kernels = now["evictions"] == "kernel"
    limit = "the kernel's" if kernels else format_size(now["pagecache_limit"])
    return f"page cache {limit}, pool {format_size(now['pool_limit'])}"


def show(passes: list[Pass], title: str) -> None:
    """Show the table of passes."""
    table = Table(title=title, title_justify="left")
    for column in ("pass", "seconds", "MB/s", "from the source", "hit ratio", "compression"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    for p in passes:
        table.add_row(
            p.name,
            f"{p.seconds:.2f}",
            f"{p.read / p.seconds / 1e6:.0f}",
            format_size(p.from_source),
            "-" if p.hit_ratio is None else f"{p.hit_ratio:.1%}",
            "-" if p.compression_ratio is None else f"{p.compression_ratio:.2f}",
        )
    console.print(table)


def conclusion(passes: list[Pass]) -> str:
    """Say in a sentence what the table shows, and in another one if cleanfs lost."""
    jobs = [passes[number : number + 3] for number in range(0, len(passes), 3)]
    from_source = sum(second.from_source for _, _, second in jobs)
    times = "; ".join(
        f"{second.name.partition(',')[0]} took {second.seconds:.1f} s "
        f"(first time {first.seconds:.1f} s, without cleanfs {direct.seconds:.1f} s)"
        for direct, first, second in jobs
    )
    said = (
        "All copies are as the source (diff -r), of which the second passes read "
        f"{format_size(from_source)}: {times}."
    )
    if any(second.seconds > direct.seconds for direct, _, second in jobs):
        said += (
            " The cached pass was slower than this source alone: cleanfs pays where a source is slow."
        )
    if any(second.seconds > first.seconds for _, first, second in jobs):
        said += " A second pass was slower than the first."
    return said


def show_counters(mountpoint: Path) -> None:
    """Show the control files."""
    control = mountpoint / ".cleancache"
    for name in ("succ_gets", "failed_gets", "puts", "flushes"):
        console.print(f".cleancache/{name}: {(control / name).read_text().strip()}")
    console.print("\n.cleancache/stats:")
    console.print((control / "stats").read_text().strip(), highlight=False)


def progress_bar() -> Progress:
    """Draw a line per step, with bytes."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:24}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
